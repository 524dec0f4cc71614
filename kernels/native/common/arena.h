// The memory of one task, cut into pieces.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace iceformer {
namespace ICEFORMER_ISA {

// Hands out aligned pieces of one scratch buffer; with no buffer it only counts. AddressSanitizer sees every access
// between the pieces, as if each were allocated alone.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T), room = (bytes + 63) / 64 * 64 + kGap;
    used_ += room;
#if defined(__SANITIZE_ADDRESS__)
    if (piece) {
      __asan_unpoison_memory_region(piece, bytes);
      __asan_poison_memory_region(piece + bytes, room - bytes);
    }
#endif
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGap = 256;
#else
  static constexpr size_t kGap = 0;
#endif
  char* base_;
  size_t used_ = 0;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
