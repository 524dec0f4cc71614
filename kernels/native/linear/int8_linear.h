// Products of floats with a kernel of int8, which stays int8 in memory: a few rows convert it in registers, more rows
// convert a panel at a time, which stays in the cache. An int8 is exact in bfloat16, too, so that no precision is lost.
#pragma once

#include "common/arena.h"
#include "common/pack_tiles.h"
#include "linear/problem.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// The next kLanes int8, or the next `count` and zeros. GCC converts vectors of bytes one by one, hence the intrinsics.
ICEFORMER_INLINE Floats widen(const int8_t* from) {
#if defined(__AVX512F__)
  // With a mask, because GCC 12 warns of the one without.
  return to_floats((Ints)_mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(from)));
#elif defined(__AVX2__)
  return to_floats((Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<long long>(from))));
#else
  typedef int8_t Bytes __attribute__((vector_size(ICEFORMER_LANES)));
  return __builtin_convertvector(load<Bytes>(from), Floats);
#endif
}
ICEFORMER_INLINE Floats widen(const int8_t* from, int64_t count) {
  if (count >= kLanes) return widen(from);
  int8_t padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return widen(padded);
}

ICEFORMER_INLINE float to_float(const float* from) { return *from; }
ICEFORMER_INLINE float to_float(const Bfloat16Bits* from) {
  const uint32_t bits = uint32_t{from->bits} << 16;
  return load<float>(&bits);
}

// Float32 words.
struct WideLinear {
  using Product = FloatProduct;
  static constexpr int64_t kPerWord = 1, kTerms = 1;

  template <class Element>
  static void pack_row(const Element* from, int64_t count, uint32_t* to, int64_t) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = to_float(from + i);
      memcpy(to + i, &value, sizeof value);
    }
  }

  static void pack_kernel(const int8_t* from, int64_t stride, int64_t depth, int64_t columns, uint32_t* to,
                          int64_t lanes) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t lane = 0; lane < lanes; lane += kLanes)
        store(to + k * lanes + lane, widen(from + k * stride + lane, columns - lane));
  }
};

#if defined(ICEFORMER_TILES)

// Words of two bfloat16 that follow each other along the dimension that is summed over.
struct PairLinear {
  using Product = Bfloat16TileProduct;
  static constexpr int64_t kPerWord = 2, kTerms = 1;

  static void pack_row(const Bfloat16Bits* from, int64_t count, uint32_t* to, int64_t) {
    memcpy(to, from, sizeof(Bfloat16Bits) * count);
    if (count % 2) to[count / 2] = from[count - 1].bits;
  }

  static void pack_kernel(const int8_t* from, int64_t stride, int64_t depth, int64_t columns, uint32_t* to,
                          int64_t lanes) {
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
template <class Format, class Element>
class ManyRows {
 public:
  ManyRows(const Linear& call, const LinearTask& task, Arena& arena) : call_(call), task_(task) {
    input_ = arena.take<uint32_t>(Format::kTerms * term_words());
    panel_ = arena.take<uint32_t>(kDepth / Format::kPerWord * kPanelLanes);
    result_ = arena.take<float>(padded_rows() * stride());
  }

  void run() {
    [[maybe_unused]] const typename Product::Scope scope{};
    for (int64_t first = 0; first < call_.in_features; first += kDepth) {
      const int64_t left = call_.in_features - first;
      add(first, left < kDepth ? left : kDepth);
    }
    if (!call_.in_features) memset(result_, 0, sizeof(float) * padded_rows() * stride());
    for (int64_t row = 0; row < task_.rows; ++row) {
      float* to = call_.output + (task_.row + row) * call_.out_features + task_.column;
      for (int64_t i = 0; i < task_.columns; ++i) to[i] = result_[row * stride() + i] * call_.scale[task_.column + i];
    }
  }

 private:
  using Product = typename Format::Product;
  static constexpr int64_t kDepth = 256, kPanelLanes = 64;
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
      const int8_t* kernel = call_.kernel + first * call_.out_features + task_.column + lane;
      Format::pack_kernel(kernel, call_.out_features, depth, task_.columns - lane, panel_, kPanelLanes);
      for (int64_t term = 0; term < Format::kTerms; ++term)
        multiply<Product>(task_.rows, kPanelLanes, {input_ + term * term_words(), words, 1}, {panel_, kPanelLanes},
                          words, result_ + lane, stride(), first + term > 0);
    }
  }

  const Linear& call_;
  const LinearTask& task_;
  uint32_t *input_, *panel_;
  float* result_;
};

// A task of at most kFewRows rows: adds `kDepth` rows of the kernel at a time to the results, which stay in the cache,
// so that memory is read in the order in which it lies.
template <class Element>
class FewRows {
 public:
  FewRows(const Linear& call, const LinearTask& task, Arena& arena) : call_(call), task_(task) {
    result_ = arena.take<float>(task.rows * stride());
  }

  void run() { run_rows<kFewRows>(); }

 private:
  static constexpr int64_t kDepth = 8;

  int64_t stride() const { return round_up(task_.columns, kLanes); }

  template <int R>
  void run_rows() {
    if constexpr (R > 0) {
      if (task_.rows < R) return run_rows<R - 1>();
      memset(result_, 0, sizeof(float) * R * stride());
      int64_t k = 0;
      for (; k + kDepth <= call_.in_features; k += kDepth) add<R, kDepth>(k);
      for (; k < call_.in_features; ++k) add<R, 1>(k);
      for (int64_t row = 0; row < R; ++row) {
        float* to = call_.output + (task_.row + row) * call_.out_features + task_.column;
        for (int64_t i = 0; i < task_.columns; ++i) to[i] = result_[row * stride() + i] * call_.scale[task_.column + i];
      }
    }
  }

  template <int R, int D>
  void add(int64_t first) {
    const Element* input = static_cast<const Element*>(call_.input) + task_.row * call_.in_features + first;
    const int8_t* kernel = call_.kernel + first * call_.out_features + task_.column;
    Floats factor[R][D];
    for (int r = 0; r < R; ++r)
      for (int d = 0; d < D; ++d) factor[r][d] = fill(to_float(input + r * call_.in_features + d));
    int64_t lane = 0;
    for (; lane + kLanes <= task_.columns; lane += kLanes) add_lanes<R, D>(kernel, lane, kLanes, factor);
    if (lane < task_.columns) add_lanes<R, D>(kernel, lane, task_.columns - lane, factor);
  }

  template <int R, int D>
  ICEFORMER_INLINE void add_lanes(const int8_t* kernel, int64_t lane, int64_t count, const Floats (&factor)[R][D]) {
    Floats sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load<Floats>(result_ + r * stride() + lane);
    for (int d = 0; d < D; ++d) {
      const Floats weights = widen(kernel + d * call_.out_features + lane, count);
      for (int r = 0; r < R; ++r) sum[r] += factor[r][d] * weights;
    }
    for (int r = 0; r < R; ++r) store(result_ + r * stride() + lane, sum[r]);
  }

  const Linear& call_;
  const LinearTask& task_;
  float* result_;
};

// Does `visit(work)` with what runs a task.
template <class Visit>
ICEFORMER_INLINE void visit_linear(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  if (call.rows <= kFewRows && call.bfloat16)
    visit(FewRows<Bfloat16Bits>(call, task, arena));
  else if (call.rows <= kFewRows)
    visit(FewRows<float>(call, task, arena));
  else if (call.rows <= kWideRows && call.bfloat16)
    visit(ManyRows<WideLinear, Bfloat16Bits>(call, task, arena));
  else if (call.rows <= kWideRows)
    visit(ManyRows<WideLinear, float>(call, task, arena));
  else if (call.bfloat16)
    visit(ManyRows<Bfloat16Linear, Bfloat16Bits>(call, task, arena));
  else
    visit(ManyRows<FloatLinear, float>(call, task, arena));
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
