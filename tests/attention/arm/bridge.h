// What goes through the pipes between a process on this processor, where XLA runs (front.cpp), and one on an emulated
// Arm processor, where the kernels run (back.cpp): both have little-endian words and lay out structs alike.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <string>

#include "xla/ffi/api/c_api.h"

namespace bridge {

// A request begins with one of these, or with the number of a custom call.
enum : int64_t { kSets = 100, kSet = 101, kVersion = 102, kChoose = 103 };

constexpr const char* kCalls[] = {"iceformer_exact", "iceformer_two_stage", "iceformer_linear", "iceformer_choose",
                                  "iceformer_attend_chosen"};

inline int64_t element_bytes(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_PRED:
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_U8:
      return 1;
    case XLA_FFI_DataType_BF16:
    case XLA_FFI_DataType_F16:
      return 2;
    case XLA_FFI_DataType_F32:
    case XLA_FFI_DataType_S32:
      return 4;
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_S64:
      return 8;
    default:
      fprintf(stderr, "bridge: no type that a kernel takes: %d\n", type);
      abort();
  }
}

inline int64_t bytes_of(const XLA_FFI_Buffer& buffer) {
  int64_t bytes = element_bytes(buffer.dtype);
  for (int64_t i = 0; i < buffer.rank; ++i) bytes *= buffer.dims[i];
  return bytes;
}

// The two ends of a connection. Whoever finds that the other has gone ends, too.
struct Pipe {
  FILE *in, *out;

  void get(void* to, size_t bytes) {
    if (fread(to, 1, bytes, in) == bytes) return;
    fprintf(stderr, "bridge: the other process has gone\n");
    _exit(3);
  }
  void put(const void* from, size_t bytes) {
    if (fwrite(from, 1, bytes, out) == bytes) return;
    fprintf(stderr, "bridge: the other process has gone\n");
    _exit(3);
  }
  int64_t get_number() {
    int64_t number;
    get(&number, sizeof number);
    return number;
  }
  void put_number(int64_t number) { put(&number, sizeof number); }
  std::string get_text() {
    std::string text(get_number(), '\0');
    get(&text[0], text.size());
    return text;
  }
  void put_text(const std::string& text) {
    put_number(text.size());
    put(text.data(), text.size());
  }
  void send() { fflush(out); }
};

}  // namespace bridge
