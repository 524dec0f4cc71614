#include "common/dispatch.h"

#include <string.h>

#include <atomic>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#ifndef ICEFORMER_VERSION
#define ICEFORMER_VERSION "unversioned"
#endif

namespace iceformer {

// setup.py defines ICEFORMER_INSTRUCTION_SETS: X(name) for each set that this build has, best first.
#define X(name)                 \
  namespace name {              \
  extern const Kernels kernels; \
  }
ICEFORMER_INSTRUCTION_SETS
#undef X

namespace {

// Whether this processor has an instruction set.
[[maybe_unused]] bool has_baseline() { return true; }
#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
[[maybe_unused]] bool has_amx() { return amx_allowed(); }
// For tests, on tiles that are emulated; never chosen by itself, because it comes after the baseline.
[[maybe_unused]] bool has_amx_emulated() { return has_avx512_bf16(); }
#elif defined(__aarch64__)
// Whether the kernel says that the processor has all of some bits: Linux' HWCAP_ASIMDDP, HWCAP2_I8MM and HWCAP2_BF16,
// which older headers do not name.
bool has_bits([[maybe_unused]] unsigned long type, [[maybe_unused]] unsigned long bits) {
#if defined(__linux__)
  return (getauxval(type) & bits) == bits;
#else
  return false;
#endif
}
constexpr unsigned long kCapabilities = 16, kMoreCapabilities = 26;
[[maybe_unused]] bool has_neon() { return true; }
[[maybe_unused]] bool has_neon_dotprod() { return has_bits(kCapabilities, 1ul << 20); }
[[maybe_unused]] bool has_neon_bf16() {
  return has_neon_dotprod() && has_bits(kMoreCapabilities, 1ul << 13 | 1ul << 14);
}
#endif

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// Best first.
const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define X(name) \
  if (has_##name()) found.push_back({#name, &name::kernels});
    ICEFORMER_INSTRUCTION_SETS
#undef X
    return found;
  }();
  return sets;
}

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& current() {
  const InstructionSet* set = chosen.load();
  return set ? *set : available().front();
}

}  // namespace

const Kernels& kernels() { return *current().kernels; }

}  // namespace iceformer

bool iceformer_choose_instruction_set(const char* name) {
  if (!*name) {
    iceformer::chosen = nullptr;
    return true;
  }
  for (const auto& set : iceformer::available())
    if (!strcmp(set.name, name)) {
      iceformer::chosen = &set;
      return true;
    }
  return false;
}

const char* iceformer_instruction_set() { return iceformer::current().name; }

const char* iceformer_instruction_sets() {
  static const std::string names = [] {
    std::string text;
    for (const auto& set : iceformer::available()) text += (text.empty() ? "" : " ") + std::string(set.name);
    return text;
  }();
  return names.c_str();
}

const char* iceformer_version() { return ICEFORMER_VERSION; }
