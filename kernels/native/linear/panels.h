// How weights lie in panels, for those who multiply them: int8, or int4 in pairs.
#pragma once

#include "common/pack.h"
#include "common/shorts.h"
#include "linear/problem.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Steps of a block, which has 64 bytes of a panel.
template <class Weight>
constexpr int kStepsOfBlock = 1;
template <>
constexpr int kStepsOfBlock<Int4Pair> = 2;

// The next kShorts weights of a step of a block.
template <int kStep>
ICEFORMER_INLINE Shorts take_shorts(const int8_t* block) {
  return widen_to_shorts(block);
}
template <int kStep>
ICEFORMER_INLINE Shorts take_shorts(const Int4Pair* block) {
  return widen_half<kStep == 1>(&block->bits);
}

// What the scales of a kernel are stored as.
template <class Weight>
struct ScaleOf {
  using Type = float;
};
template <>
struct ScaleOf<Int4Pair> {
  using Type = Bfloat16Bits;
};

// The scales of an input feature's group, from an output on; null where there are none.
template <class Weight>
ICEFORMER_INLINE const typename ScaleOf<Weight>::Type* scales_of(const Linear& call, int64_t feature, int64_t output) {
  const auto* scales = static_cast<const typename ScaleOf<Weight>::Type*>(call.scale);
  return scales ? scales + feature / call.group * call.out_features + output : nullptr;
}

// Words of the 4 bytes that kLanes outputs from `column` on have in a block; zeros behind the last output.
ICEFORMER_INLINE Ints take_words(const Linear& call, int64_t block, int64_t column) {
  if (column >= call.out_features) return Ints{};
  const int64_t word = (column / kPanelOutputs * call.blocks() + block) * kPanelOutputs + column % kPanelOutputs;
  return load<Ints>(static_cast<const uint8_t*>(call.kernel) + word * kPanelInputs);
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
