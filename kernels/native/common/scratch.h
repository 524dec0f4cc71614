// Memory for a thread's work.
#pragma once

#include <stddef.h>
#include <stdlib.h>

namespace iceformer {

// Memory that a thread keeps from call to call, because fresh pages cost more than the work on them.
class Scratch {
 public:
  ~Scratch() { free(memory_); }
  void* get(size_t bytes) {
    if (!memory_ || bytes > size_) {
      free(memory_);
      size_ = bytes / 4096 * 4096 + 4096;
      memory_ = aligned_alloc(4096, size_);
      if (!memory_) size_ = 0;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace iceformer
