// Vectors of 16-bit integers, whose products are summed in pairs to 32 bits: what int8 is multiplied as where the other
// operand has to keep more bits than a byte has.
#pragma once

#include "common/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace iceformer {
namespace ICEFORMER_ISA {

typedef int16_t Shorts __attribute__((vector_size(4 * ICEFORMER_LANES)));

constexpr int64_t kShorts = 2 * kLanes;

// The next kShorts int8.
ICEFORMER_INLINE Shorts widen_to_shorts(const int8_t* from) {
#if defined(__AVX512BW__)
  return (Shorts)_mm512_maskz_cvtepi8_epi16(~__mmask32{0}, load<__m256i>(from));
#elif defined(__AVX2__)
  return (Shorts)_mm256_cvtepi8_epi16(load<__m128i>(from));
#elif defined(__SSE2__)
  const __m128i bytes = _mm_cvtsi64_si128(load<long long>(from));
  return (Shorts)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#elif defined(ICEFORMER_NEON)
  return (Shorts)vmovl_s8(vld1_s8(from));
#else
  typedef int8_t Bytes __attribute__((vector_size(2 * ICEFORMER_LANES)));
  return __builtin_convertvector(load<Bytes>(from), Shorts);
#endif
}

// The same of int4 in pairs: the low ones of the next kShorts bytes, or the high ones.
template <bool kHigh>
ICEFORMER_INLINE Shorts widen_half(const uint8_t* from) {
  const Shorts bytes = widen_to_shorts(reinterpret_cast<const int8_t*>(from));
  return (kHigh ? bytes : bytes << 12) >> (kHigh ? 4 : 12);
}

// The next kLanes int8 of `a` and of `b` in turn.
ICEFORMER_INLINE Shorts interleave_to_shorts(const int8_t* a, const int8_t* b) {
#if defined(__AVX512BW__)
  const __m128i one = load<__m128i>(a), other = load<__m128i>(b);
  const __m128i low = _mm_unpacklo_epi8(one, other), high = _mm_unpackhi_epi8(one, other);
  return (Shorts)_mm512_maskz_cvtepi8_epi16(~__mmask32{0}, _mm256_set_m128i(high, low));
#elif defined(__AVX2__)
  return (Shorts)_mm256_cvtepi8_epi16(
      _mm_unpacklo_epi8(_mm_cvtsi64_si128(load<long long>(a)), _mm_cvtsi64_si128(load<long long>(b))));
#elif defined(ICEFORMER_NEON)
  return (Shorts)vmovl_s8(vzip1_s8(vcreate_s8(load<uint32_t>(a)), vcreate_s8(load<uint32_t>(b))));
#else
  int8_t both[kShorts];
  for (int i = 0; i < kLanes; ++i) {
    both[2 * i] = a[i];
    both[2 * i + 1] = b[i];
  }
  return widen_to_shorts(both);
#endif
}

// sum + a . b, of the two shorts of each lane.
ICEFORMER_INLINE Ints add_pairs(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(ICEFORMER_NEON)
  const int16x8_t one = (int16x8_t)a, other = (int16x8_t)b;
  return sum + (Ints)vpaddq_s32(vmull_s16(vget_low_s16(one), vget_low_s16(other)), vmull_high_s16(one, other));
#else
  const Ints low = ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16);
  return sum + low + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// Four lanes of `a`, four of `b`, and so on, none beyond what 16 bits hold.
ICEFORMER_INLINE Shorts narrow_by_fours(Ints a, Ints b) {
#if defined(__AVX512BW__)
  return (Shorts)_mm512_packs_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Shorts)_mm256_packs_epi32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Shorts)_mm_packs_epi32((__m128i)a, (__m128i)b);
#elif defined(ICEFORMER_NEON)
  return (Shorts)vqmovn_high_s32(vqmovn_s32((int32x4_t)a), (int32x4_t)b);
#else
  Shorts both;
  for (int i = 0; i < kLanes; ++i) {
    both[i / 4 * 8 + i % 4] = static_cast<int16_t>(a[i]);
    both[i / 4 * 8 + 4 + i % 4] = static_cast<int16_t>(b[i]);
  }
  return both;
#endif
}

// The same 4 shorts, or 2, again and again.
ICEFORMER_INLINE Shorts repeat_four(const int16_t* from) {
  typedef int64_t Longs __attribute__((vector_size(4 * ICEFORMER_LANES)));
  return (Shorts)(load<int64_t>(from) - Longs{});
}
ICEFORMER_INLINE Shorts repeat_two(const int16_t* from) { return (Shorts)fill_ints(load<int32_t>(from)); }

// Lane i is the sum of all lanes of vector i.
ICEFORMER_INLINE Floats sum_across(const Ints (&vectors)[kLanes]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i fours[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i* four = reinterpret_cast<const __m256i*>(vectors + 4 * i);
    fours[i] = _mm256_hadd_epi32(_mm256_hadd_epi32(four[0], four[1]), _mm256_hadd_epi32(four[2], four[3]));
  }
  const Ints low = (Ints)_mm256_permute2x128_si256(fours[0], fours[1], 0x20);
  return to_floats(low + (Ints)_mm256_permute2x128_si256(fours[0], fours[1], 0x31));
#elif defined(ICEFORMER_NEON)
  const int32x4_t low = vpaddq_s32((int32x4_t)vectors[0], (int32x4_t)vectors[1]);
  return to_floats((Ints)vpaddq_s32(low, vpaddq_s32((int32x4_t)vectors[2], (int32x4_t)vectors[3])));
#else
  Floats floats[kLanes];
  for (int i = 0; i < kLanes; ++i) floats[i] = to_floats(vectors[i]);
  return add_across<kLanes>(floats);
#endif
}

// Neighbouring lanes added: those of `a`, then those of `b`.
ICEFORMER_INLINE Floats add_neighbours(Floats a, Floats b) {
#if ICEFORMER_LANES == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif ICEFORMER_LANES == 8
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
