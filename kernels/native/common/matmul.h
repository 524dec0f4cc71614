// The matrix products of attention, on packed 32-bit words: queries stand side by side in the lanes of a vector, and a
// word of a key or value is broadcast to all of them.
//
// A word holds one float, two bfloat16 or four int8, consecutive along the dimension that is summed over, which is what
// the dot-product instructions of each type take.
#pragma once

#include "common/integers.h"
#include "common/simd.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// What a product needs while its kernels run: nothing, unless it works on tiles (tiles.h).
struct NoScope {};

// Products of words of one float. `multiply` works on multiples of `kRows` rows and `kDepth` words: it reads and writes
// beyond what it is asked for up to those.
struct FloatProduct {
  using Scope = NoScope;
  static constexpr int64_t kRows = 1, kDepth = 1;
  using Broadcast = Floats;
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) { return fill(load<float>(word)); }
  static ICEFORMER_INLINE Floats add(Floats sum, Broadcast a, Words b) { return sum + a * (Floats)b; }
};

#if defined(__AVX512BF16__)
#define ICEFORMER_BFLOAT16_DOT 1
// Products of words of two bfloat16, summed in float32.
struct Bfloat16Product {
  using Scope = NoScope;
  static constexpr int64_t kRows = 1, kDepth = 1;
  using Broadcast = __m512i;
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) { return _mm512_set1_epi32(load<int32_t>(word)); }
  static ICEFORMER_INLINE Floats add(Floats sum, Broadcast a, Words b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#elif defined(ICEFORMER_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define ICEFORMER_BFLOAT16_DOT 1
struct Bfloat16Product {
  using Scope = NoScope;
  static constexpr int64_t kRows = 1, kDepth = 1;
  using Broadcast = Words;
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) { return (Words)fill_ints(load<int32_t>(word)); }
  static ICEFORMER_INLINE Floats add(Floats sum, Broadcast a, Words b) {
    return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }
};
#endif

// Products of words of four int8, summed in int32. The broadcast operand `a` is a key's, with each byte passed through
// `kFlip`; `start` is what a sum begins with to make up for that.
struct Int8Product {
#if defined(__AVX512VNNI__)
  // vpdpbusd takes unsigned times signed: (a + 128) . b - 128 * sum(b).
  static constexpr uint32_t kFlip = 0x80808080u;
  static constexpr int32_t kStart = -128;
  using Broadcast = __m512i;
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) { return _mm512_set1_epi32(load<int32_t>(word)); }
  static ICEFORMER_INLINE Ints add(Ints sum, Broadcast a, Words b) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, a, (__m512i)b);
  }
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // |a| . sign(b, a); products of bytes within +-127 sum in pairs to within int16.
  static constexpr uint32_t kFlip = 0;
  static constexpr int32_t kStart = 0;
  struct Broadcast {
    __m256i value, magnitude;
  };
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) {
    const __m256i all = _mm256_set1_epi32(load<int32_t>(word));
    return {all, _mm256_abs_epi8(all)};
  }
  static ICEFORMER_INLINE Ints add(Ints sum, Broadcast a, Words b) {
    const __m256i pairs = _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8((__m256i)b, a.value));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#elif defined(__AVX512BW__)
  static constexpr uint32_t kFlip = 0;
  static constexpr int32_t kStart = 0;
  struct Broadcast {
    __m512i magnitude;
    __mmask64 negative;
  };
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) {
    const __m512i all = _mm512_set1_epi32(load<int32_t>(word));
    return {_mm512_abs_epi8(all), _mm512_movepi8_mask(all)};
  }
  static ICEFORMER_INLINE Ints add(Ints sum, Broadcast a, Words b) {
    const __m512i value = (__m512i)b;
    const __m512i signed_value = _mm512_mask_sub_epi8(value, a.negative, _mm512_setzero_si512(), value);
    const __m512i pairs = _mm512_maddubs_epi16(a.magnitude, signed_value);
    return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
#elif defined(ICEFORMER_NEON)
  static constexpr uint32_t kFlip = 0;
  static constexpr int32_t kStart = 0;
  using Broadcast = int8x16_t;
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) {
    return (int8x16_t)fill_ints(load<int32_t>(word));
  }
  static ICEFORMER_INLINE Ints add(Ints sum, Broadcast a, Words b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (Ints)vdotq_s32((int32x4_t)sum, a, (int8x16_t)b);
#else
    // Products of bytes within +-127 sum in pairs to within int16.
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8((int8x16_t)b));
    return (Ints)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, vmull_high_s8(a, (int8x16_t)b)));
#endif
  }
#else
  static constexpr uint32_t kFlip = 0;
  static constexpr int32_t kStart = 0;
  using Broadcast = int32_t;
  static ICEFORMER_INLINE Broadcast broadcast(const uint32_t* word) { return load<int32_t>(word); }
  static ICEFORMER_INLINE Ints add(Ints sum, Broadcast a, Words b) {
    for (int byte = 0; byte < 4; ++byte) {
      const Ints wide = (Ints)(b << (24 - 8 * byte)) >> 24;
      sum += wide * static_cast<int32_t>(static_cast<int8_t>(a >> (8 * byte)));
    }
    return sum;
  }
#endif
};

// The left operand: rows of words, `row` and `step` words apart.
struct Left {
  const uint32_t* words;
  int64_t row, step;
};

// The right operand and the result: lanes side by side, `stride` words from one row to the next.
struct Lanes {
  const uint32_t* words;
  int64_t stride;
};

#if ICEFORMER_REGISTERS == 32
constexpr int kTileRows = 6, kTileVectors = 4;
#elif ICEFORMER_LANES == 8
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// One register tile: `R` rows by `V` vectors of result (+)= left . right over `depth` words.
template <class Product, int R, int V>
ICEFORMER_INLINE void multiply_tile(Left left, Lanes right, int64_t depth, float* result, int64_t stride, bool add) {
  Floats sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load<Floats>(result + r * stride + v * kLanes) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Words lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = load<Words>(right.words + k * right.stride + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const auto word = Product::broadcast(left.words + r * left.row + k * left.step);
      for (int v = 0; v < V; ++v) sum[r][v] = Product::add(sum[r][v], word, lanes[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(result + r * stride + v * kLanes, sum[r][v]);
}

template <class Product, int V, int R = kTileRows>
ICEFORMER_INLINE void multiply_rest(int64_t rows, Left left, Lanes right, int64_t depth, float* result, int64_t stride,
                                    bool add) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_tile<Product, R, V>(left, right, depth, result, stride, add);
    multiply_rest<Product, V, R - 1>(rows, left, right, depth, result, stride, add);
  }
}

template <class Product, int V = kTileVectors>
void multiply_panel(int64_t vectors, int64_t rows, Left left, Lanes right, int64_t depth, float* result, int64_t stride,
                    bool add) {
  if constexpr (V > 0) {
    if (vectors < V) return multiply_panel<Product, V - 1>(vectors, rows, left, right, depth, result, stride, add);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Left part = {left.words + row * left.row, left.row, left.step};
      const int64_t left_over = rows - row;
      multiply_rest<Product, V>(left_over < kTileRows ? left_over : kTileRows, part, right, depth,
                                result + row * stride, stride, add);
    }
  }
}

// result[row][lane] (+)= sum over k of left[row][k] . right[k][lane], for `rows` rows and `lanes` lanes.
template <class Product>
void multiply(int64_t rows, int64_t lanes, Left left, Lanes right, int64_t depth, float* result, int64_t stride,
              bool add) {
  for (int64_t lane = 0; lane < lanes; lane += kTileVectors * kLanes) {
    const int64_t vectors = (lanes - lane) / kLanes;
    multiply_panel<Product>(vectors < kTileVectors ? vectors : kTileVectors, rows, left,
                            {right.words + lane, right.stride}, depth, result + lane, stride, add);
  }
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
