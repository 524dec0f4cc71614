// How float32 and bfloat16 arrays become the packed words of matmul.h.
#pragma once

#include "common/tiles.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Rows of `width` elements: those that follow each other from `base` on, or those at `places`, counted from `base`.
template <class Element>
struct Rows {
  const Element* base;
  int64_t width;
  const int32_t* places;

  int64_t place(int64_t index) const { return places ? places[index] : index; }
  const Element* row(int64_t index) const { return base + place(index) * width; }

  // Asks the memory for a row that is read soon. Rows that a selection gathers lie where no hardware expects them.
  ICEFORMER_INLINE void prefetch(int64_t index, int64_t count) const {
    if (!places || index >= count) return;
    const char* from = reinterpret_cast<const char*>(row(index));
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(Element)); byte += 64)
      __builtin_prefetch(from + byte);
  }
};

// How many rows ahead of the one that is copied the memory is asked.
constexpr int64_t kPrefetchRows = 8;

// Words of one float32.
struct Float32 {
  using Element = float;
  using Product = FloatProduct;
  static constexpr int64_t kPerWord = 1;

  static ICEFORMER_INLINE uint32_t word(const float* from) { return load<uint32_t>(from); }
  static ICEFORMER_INLINE void store_output(float* to, float value) { *to = value; }

  // Keys as rows of words; consecutive ones are used where they lie.
  static Left keys(Rows<float> rows, int64_t count, uint32_t* packed) {
    if (!rows.places) return {reinterpret_cast<const uint32_t*>(rows.row(0)), rows.width, 1};
    copy(rows, count, packed);
    return {packed, rows.width, 1};
  }

  // Values with their elements as rows, summed over keys.
  static Left values(Rows<float> rows, int64_t count, uint32_t* packed) {
    const Left left = keys(rows, count, packed);
    return {left.words, 1, rows.width};
  }

  // Softmax weights [count][stride] as the right operand of a product with the values.
  static Lanes weights(float* weights, int64_t, int64_t, int64_t stride) {
    return {reinterpret_cast<const uint32_t*>(weights), stride};
  }

 private:
  static void copy(Rows<float> rows, int64_t count, uint32_t* packed) {
    for (int64_t i = 0; i < count; ++i) {
      rows.prefetch(i + kPrefetchRows, count);
      memcpy(packed + i * rows.width, rows.row(i), sizeof(float) * rows.width);
    }
  }
};

struct Bfloat16Bits {
  uint16_t bits;
};

// Of two floats for each lane, the words of their bfloat16, rounded to nearest even; `a` comes first.
ICEFORMER_INLINE Words round_pair(Floats a, Floats b) {
  const Words low = (Words)a, high = (Words)b;
  const Words low_rounded = (low + 0x7fffu + ((low >> 16) & 1u)) >> 16;
  const Words high_rounded = (high + 0x7fffu + ((high >> 16) & 1u)) & 0xffff0000u;
  return low_rounded | high_rounded;
}

ICEFORMER_INLINE uint16_t round_to_bfloat16(float value) {
  const uint32_t bits = load<uint32_t>(&value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

ICEFORMER_INLINE float to_float(const float* from) { return *from; }
ICEFORMER_INLINE float to_float(const Bfloat16Bits* from) {
  const uint32_t bits = uint32_t{from->bits} << 16;
  return load<float>(&bits);
}

// A vector of elements as floats, and back.
ICEFORMER_INLINE Floats widen(const float* from) { return load<Floats>(from); }
ICEFORMER_INLINE Floats widen(const Bfloat16Bits* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * ICEFORMER_LANES)));
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}
// The first `count` elements, none where it is negative, then zeros.
template <class Element>
ICEFORMER_INLINE Floats widen(const Element* from, int64_t count) {
  if (count >= kLanes) return widen(from);
  Element padded[kLanes] = {};
  if (count > 0) memcpy(padded, from, sizeof(Element) * count);
  return widen(padded);
}
ICEFORMER_INLINE void narrow(Floats values, float* to) { store(to, values); }
ICEFORMER_INLINE void narrow(Floats values, Bfloat16Bits* to) {
  typedef uint16_t Halves __attribute__((vector_size(2 * ICEFORMER_LANES)));
  const Words bits = (Words)values;
  store(to, __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves));
}

#if defined(ICEFORMER_BFLOAT16_DOT)

// Words of two bfloat16, for processors that multiply them.
struct Bfloat16Pairs {
  using Element = Bfloat16Bits;
  using Product = Bfloat16Product;
  static constexpr int64_t kPerWord = 2;

  static ICEFORMER_INLINE uint32_t word(const Bfloat16Bits* from) { return load<uint32_t>(from); }
  static ICEFORMER_INLINE void store_output(Bfloat16Bits* to, float value) { to->bits = round_to_bfloat16(value); }

  static Left keys(Rows<Bfloat16Bits> rows, int64_t count, uint32_t* packed) {
    const int64_t words = rows.width / 2;
    for (int64_t i = 0; i < count; ++i) {
      rows.prefetch(i + kPrefetchRows, count);
      memcpy(packed + i * words, rows.row(i), sizeof(uint32_t) * words);
    }
    return {packed, words, 1};
  }

  // Pairs of consecutive keys' values interleaved; a last single one is paired with zeros.
  static Left values(Rows<Bfloat16Bits> rows, int64_t count, uint32_t* packed) {
    for (int64_t i = 0; i < count; i += 2) {
      rows.prefetch(i + kPrefetchRows, count);
      rows.prefetch(i + kPrefetchRows + 1, count);
      const Bfloat16Bits *low = rows.row(i), *high = i + 1 < count ? rows.row(i + 1) : nullptr;
      uint32_t* to = packed + i / 2 * rows.width;
      for (int64_t d = 0; d < rows.width; ++d) to[d] = low[d].bits | (high ? uint32_t{high[d].bits} << 16 : 0u);
    }
    return {packed, 1, rows.width};
  }

  // In place: row i of pairs lies before rows 2i and 2i + 1, from which it is made.
  static Lanes weights(float* weights, int64_t count, int64_t lanes, int64_t stride) {
    uint32_t* words = reinterpret_cast<uint32_t*>(weights);
    for (int64_t i = 0; i < count; i += 2)
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        const Floats low = load<Floats>(weights + i * stride + lane);
        const Floats high = i + 1 < count ? load<Floats>(weights + (i + 1) * stride + lane) : Floats{};
        store(words + i / 2 * stride + lane, round_pair(low, high));
      }
    return {words, stride};
  }
};

#if !defined(ICEFORMER_TILES)
using Bfloat16 = Bfloat16Pairs;
#endif

#else

// bfloat16 widened to words of one float32.
struct Bfloat16 {
  using Element = Bfloat16Bits;
  using Product = FloatProduct;
  static constexpr int64_t kPerWord = 1;

  static ICEFORMER_INLINE uint32_t word(const Bfloat16Bits* from) { return uint32_t{from->bits} << 16; }
  static ICEFORMER_INLINE void store_output(Bfloat16Bits* to, float value) { to->bits = round_to_bfloat16(value); }

  static Left keys(Rows<Bfloat16Bits> rows, int64_t count, uint32_t* packed) {
    for (int64_t i = 0; i < count; ++i) {
      rows.prefetch(i + kPrefetchRows, count);
      const Bfloat16Bits* from = rows.row(i);
      uint32_t* to = packed + i * rows.width;
      for (int64_t d = 0; d < rows.width; ++d) to[d] = uint32_t{from[d].bits} << 16;
    }
    return {packed, rows.width, 1};
  }

  static Left values(Rows<Bfloat16Bits> rows, int64_t count, uint32_t* packed) {
    const Left left = keys(rows, count, packed);
    return {left.words, 1, rows.width};
  }

  static Lanes weights(float* weights, int64_t, int64_t, int64_t stride) {
    return {reinterpret_cast<const uint32_t*>(weights), stride};
  }
};

#endif

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
