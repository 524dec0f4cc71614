// A few rows times a kernel of int8 or int4 panels. The rows are rounded to 30 bits, in two parts of 16, so that
// everything is multiplied and summed in integers, which takes less time than making floats of the weights and loses
// nothing that a float32 has, but where a number is less than 1/32 of the largest beside it.
#pragma once

#include "common/arena.h"
#include "linear/panels.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Rounds one chunk of a row: gives its unit and writes, for each step, four high parts and four low ones, in whole
// vectors.
template <class Element>
ICEFORMER_INLINE float round_chunk(const Element* from, int64_t count, int16_t* parts) {
  constexpr int32_t kMagnitude = 0x7fffffff, kExponent = 0x7f800000, kOne = 1 << 23, kBits = 28;
  Ints magnitudes = fill_ints((kBits + 1) * kOne);
  for (int64_t i = 0; i < count; i += kLanes)
    magnitudes = larger(magnitudes, (Ints)widen(from + i, count - i) & kMagnitude);
  int32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = magnitudes[lane] > most ? magnitudes[lane] : most;
  // A power of 2: what is large keeps all of its bits.
  const int32_t unit = (most & kExponent) - kBits * kOne, inverse = 254 * kOne - unit;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Ints whole = __builtin_convertvector(widen(from + i, count - i) * load<float>(&inverse), Ints);
    store(parts + 2 * i, narrow_by_fours(whole >> 15, whole & 0x7fff));
  }
  if (most >= kExponent) return __builtin_nanf("");  // of a number that is not finite
  return load<float>(&unit);
}

template <class Element>
void round_rows_of(const Linear& call) {
  for (int64_t row = 0; row < call.rows; ++row) {
    const Element* from = static_cast<const Element*>(call.input) + row * call.in_features;
    float* unit = call.row_units(row);
    for (int64_t first = 0, end; first < call.in_features; first = end) {
      end = call.chunk_end(first);
      *unit++ = round_chunk(from + first, end - first, call.row_parts(row) + first * 2);
    }
  }
}

// A task of at most kFewRows rows and some panels.
template <class Weight>
class FewPanels {
 public:
  FewPanels(const Linear& call, const LinearTask& task) : call_(call), task_(task) {}

  void run() { run_rows<kFewRows>(); }

 private:
  // Vectors of shorts, and of sums, in a step of a panel, and those whose sums are in registers at once.
  static constexpr int kVectors = static_cast<int>(kPanelOutputs * kPanelInputs / kPieces<Weight> / kShorts);
  static constexpr int kOutputs = static_cast<int>(kPanelOutputs / kLanes);
  template <int R>
  static constexpr int kAtOnce = kLanes == 16 || kVectors < 4 ? kVectors : R == 1 ? 4 : 2;
  static constexpr int64_t kStep = kPanelOutputs * kPanelInputs / kPieces<Weight>;

  template <int R>
  void run_rows() {
    if constexpr (R > 0) {
      if (task_.rows < R) return run_rows<R - 1>();
      for (int64_t column = 0; column < task_.columns; column += kPanelOutputs) {
        const int64_t first = task_.column + column;
        multiply_panel<R>(step_of<Weight>(call_, 0, first), first, smaller(task_.columns - column, kPanelOutputs));
      }
    }
  }

  template <int R>
  void multiply_panel(const Weight* panel, int64_t column, int64_t columns) {
    Floats total[R][kOutputs] = {};
    prefetch_scales(column + kPanelOutputs);
    const auto* scales = scales_of<Weight>(call_, 0, column);
    int64_t group_end = call_.group;
    for (int64_t chunk = 0, first = 0, end; first < call_.in_features; ++chunk, first = end) {
      // Without dividing, which takes as long as many a product.
      if (first == group_end) {
        group_end += call_.group;
        scales += call_.out_features;
      }
      end = smaller(group_end, first + kMostChunk);
      Floats sums[R][kVectors];
      for (int v = 0; v < kVectors; v += kAtOnce<R>)
        multiply_chunk<R, kAtOnce<R>>(panel + first / kPanelInputs * kStep + v * kShorts, first, end, v, sums);
      for (int i = 0; i < kOutputs; ++i) {
        const Floats scale = widen(scales + i * kLanes, columns - i * kLanes);
        for (int r = 0; r < R; ++r) {
          const Floats sum = sum_of_outputs(panel, sums[r] + i * kVectors / kOutputs);
          total[r][i] += sum * call_.row_units(task_.row + r)[chunk] * scale;
        }
      }
    }
    for (int r = 0; r < R; ++r)
      memcpy(call_.output + (task_.row + r) * call_.out_features + column, total[r], sizeof(float) * columns);
  }

  // The scales of a panel are a line of memory here and there, which no processor expects.
  ICEFORMER_INLINE void prefetch_scales(int64_t column) const {
    if (column >= call_.out_features) return;
    const auto* from = scales_of<Weight>(call_, 0, column);
    for (int64_t first = 0; first < call_.in_features; first += call_.group, from += call_.out_features)
      __builtin_prefetch(from);
  }

  // Sums over a chunk of `V` vectors from `v` on.
  template <int R, int V>
  ICEFORMER_INLINE void multiply_chunk(const Weight* from, int64_t first, int64_t end, int v,
                                       Floats (&sums)[R][kVectors]) const {
    Ints high[R][V], low[R][V];
    const int16_t* parts[R];
    for (int r = 0; r < R; ++r) {
      parts[r] = call_.row_parts(task_.row + r);
      for (int i = 0; i < V; ++i) high[r][i] = low[r][i] = Ints{};
    }
    for (int64_t at = first * 2; at < end * 2; at += 2 * kPanelInputs, from += kStep) {
      add_piece<R, V, 0>(from, parts, at, high, low);
      if constexpr (kPieces<Weight> > 1) add_piece<R, V, 1>(from, parts, at, high, low);
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < V; ++i) sums[r][v + i] = to_floats(high[r][i]) * 32768.0f + to_floats(low[r][i]);
  }

  template <int R, int V, int kPiece>
  ICEFORMER_INLINE static void add_piece(const Weight* step, const int16_t* const (&parts)[R], int64_t at,
                                         Ints (&high)[R][V], Ints (&low)[R][V]) {
    Shorts weights[V];
    for (int i = 0; i < V; ++i) weights[i] = take_shorts<kPiece>(step + i * kShorts);
    for (int r = 0; r < R; ++r) {
      const Shorts of_high = take_parts<Weight, kPiece>(parts[r] + at);
      const Shorts of_low = take_parts<Weight, kPiece>(parts[r] + at + kPanelInputs);
      for (int i = 0; i < V; ++i) {
        high[r][i] = add_pairs(high[r][i], weights[i], of_high);
        low[r][i] = add_pairs(low[r][i], weights[i], of_low);
      }
    }
  }

  const Linear& call_;
  const LinearTask& task_;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
