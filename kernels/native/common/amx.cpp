// Whether this process may run the kernels with AMX. Linux hands out tiles only on request.

#include "common/dispatch.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace iceformer {
namespace {

bool processor_has_vectors() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}

// AMX-BF16, AMX-TILE and AMX-INT8.
bool processor_has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBits = 1u << 22 | 1u << 24 | 1u << 25;
  return (d & kBits) == kBits;
}

// Whether the operating system keeps tiles and their configuration across switches of threads.
bool system_keeps_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kOsxsave = 1u << 27, kBits = 1u << 17 | 1u << 18;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
  uint32_t low, high;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));  // xgetbv
  return (low & kBits) == kBits;
}

// For all threads of the process.
bool system_lends_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool amx_allowed() {
  return processor_has_vectors() && processor_has_tiles() && system_keeps_tiles() && system_lends_tiles();
}

}  // namespace iceformer

#else

namespace iceformer {

bool amx_allowed() { return false; }

}  // namespace iceformer

#endif
