// Many rows times a kernel that is not as wide as they are: a panel of it at a time becomes words for a matrix product.
#pragma once

#include "common/arena.h"
#include "common/pack_tiles.h"
#include "linear/panels.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Input features that are taken from a kernel together.
constexpr int64_t kRowsAtOnce = kPanelInputs;

// A vector of outputs from `column` on, for kRowsAtOnce input features from `row` on, zeros for those from `end` on.
template <class Weight>
ICEFORMER_INLINE void take_rows(const Linear& call, int64_t row, int64_t end, int64_t column,
                                Floats (&rows)[kRowsAtOnce]) {
  const int64_t left = call.out_features - column;
  for (int64_t i = 0; i < kRowsAtOnce; ++i) {
    const Weight* from = static_cast<const Weight*>(call.kernel) + (row + i) * call.out_features + column;
    rows[i] = row + i < end ? widen(from, left) : Floats{};
  }
}
template <>
ICEFORMER_INLINE void take_rows<int8_t>(const Linear& call, int64_t row, int64_t, int64_t column,
                                        Floats (&rows)[kRowsAtOnce]) {
  Ints words = {};
  if (column < call.out_features) words = load<Ints>(step_of<int8_t>(call, row / kPanelInputs, column));
  for (int i = 0; i < kRowsAtOnce; ++i) rows[i] = to_floats(words << (24 - 8 * i) >> 24);
}
template <>
ICEFORMER_INLINE void take_rows<Int4Pair>(const Linear& call, int64_t row, int64_t, int64_t column,
                                          Floats (&rows)[kRowsAtOnce]) {
  typedef uint16_t Halves __attribute__((vector_size(2 * ICEFORMER_LANES)));
  Ints words = {};
  if (column < call.out_features)
    words = (Ints)__builtin_convertvector(load<Halves>(step_of<Int4Pair>(call, row / kPanelInputs, column)), Words);
  // Input features 0 and 2 are in the first byte, 1 and 3 in the second.
  for (int i = 0; i < kRowsAtOnce; ++i) rows[i] = to_floats(words << (28 - 8 * (i % 2) - 4 * (i / 2)) >> 28);
}

// Float32 words.
struct WideLinear {
  using Product = FloatProduct;
  static constexpr int64_t kPerWord = 1, kTerms = 1;
  static constexpr bool kScalesLater = false;

  template <class Element>
  static void pack_row(const Element* from, int64_t count, uint32_t* to, int64_t) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = to_float(from + i);
      memcpy(to + i, &value, sizeof value);
    }
  }

  // The kernel's columns from `column` on, of the input features [first, first + depth).
  template <class Weight>
  static void pack_kernel(const Linear& call, int64_t first, int64_t depth, int64_t column, uint32_t* to,
                          int64_t lanes) {
    for (int64_t k = 0; k < depth; k += kRowsAtOnce) {
      const auto* scale = scales_of<Weight>(call, first + k, column);
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        Floats rows[kRowsAtOnce];
        take_rows<Weight>(call, first + k, first + depth, column + lane, rows);
        const Floats scales =
            scale ? widen(scale + lane, call.out_features - column - lane) : fill(1.0f);
        for (int64_t i = 0; i < kRowsAtOnce; ++i) store(to + (k + i) * lanes + lane, rows[i] * scales);
      }
    }
  }
};

#if defined(ICEFORMER_TILES)

// Words of two bfloat16 that follow each other along the dimension that is summed over.
struct PairLinear {
  using Product = Bfloat16TileProduct;
  static constexpr int64_t kPerWord = 2, kTerms = 1;
  // An int8 is exact in bfloat16, times a scale it would not be.
  static constexpr bool kScalesLater = true;

  static void pack_row(const Bfloat16Bits* from, int64_t count, uint32_t* to, int64_t) {
    memcpy(to, from, sizeof(Bfloat16Bits) * count);
    if (count % 2) to[count / 2] = from[count - 1].bits;
  }

  template <class Weight>
  static void pack_kernel(const Linear& call, int64_t first, int64_t depth, int64_t column, uint32_t* to,
                          int64_t lanes) {
    for (int64_t k = 0; k < depth; k += kRowsAtOnce)
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        Floats rows[kRowsAtOnce];
        take_rows<Weight>(call, first + k, first + depth, column + lane, rows);
        for (int64_t i = 0; i < kRowsAtOnce; i += 2)
          store(to + (k + i) / 2 * lanes + lane, ((Words)rows[i] >> 16) | (Words)rows[i + 1]);
      }
  }
};

// Float32 rows as sums of three bfloat16, which hold all of their 24 bits: the tiles multiply three times what a vector
// multiplies once, and are faster.
struct SplitLinear : PairLinear {
  static constexpr int64_t kTerms = 3;

  static void pack_row(const float* from, int64_t count, uint32_t* to, int64_t term_words) {
    typedef uint16_t Halves __attribute__((vector_size(2 * ICEFORMER_LANES)));
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats rest = {};
      if (i + kLanes <= count)
        rest = load<Floats>(from + i);
      else
        memcpy(&rest, from + i, sizeof(float) * (count - i));
      for (int64_t term = 0; term < kTerms; ++term) {
        const Words bits = (Words)rest;
        const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
        rest -= (Floats)rounded;
        store(to + term * term_words + i / 2, __builtin_convertvector(rounded >> 16, Halves));
      }
    }
  }
};

using FloatLinear = SplitLinear;
using Bfloat16Linear = PairLinear;
#else
// Pairs in vectors (vdpbf16ps) were measured slower than floats.
using FloatLinear = WideLinear;
using Bfloat16Linear = WideLinear;
#endif

// A task of many rows: pieces of the input and of the kernel are packed and multiplied, and their products summed.
template <class Format, class Element, class Weight>
class ManyRows {
 public:
  ManyRows(const Linear& call, const LinearTask& task, Arena& arena) : call_(call), task_(task) {
    input_ = arena.take<uint32_t>(Format::kTerms * term_words());
    panel_ = arena.take<uint32_t>(kDepth / Format::kPerWord * kPanelLanes);
    result_ = arena.take<float>(padded_rows() * stride());
    if (kScalesLater) product_ = arena.take<float>(padded_rows() * kPanelLanes);
  }

  void run() {
    [[maybe_unused]] const typename Product::Scope scope{};
    // No piece has parts of two groups where its products are scaled.
    const int64_t end = call_.in_features, most = kScalesLater && call_.scale ? call_.group : end;
    for (int64_t first = 0; first < end;) {
      const int64_t depth = smaller(smaller(end - first, most - first % most), kDepth);
      add(first, depth);
      first += depth;
    }
    if (!end) memset(result_, 0, sizeof(float) * padded_rows() * stride());
    for (int64_t row = 0; row < task_.rows; ++row)
      memcpy(call_.output + (task_.row + row) * call_.out_features + task_.column, result_ + row * stride(),
             sizeof(float) * task_.columns);
  }

 private:
  using Product = typename Format::Product;
  static constexpr int64_t kDepth = 256, kPanelLanes = 64;
  static constexpr bool kScalesLater = Format::kScalesLater && sizeof(Weight) == 1;
  static_assert(kDepth / Format::kPerWord % Product::kDepth == 0 && kPanelLanes % (kTileVectors * kLanes) == 0, "");

  int64_t padded_rows() const { return round_up(task_.rows, Product::kRows); }
  int64_t stride() const { return round_up(task_.columns, kPanelLanes); }
  int64_t term_words() const { return padded_rows() * (kDepth / Format::kPerWord); }

  // Adds the products over `depth` elements from `first` on.
  void add(int64_t first, int64_t depth) {
    const int64_t words = round_up((depth + Format::kPerWord - 1) / Format::kPerWord, Product::kDepth);
    if (words * Format::kPerWord != depth) {
      memset(input_, 0, sizeof(uint32_t) * Format::kTerms * term_words());
      memset(panel_, 0, sizeof(uint32_t) * words * kPanelLanes);
    }
    const Element* input = static_cast<const Element*>(call_.input) + task_.row * call_.in_features + first;
    for (int64_t row = 0; row < task_.rows; ++row)
      Format::pack_row(input + row * call_.in_features, depth, input_ + row * words, term_words());
    for (int64_t lane = 0; lane < task_.columns; lane += kPanelLanes) {
      Format::template pack_kernel<Weight>(call_, first, depth, task_.column + lane, panel_, kPanelLanes);
      if constexpr (kScalesLater) {
        multiply_panel(words, product_, kPanelLanes, false);
        add_scaled(first, lane);
      } else {
        multiply_panel(words, result_ + lane, stride(), first > 0);
      }
    }
  }

  // Products of the packed input with the packed panel, which are added to what is there or replace it.
  void multiply_panel(int64_t words, float* to, int64_t stride, bool adds) {
    for (int64_t term = 0; term < Format::kTerms; ++term)
      multiply<Product>(task_.rows, kPanelLanes, {input_ + term * term_words(), words, 1}, {panel_, kPanelLanes}, words,
                        to, stride, adds || term > 0);
  }

  // Adds a panel's products, of input features from `first` on, times their scales.
  void add_scaled(int64_t first, int64_t lane) {
    const auto* scales = scales_of<Weight>(call_, first, task_.column + lane);
    for (int64_t v = 0; v < kPanelLanes; v += kLanes) {
      const Floats scale = widen(scales + v, task_.columns - lane - v);
      for (int64_t row = 0; row < task_.rows; ++row) {
        float* to = result_ + row * stride() + lane + v;
        const Floats product = load<Floats>(product_ + row * kPanelLanes + v) * scale;
        store(to, first > 0 ? load<Floats>(to) + product : product);
      }
    }
  }

  const Linear& call_;
  const LinearTask& task_;
  uint32_t *input_, *panel_;
  float *result_, *product_ = nullptr;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
