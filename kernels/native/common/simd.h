// Vectors of kLanes floats or 32-bit words, by the compilers' vector extensions: one source for every instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/inline.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define ICEFORMER_NEON 1
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define ICEFORMER_LANES 16
#elif defined(__AVX2__)
#define ICEFORMER_LANES 8
#else
#define ICEFORMER_LANES 4
#endif

// Vector registers, of which sums that are in the making take most.
#if defined(__AVX512F__) || defined(ICEFORMER_NEON)
#define ICEFORMER_REGISTERS 32
#else
#define ICEFORMER_REGISTERS 16
#endif

namespace iceformer {
namespace ICEFORMER_ISA {

constexpr int64_t kLanes = ICEFORMER_LANES;

typedef float Floats __attribute__((vector_size(4 * ICEFORMER_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * ICEFORMER_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * ICEFORMER_LANES)));

// Also of a single word, whatever type it was stored as.
template <class Vector, class Scalar>
ICEFORMER_INLINE Vector load(const Scalar* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector, class Scalar>
ICEFORMER_INLINE void store(Scalar* to, Vector vector) {
  memcpy(to, &vector, sizeof vector);
}

ICEFORMER_INLINE Floats fill(float value) { return value - Floats{}; }
ICEFORMER_INLINE Ints fill_ints(int32_t value) { return value - Ints{}; }

template <class Vector>
ICEFORMER_INLINE Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

// 0, 1, 2, ...
ICEFORMER_INLINE Ints lane_numbers() {
  Ints numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

ICEFORMER_INLINE Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

// To the nearest, of two to the even one. Converting truncates, and adding a large number could be fused with a product.
ICEFORMER_INLINE Ints round_to_ints(Floats values) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)values);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32((__m256)values);
#elif defined(__SSE2__)
  return (Ints)_mm_cvtps_epi32((__m128)values);
#elif defined(ICEFORMER_NEON)
  return (Ints)vcvtnq_s32_f32((float32x4_t)values);
#else
  Ints rounded;
  for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(__builtin_rintf(values[i]));
  return rounded;
#endif
}

// The next kLanes int8 as floats. GCC converts vectors of bytes one by one, hence the intrinsics.
ICEFORMER_INLINE Floats widen(const int8_t* from) {
#if defined(__AVX512F__)
  // With a mask, because GCC 12 warns of the one without.
  return to_floats((Ints)_mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(from)));
#elif defined(__AVX2__)
  return to_floats((Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<long long>(from))));
#elif defined(ICEFORMER_NEON)
  const int16x8_t shorts = vmovl_s8(vcreate_s8(load<uint32_t>(from)));
  return to_floats((Ints)vmovl_s16(vget_low_s16(shorts)));
#else
  typedef int8_t Bytes __attribute__((vector_size(ICEFORMER_LANES)));
  return __builtin_convertvector(load<Bytes>(from), Floats);
#endif
}
// Lanes of two vectors in turn: of their first halves, and of their second halves.
template <class Vector>
ICEFORMER_INLINE Vector interleave_low(Vector a, Vector b) {
#if ICEFORMER_LANES == 16
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif ICEFORMER_LANES == 8
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
template <class Vector>
ICEFORMER_INLINE Vector interleave_high(Vector a, Vector b) {
#if ICEFORMER_LANES == 16
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif ICEFORMER_LANES == 8
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// The two halves of each vector added: those of `a` in the even lanes, those of `b` in the odd ones.
ICEFORMER_INLINE Floats add_across(Floats a, Floats b) { return interleave_low(a, b) + interleave_high(a, b); }

// Several vectors added across to one. With kLanes of them, lane i has the sum of vector i.
template <int N>
ICEFORMER_INLINE Floats add_across(const Floats* vectors) {
  if constexpr (N == 1) {
    return vectors[0];
  } else {
    Floats halves[N / 2];
    for (int i = 0; i < N / 2; ++i) halves[i] = add_across(vectors[i], vectors[i + N / 2]);
    return add_across<N / 2>(halves);
  }
}

// A vector's floats combined in halves, by a function of two vectors.
template <int kCount, class Vector, class Combine>
ICEFORMER_INLINE float reduce(Vector values, const Combine& combine) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    typedef float Half __attribute__((vector_size(kCount == 2 ? 4 : 2 * kCount)));
    Half low, high;
    memcpy(&low, &values, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&values) + sizeof low, sizeof high);
    return reduce<kCount / 2>(combine(low, high), combine);
  }
}
ICEFORMER_INLINE float largest(Floats values) {
  return reduce<ICEFORMER_LANES>(values, [](auto low, auto high) { return low > high ? low : high; });
}
ICEFORMER_INLINE float sum(Floats values) {
  return reduce<ICEFORMER_LANES>(values, [](auto low, auto high) { return low + high; });
}

// e^x to within 2 units in the last place for x <= 88, 0 below -87. Range reduction by log 2 in two parts, then a
// polynomial of degree 6 (Cephes' coefficients), then the power of two put into the exponent.
ICEFORMER_INLINE Floats exponential(Floats x) {
  const Floats clamped = larger(x, fill(-87.0f));
  const Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer
  const Floats whole = shifted - 12582912.0f;
  const Floats rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * (rest * rest) + rest + 1.0f;
  const Words power = (Words)shifted << 23;
  const Floats result = (Floats)((Words)sum + power);
  return x < fill(-87.0f) ? Floats{} : result;
}

// tanh(x) to within 3 units in the last place, near 0 as well, where a wide cap's logits are: an odd polynomial over an
// even one (Eigen's coefficients), of arguments up to where the result is 1 in float32.
ICEFORMER_INLINE Floats hyperbolic_tangent(Floats x) {
  constexpr float kLimit = 7.90531110763549805f;
  x = x > fill(kLimit) ? fill(kLimit) : x;
  x = x < fill(-kLimit) ? fill(-kLimit) : x;
  const Floats square = x * x;
  Floats odd = square * -2.76076847742355e-16f + 2.00018790482477e-13f;
  odd = odd * square - 8.60467152213735e-11f;
  odd = odd * square + 5.12229709037114e-08f;
  odd = odd * square + 1.48572235717979e-05f;
  odd = odd * square + 6.37261928875436e-04f;
  odd = odd * square + 4.89352455891786e-03f;
  Floats even = square * 1.19825839466702e-06f + 1.18534705686654e-04f;
  even = even * square + 2.26843463243900e-03f;
  even = even * square + 4.89352518554385e-03f;
  return x * odd / even;
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
