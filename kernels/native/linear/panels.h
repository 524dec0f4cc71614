// How weights lie in panels, for those who multiply them: int8, or int4 in pairs.
#pragma once

#include "common/pack.h"
#include "common/shorts.h"
#include "linear/problem.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Pieces of a step, each with the weights of other input features.
template <class Weight>
constexpr int kPieces = 1;
template <>
constexpr int kPieces<Int4Pair> = 2;

// kShorts weights of a piece, and the rows' parts that they are multiplied with.
template <int kPiece>
ICEFORMER_INLINE Shorts take_shorts(const int8_t* step) {
  return widen_to_shorts(step);
}
template <int kPiece>
ICEFORMER_INLINE Shorts take_shorts(const Int4Pair* step) {
  return widen_half<kPiece == 1>(&step->bits);
}
template <class Weight, int kPiece>
ICEFORMER_INLINE Shorts take_parts(const int16_t* parts) {
  if constexpr (kPieces<Weight> == 1) return repeat_four(parts);
  return repeat_two(parts + 2 * kPiece);
}

// Sums of a step's vectors as a vector for kLanes outputs: the next one's, or the next two's where neighbouring lanes
// are parts of one sum.
ICEFORMER_INLINE Floats sum_of_outputs(const int8_t*, const Floats* sums) { return add_neighbours(sums[0], sums[1]); }
ICEFORMER_INLINE Floats sum_of_outputs(const Int4Pair*, const Floats* sums) { return sums[0]; }

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

// Where the weights of a step begin that outputs from `column` on have.
template <class Weight>
ICEFORMER_INLINE const Weight* step_of(const Linear& call, int64_t step, int64_t column) {
  const int64_t place = (column / kPanelOutputs * call.steps() + step) * kPanelOutputs + column % kPanelOutputs;
  return static_cast<const Weight*>(call.kernel) + place * (kPanelInputs / kPieces<Weight>);
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
