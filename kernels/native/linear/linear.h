// Products of floats with weights that stay as they are in memory: a few rows convert them in registers, more rows convert
// a panel at a time, which stays in the cache. An int8 is exact in bfloat16, too, so that no precision is lost.
#pragma once

#include "common/arena.h"
#include "common/pack_tiles.h"
#include "common/rows.h"
#include "linear/problem.h"

namespace iceformer {
namespace ICEFORMER_ISA {

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

  // `columns` of the kernel from `column` on, of the input features [first, first + depth).
  template <class Weight>
  static void pack_kernel(const Linear& call, int64_t first, int64_t depth, int64_t column, int64_t columns,
                          uint32_t* to, int64_t lanes) {
    for (int64_t k = 0; k < depth; ++k) {
      const Weight* from = static_cast<const Weight*>(call.kernel) + (first + k) * call.out_features + column;
      const float* scale = call.scale ? call.scale + (first + k) / call.group * call.out_features + column : nullptr;
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        Floats weights = widen(from + lane, columns - lane);
        if (scale) weights *= widen(scale + lane, columns - lane);
        store(to + k * lanes + lane, weights);
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
  static void pack_kernel(const Linear& call, int64_t first, int64_t depth, int64_t column, int64_t columns,
                          uint32_t* to, int64_t lanes) {
    const int64_t stride = call.out_features;
    const Weight* from = static_cast<const Weight*>(call.kernel) + first * stride + column;
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        const Words low = (Words)widen(from + k * stride + lane, columns - lane);
        const Words high = k + 1 < depth ? (Words)widen(from + (k + 1) * stride + lane, columns - lane) : Words{};
        store(to + k / 2 * lanes + lane, (low >> 16) | high);
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
      Format::template pack_kernel<Weight>(call_, first, depth, task_.column + lane, task_.columns - lane, panel_,
                                           kPanelLanes);
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
    const float* scales = call_.scale + first / call_.group * call_.out_features + task_.column + lane;
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

// A task of at most kFewRows rows: adds some rows of the kernel at a time to the results, which stay in the cache,
// so that memory is read in the order in which it lies.
template <class Element, class Weight>
class FewRows {
 public:
  FewRows(const Linear& call, const LinearTask& task, Arena& arena) : call_(call), task_(task) {
    result_ = arena.take<float>(task.rows * stride());
  }

  void run() { run_rows<kFewRows>(); }

 private:
  static constexpr bool kScaled = sizeof(Weight) == 1;
  static constexpr int kVectors = 4;
  // Rows of the kernel at a time. One by one they are read in the very order of memory, which processors fetch ahead on
  // their own. Rows of int8 are multiplied more slowly than they are read, and are asked for.
  static constexpr int kRows = kScaled ? int{kGroupUnit} : 1;
  // Vectors of a row that lie in four cache lines.
  template <int R>
  static constexpr int kRun = R == 1 ? kVectors * 4 / int{sizeof(Weight)} : kVectors;

  int64_t stride() const { return round_up(task_.columns, kLanes); }

  template <int R>
  void run_rows() {
    if constexpr (R > 0) {
      if (task_.rows < R) return run_rows<R - 1>();
      memset(result_, 0, sizeof(float) * R * stride());
      const int64_t end = task_.first + task_.depth;
      int64_t k = task_.first;
      for (; k + kRows <= end; k += kRows) add<R, kRows>(k);
      for (; k < end; ++k) add<R, 1>(k);
      for (int64_t row = 0; row < R; ++row) write(row);
    }
  }

  void write(int64_t row) {
    const float* from = result_ + row * stride();
    if (task_.part) {
      memcpy(task_.part + row * task_.columns, from, sizeof(float) * task_.columns);
      return;
    }
    memcpy(call_.output + (task_.row + row) * call_.out_features + task_.column, from, sizeof(float) * task_.columns);
  }

  template <int R, int D>
  void add(int64_t first) {
    const Element* input = static_cast<const Element*>(call_.input) + task_.row * call_.in_features + first;
    const Weight* kernel = static_cast<const Weight*>(call_.kernel) + first * call_.out_features + task_.column;
    float factor[R][D];
    for (int r = 0; r < R; ++r)
      for (int d = 0; d < D; ++d) factor[r][d] = to_float(input + r * call_.in_features + d);
    const float* scale =
        kScaled ? call_.scale + first / call_.group * call_.out_features + task_.column : nullptr;
    int64_t lane = 0;
    for (; lane + kRun<R> * kLanes <= task_.columns; lane += kRun<R> * kLanes)
      add_lanes<R, D, kRun<R>>(kernel, scale, lane, kLanes, factor);
    for (; lane + kVectors * kLanes <= task_.columns; lane += kVectors * kLanes)
      add_lanes<R, D, kVectors>(kernel, scale, lane, kLanes, factor);
    for (; lane < task_.columns; lane += kLanes) add_lanes<R, D, 1>(kernel, scale, lane, task_.columns - lane, factor);
  }

  template <int R, int D, int V>
  ICEFORMER_INLINE void add_lanes(const Weight* kernel, const float* scale, int64_t lane, int64_t count,
                                  const float (&factor)[R][D]) {
    Floats sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = kScaled ? Floats{} : load<Floats>(result_ + r * stride() + lane + v * kLanes);
    for (int d = 0; d < D; ++d) {
      const Weight* from = kernel + d * call_.out_features + lane;
      if (kRows > 1) prefetch(from + D * call_.out_features, V * kLanes);
      for (int v = 0; v < V; ++v) {
        const Floats weights = V == 1 ? widen(from, count) : widen(from + v * kLanes);
        for (int r = 0; r < R; ++r) sum[r][v] += factor[r][d] * weights;
      }
    }
    for (int v = 0; v < V; ++v) {
      [[maybe_unused]] Floats scales;
      if (kScaled) scales = V == 1 ? widen(scale + lane, count) : load<Floats>(scale + lane + v * kLanes);
      for (int r = 0; r < R; ++r) {
        float* to = result_ + r * stride() + lane + v * kLanes;
        store(to, kScaled ? load<Floats>(to) + sum[r][v] * scales : sum[r][v]);
      }
    }
  }

  ICEFORMER_INLINE static void prefetch(const Weight* from, int64_t count) {
    const char* bytes = reinterpret_cast<const char*>(from);
    for (int64_t byte = 0; byte < count * int64_t{sizeof(Weight)}; byte += 64) __builtin_prefetch(bytes + byte);
  }

  const Linear& call_;
  const LinearTask& task_;
  float* result_;
};

// A task of at most kFewRows rows and a kernel [out_features, in_features]: products with its rows.
template <class Element, class Weight>
class FewDots {
 public:
  FewDots(const Linear& call, const LinearTask& task, Arena& arena)
      : call_(call), task_(task), stride_(round_up(call.in_features, kLanes)) {
    input_ = arena.take<float>(task.rows * stride_);
  }

  void run() { run_rows<kFewRows>(); }

 private:
  template <int R>
  void run_rows() {
    if constexpr (R > 0) {
      if (task_.rows < R) return run_rows<R - 1>();
      widen_input();
      const Weight* kernel = static_cast<const Weight*>(call_.kernel);
      for (int64_t column = 0; column < task_.columns; column += kLanes) {
        const int64_t count = smaller(task_.columns - column, kLanes);
        const Weight* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          rows[i] = kernel + (task_.column + column + smaller(i, count - 1)) * call_.in_features;
        Floats products[R];
        const uint32_t* vectors = reinterpret_cast<const uint32_t*>(input_);
        multiply_rows<WideRows<Weight>, R>(rows, call_.in_features, vectors, stride_, products);
        for (int r = 0; r < R; ++r) write(products[r], r, task_.column + column, count);
      }
    }
  }

  void widen_input() {
    const Element* from = static_cast<const Element*>(call_.input) + task_.row * call_.in_features;
    for (int64_t row = 0; row < task_.rows; ++row)
      for (int64_t i = 0; i < stride_; ++i)
        input_[row * stride_ + i] = i < call_.in_features ? to_float(from + row * call_.in_features + i) : 0.0f;
  }

  void write(Floats products, int64_t row, int64_t column, int64_t count) {
    float* to = call_.output + (task_.row + row) * call_.out_features + column;
    for (int64_t i = 0; i < count; ++i) to[i] = products[i];
  }

  const Linear& call_;
  const LinearTask& task_;
  int64_t stride_;
  float* input_;
};

// Does `visit(work)` with what runs a task.
template <class Element, class Weight, class Visit>
ICEFORMER_INLINE void visit_linear_of(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  constexpr bool kBfloat16 = sizeof(Element) == sizeof(Bfloat16Bits);
  if (call.transposed)
    visit(FewDots<Element, Weight>(call, task, arena));
  else if (call.rows <= kFewRows)
    visit(FewRows<Element, Weight>(call, task, arena));
  else if (call.rows <= kWideRows)
    visit(ManyRows<WideLinear, Element, Weight>(call, task, arena));
  else if constexpr (kBfloat16)
    visit(ManyRows<Bfloat16Linear, Element, Weight>(call, task, arena));
  else
    visit(ManyRows<FloatLinear, Element, Weight>(call, task, arena));
}

template <class Element, class Visit>
ICEFORMER_INLINE void visit_linear_of(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  if (call.weights == WeightType::kInt8)
    visit_linear_of<Element, int8_t>(call, task, arena, visit);
  else if (call.weights == WeightType::kBfloat16)
    visit_linear_of<Element, Bfloat16Bits>(call, task, arena, visit);
  else if (call.transposed)
    visit(FewDots<Element, float>(call, task, arena));
  else
    visit(FewRows<Element, float>(call, task, arena));
}

template <class Visit>
ICEFORMER_INLINE void visit_linear(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  if (call.bfloat16)
    visit_linear_of<Bfloat16Bits>(call, task, arena, visit);
  else
    visit_linear_of<float>(call, task, arena, visit);
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
