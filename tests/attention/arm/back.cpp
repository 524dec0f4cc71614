// Runs the kernels of a library, its only argument, for front.cpp, which is at the other end of stdin and stdout. With
// `--sets` as a second argument it prints the names of the instruction sets that the library has for this processor.

#include <dlfcn.h>
#include <string.h>

#include <memory>
#include <thread>
#include <vector>

#include "bridge.h"

// What XLA calls an error is opaque to the kernels.
struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

namespace {

using namespace bridge;

template <class Function>
Function* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found) return reinterpret_cast<Function*>(found);
  fprintf(stderr, "bridge: the library has no %s\n", name);
  exit(2);
}

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->errc, args->message}; }
void get_message(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  std::thread(args->task, args->data).detach();
  return nullptr;
}
XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = 2;
  return nullptr;
}

// All of XLA that the kernels use.
XLA_FFI_Api make_api() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create_error;
  api.XLA_FFI_Error_GetMessage = get_message;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = count_threads;
  return api;
}

struct Free {
  void operator()(void* memory) const { free(memory); }
};

// An array, aligned as XLA's are. What it holds before it is written is no number.
struct Array {
  XLA_FFI_Buffer buffer = {};
  std::vector<int64_t> dims;
  std::unique_ptr<void, Free> memory;

  explicit Array(Pipe& pipe) {
    buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer.dtype = static_cast<XLA_FFI_DataType>(pipe.get_number());
    buffer.rank = pipe.get_number();
    dims.resize(buffer.rank);
    pipe.get(dims.data(), sizeof(int64_t) * dims.size());
    buffer.dims = dims.data();
    const int64_t bytes = bytes_of(buffer);
    memory.reset(aligned_alloc(64, bytes / 64 * 64 + 64));
    buffer.data = memory.get();
    memset(buffer.data, 0xff, bytes);
  }
};

std::vector<Array> get_arrays(Pipe& pipe, bool filled) {
  std::vector<Array> arrays;
  const int64_t count = pipe.get_number();
  arrays.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    arrays.emplace_back(pipe);
    if (filled) pipe.get(arrays.back().buffer.data, bytes_of(arrays.back().buffer));
  }
  return arrays;
}

struct Attribute {
  std::string name;
  XLA_FFI_ByteSpan span;
  XLA_FFI_Scalar scalar;
  int64_t value = 0;
};

// Reads a call from the pipe, runs it, and writes what comes of it.
void run(XLA_FFI_Handler* handler, Pipe& pipe) {
  static const XLA_FFI_Api api = make_api();
  std::vector<Array> inputs = get_arrays(pipe, true), outputs = get_arrays(pipe, false);
  std::vector<Attribute> attributes(pipe.get_number());
  for (Attribute& attribute : attributes) {
    attribute.name = pipe.get_text();
    attribute.span = {attribute.name.data(), attribute.name.size()};
    attribute.scalar = {static_cast<XLA_FFI_DataType>(pipe.get_number()), &attribute.value};
    pipe.get(&attribute.value, element_bytes(attribute.scalar.dtype));
  }
  std::vector<void*> args, rets, scalars;
  std::vector<XLA_FFI_ByteSpan*> names;
  for (Array& array : inputs) args.push_back(&array.buffer);
  for (Array& array : outputs) rets.push_back(&array.buffer);
  for (Attribute& attribute : attributes) {
    scalars.push_back(&attribute.scalar);
    names.push_back(&attribute.span);
  }
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
  std::vector<XLA_FFI_AttrType> attribute_types(scalars.size(), XLA_FFI_AttrType_SCALAR);

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(scalars.size()),
                 attribute_types.data(),    names.data(), scalars.data()};
  const std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  pipe.put_number(error ? error->code : XLA_FFI_Error_Code_OK);
  if (error) return pipe.put_text(error->message);
  for (const Array& array : outputs) pipe.put(array.buffer.data, bytes_of(array.buffer));
}

}  // namespace

int main(int count, char** arguments) {
  void* library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  if (!library) {
    fprintf(stderr, "bridge: %s\n", count > 1 ? dlerror() : "expected the path of the library");
    return 2;
  }
  using Text = const char*();
  Text* texts[] = {find<Text>(library, "iceformer_instruction_sets"), find<Text>(library, "iceformer_instruction_set"),
                   find<Text>(library, "iceformer_version")};
  if (count > 2) return puts(texts[0]()) < 0;
  auto* choose = find<bool(const char*)>(library, "iceformer_choose_instruction_set");
  std::vector<XLA_FFI_Handler*> handlers;
  for (const char* name : kCalls) handlers.push_back(find<XLA_FFI_Handler>(library, name));

  Pipe pipe = {stdin, stdout};
  for (int64_t what; fread(&what, sizeof what, 1, stdin) == 1; pipe.send()) {
    if (what == kChoose)
      pipe.put_number(choose(pipe.get_text().c_str()));
    else if (what >= kSets)
      pipe.put_text(texts[what - kSets]());
    else
      run(handlers[what], pipe);
  }
  return 0;
}
