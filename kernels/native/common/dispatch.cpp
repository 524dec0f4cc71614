#include "common/dispatch.h"

#include <string.h>

#include <atomic>
#include <string>
#include <vector>

#ifndef ICEFORMER_VERSION
#define ICEFORMER_VERSION "unversioned"
#endif

namespace iceformer {

#define ICEFORMER_DECLARE(isa)  \
  namespace isa {               \
  extern const Kernels kernels; \
  }

ICEFORMER_DECLARE(baseline)
#if defined(ICEFORMER_X86)
ICEFORMER_DECLARE(avx2)
ICEFORMER_DECLARE(avx512)
ICEFORMER_DECLARE(avx512_bf16)
#endif
#if defined(ICEFORMER_AMX)
ICEFORMER_DECLARE(amx)
#endif
#if defined(ICEFORMER_EMULATE_AMX)
ICEFORMER_DECLARE(amx_emulated)
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// Best first.
const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#if defined(ICEFORMER_AMX)
    if (amx_allowed()) found.push_back({"amx", &amx::kernels});
#endif
#if defined(ICEFORMER_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (bf16) found.push_back({"avx512_bf16", &avx512_bf16::kernels});
    if (avx512) found.push_back({"avx512", &avx512::kernels});
    if (avx2) found.push_back({"avx2", &avx2::kernels});
#endif
    found.push_back({"baseline", &baseline::kernels});
#if defined(ICEFORMER_EMULATE_AMX)
    found.push_back({"amx_emulated", &amx_emulated::kernels});
#endif
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
