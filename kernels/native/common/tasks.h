// The tasks of one custom call, each with memory of its own, on XLA's threads.
#pragma once

#include <atomic>
#include <string>

#include "common/parallel.h"
#include "common/scratch.h"

namespace iceformer {

// Of this thread.
inline thread_local Scratch scratch;

// Calls run(i, memory) for every i < count with bytes(i) of scratch. `name` says in an error which call it was.
template <class Bytes, class Run>
xla::ffi::Error run_tasks(xla::ffi::ThreadPool pool, const char* name, int64_t count, const Bytes& bytes,
                          const Run& run) {
  std::atomic<bool> out_of_memory{false};
  parallel_for(pool, count, [&](int64_t i) {
    void* memory = scratch.get(bytes(i));
    if (memory)
      run(i, memory);
    else
      out_of_memory = true;
  });
  if (out_of_memory)
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, std::string(name) + ": out of memory");
  return xla::ffi::Error::Success();
}

}  // namespace iceformer
