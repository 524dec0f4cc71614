// How bfloat16 arrays become operands for tiles: pairs of elements in each word, and zeros up to whole tiles.
#pragma once

#include "common/pack.h"

#if defined(ICEFORMER_TILES)

namespace iceformer {
namespace ICEFORMER_ISA {

// Elements of 4 of the rows, 8 apart, from `d` on: 8 of each.
ICEFORMER_INLINE __m512i load_rows(const Bfloat16Bits* const* rows, int64_t d) {
  const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + d)); };
  __m512i pieces = _mm512_castsi128_si512(piece(0));
  pieces = _mm512_inserti32x4(pieces, piece(8), 1);
  pieces = _mm512_inserti32x4(pieces, piece(16), 2);
  return _mm512_inserti32x4(pieces, piece(24), 3);
}

// Writes the transpose of 4 rows of 4 words in each quarter of the vectors.
ICEFORMER_INLINE void transpose_quarters(const __m512i (&rows)[4], uint32_t* to, int64_t stride) {
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  store(to, _mm512_unpacklo_epi64(a, c));
  store(to + stride, _mm512_unpackhi_epi64(a, c));
  store(to + 2 * stride, _mm512_unpacklo_epi64(b, d));
  store(to + 3 * stride, _mm512_unpackhi_epi64(b, d));
}

// Of 32 rows, takes elements d to d + 7: writes 8 rows of 16 words, each the pair of two consecutive rows' elements.
ICEFORMER_INLINE void transpose_pairs(const Bfloat16Bits* const* rows, int64_t d, uint32_t* to, int64_t stride) {
  // Quarter q of vector j is pair 4q + j, so that transposing the quarters leaves the pairs in their order.
  __m512i first[4], second[4];
  for (int j = 0; j < 4; ++j) {
    const __m512i even = load_rows(rows + 2 * j, d), odd = load_rows(rows + 2 * j + 1, d);
    first[j] = _mm512_unpacklo_epi16(even, odd);
    second[j] = _mm512_unpackhi_epi16(even, odd);
  }
  transpose_quarters(first, to, stride);
  transpose_quarters(second, to + 4 * stride, stride);
}

struct Bfloat16 : Bfloat16Pairs {
  using Product = Bfloat16TileProduct;

  // Keys as rows of words; whole tiles of consecutive ones are used where they lie.
  static Left keys(Rows<Bfloat16Bits> rows, int64_t count, uint32_t* packed) {
    const int64_t words = rows.width / 2, padded = round_up(words, kTileSide);
    if (!rows.places && words == padded && count % kTileSide == 0)
      return {reinterpret_cast<const uint32_t*>(rows.row(0)), words, 1};
    for (int64_t i = 0; i < count; ++i) {
      memcpy(packed + i * padded, rows.row(i), sizeof(uint32_t) * words);
      memset(packed + i * padded + words, 0, sizeof(uint32_t) * (padded - words));
    }
    memset(packed + count * padded, 0, sizeof(uint32_t) * (round_up(count, kTileSide) - count) * padded);
    return {packed, padded, 1};
  }

  // Values with their elements as rows, of words of two keys each.
  static Left values(Rows<Bfloat16Bits> rows, int64_t count, uint32_t* packed) {
    const int64_t keys = round_up(count, kKeys), stride = keys / 2;
    for (int64_t key = 0; key < keys; key += kKeys) {
      const Bfloat16Bits* row[kKeys];
      const bool whole = key + kKeys <= count;
      for (int64_t i = 0; whole && i < kKeys; ++i) row[i] = rows.row(key + i);
      for (int64_t d = 0; d < round_up(rows.width, kTileSide); d += kWidth) {
        uint32_t* to = packed + d * stride + key / 2;
        if (whole && d + kWidth <= rows.width)
          transpose_pairs(row, d, to, stride);
        else
          transpose_rest(rows, key, count, d, to, stride);
      }
    }
    return {packed, stride, 1};
  }

  // In place, as rows of pairs; the last rows are zeros.
  static Lanes weights(float* weights, int64_t count, int64_t lanes, int64_t stride) {
    const Lanes pairs = Bfloat16Pairs::weights(weights, count, lanes, stride);
    for (int64_t i = (count + 1) / 2; i < round_up(count, kKeys) / 2; ++i)
      memset(weights + i * stride, 0, sizeof(float) * lanes);
    return pairs;
  }

 private:
  // Keys and elements that are transposed at once.
  static constexpr int64_t kKeys = 2 * kTileSide, kWidth = 8;

  // Where fewer keys or elements are left: zeros stand for the others.
  static void transpose_rest(Rows<Bfloat16Bits> rows, int64_t key, int64_t count, int64_t d, uint32_t* to,
                             int64_t stride) {
    Bfloat16Bits copy[kKeys][kWidth] = {};
    const Bfloat16Bits* row[kKeys];
    const int64_t width = rows.width - d < kWidth ? rows.width - d : kWidth;
    for (int64_t i = 0; i < kKeys; ++i) {
      row[i] = copy[i];
      if (key + i < count && width > 0) memcpy(copy[i], rows.row(key + i) + d, sizeof(Bfloat16Bits) * width);
    }
    transpose_pairs(row, 0, to, stride);
  }
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer

#endif
