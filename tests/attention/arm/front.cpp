// A library that looks like the kernels' to XLA and hands every call to another process, which ICEFORMER_BRIDGE starts:
// its words, with blanks between. That process has the kernels, on an emulated processor.

#include <string.h>
#include <unistd.h>

#include <mutex>
#include <sstream>
#include <vector>

#include "bridge.h"

namespace {

using namespace bridge;

std::mutex one_at_a_time;

Pipe start() {
  const char* command = getenv("ICEFORMER_BRIDGE");
  if (!command) {
    fprintf(stderr, "bridge: ICEFORMER_BRIDGE is not set, expected the command that runs the kernels\n");
    abort();
  }
  std::istringstream text(command);
  std::vector<std::string> words;
  for (std::string word; text >> word;) words.push_back(word);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(&word[0]);
  arguments.push_back(nullptr);
  int request[2], answer[2];
  if (pipe2(request, 02000000) || pipe2(answer, 02000000)) abort();  // O_CLOEXEC
  if (fork() == 0) {
    dup2(request[0], 0);
    dup2(answer[1], 1);
    execvp(arguments[0], arguments.data());
    _exit(127);
  }
  close(request[0]);
  close(answer[1]);
  return {fdopen(answer[0], "rb"), fdopen(request[1], "wb")};
}

Pipe& kernels() {
  static Pipe pipe = start();
  return pipe;
}

const char* ask(int64_t what) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  static std::string answers[kChoose];
  kernels().put_number(what);
  kernels().send();
  return (answers[what] = kernels().get_text()).c_str();
}

void put_buffer(const XLA_FFI_Buffer& buffer) {
  kernels().put_number(buffer.dtype);
  kernels().put_number(buffer.rank);
  kernels().put(buffer.dims, sizeof(int64_t) * buffer.rank);
}

XLA_FFI_Error* error(const XLA_FFI_CallFrame* frame, XLA_FFI_Error_Code code, const std::string& message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message.c_str(), code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

XLA_FFI_Error* call(int64_t number, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    return nullptr;
  }
  std::lock_guard<std::mutex> lock(one_at_a_time);
  Pipe& pipe = kernels();
  pipe.put_number(number);
  pipe.put_number(frame->args.size);
  for (int64_t i = 0; i < frame->args.size; ++i) {
    const auto& buffer = *static_cast<XLA_FFI_Buffer*>(frame->args.args[i]);
    put_buffer(buffer);
    pipe.put(buffer.data, bytes_of(buffer));
  }
  pipe.put_number(frame->rets.size);
  for (int64_t i = 0; i < frame->rets.size; ++i) put_buffer(*static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i]));
  pipe.put_number(frame->attrs.size);
  for (int64_t i = 0; i < frame->attrs.size; ++i) {
    if (frame->attrs.types[i] != XLA_FFI_AttrType_SCALAR)
      return error(frame, XLA_FFI_Error_Code_UNIMPLEMENTED, "bridge: an attribute is no scalar");
    const auto& scalar = *static_cast<XLA_FFI_Scalar*>(frame->attrs.attrs[i]);
    pipe.put_text({frame->attrs.names[i]->ptr, frame->attrs.names[i]->len});
    pipe.put_number(scalar.dtype);
    pipe.put(scalar.value, element_bytes(scalar.dtype));
  }
  pipe.send();
  const int64_t code = pipe.get_number();
  if (code) return error(frame, static_cast<XLA_FFI_Error_Code>(code), pipe.get_text());
  for (int64_t i = 0; i < frame->rets.size; ++i) {
    const auto& buffer = *static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i]);
    pipe.get(buffer.data, bytes_of(buffer));
  }
  return nullptr;
}

}  // namespace

extern "C" {
XLA_FFI_Error* iceformer_exact(XLA_FFI_CallFrame* frame) { return call(0, frame); }
XLA_FFI_Error* iceformer_two_stage(XLA_FFI_CallFrame* frame) { return call(1, frame); }
XLA_FFI_Error* iceformer_linear(XLA_FFI_CallFrame* frame) { return call(2, frame); }
XLA_FFI_Error* iceformer_choose(XLA_FFI_CallFrame* frame) { return call(3, frame); }
XLA_FFI_Error* iceformer_attend_chosen(XLA_FFI_CallFrame* frame) { return call(4, frame); }

const char* iceformer_instruction_sets() { return ask(kSets); }
const char* iceformer_instruction_set() { return ask(kSet); }
const char* iceformer_version() { return ask(kVersion); }
bool iceformer_choose_instruction_set(const char* name) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  kernels().put_number(kChoose);
  kernels().put_text(name);
  kernels().send();
  return kernels().get_number();
}
}
