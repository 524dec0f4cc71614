// The two products of decoding in integers, for keys and values of int8: a query, and the weights of a tile, are rounded to
// 15 or 16 bits, so that the int8 of keys and values decide how precise the result is, and multiplied byte by byte.
#pragma once

#include "attention/decode.h"
#include "common/transpose.h"

#if defined(__AVX512VNNI__)

namespace iceformer {
namespace ICEFORMER_ISA {

template <class Format>
class Int8Products {
 public:
  using Element = typename Format::Element;
  using Stored = int8_t;
  static constexpr bool kScaled = true;

  static bool fits(const Attention& call) { return call.head_dim % kChunk == 0 && call.value_dim % kChunk == 0; }

  Int8Products(const Attention& call, Arena& arena) : call_(call) {
    const int64_t words = call.group() * call.head_dim / 4;
    high_ = arena.take<uint32_t>(words);
    low_ = arena.take<uint32_t>(words);
    start_high_ = arena.take<int32_t>(call.group());
    start_low_ = arena.take<int32_t>(call.group());
    unit_ = arena.take<float>(call.group());
    total_ = arena.take<float>(call.group() * call.value_dim);
    for (auto& bytes : weights_) bytes = arena.take<uint8_t>(kMostQueries * kTileKeys);
  }

  void begin(const Element* queries) {
    memset(total_, 0, sizeof(float) * call_.group() * call_.value_dim);
    for (int64_t query = 0; query < call_.group(); ++query) round_query(queries + query * call_.head_dim, query);
  }

  // Products of kLanes keys with `Q` queries from `query` on. Keys are transposed, so that each has a lane.
  template <int Q>
  ICEFORMER_INLINE void score(const int8_t* const* keys, int64_t query, Floats (&products)[Q]) const {
    Ints high[Q], low[Q];
    for (int q = 0; q < Q; ++q) {
      high[q] = fill_ints(start_high_[query + q]);
      low[q] = fill_ints(start_low_[query + q]);
    }
    for (int64_t d = 0; d < call_.head_dim; d += kChunk) {
      Words words[kWords];
      for (int i = 0; i < kWords; ++i) words[i] = load<Words>(keys[i] + d);
      transpose_words<kWords>(words);
      for (int i = 0; i < kWords; ++i) {
        const auto key = (__m512i)(words[i] ^ (Words)fill_ints(static_cast<int32_t>(Int8Product::kFlip)));
        for (int q = 0; q < Q; ++q) {
          const int64_t at = (query + q) * (call_.head_dim / 4) + d / 4 + i;
          high[q] = Int8Product::add(high[q], key, (Words)fill_ints(load<int32_t>(high_ + at)));
          low[q] = Int8Product::add(low[q], key, (Words)fill_ints(load<int32_t>(low_ + at)));
        }
      }
    }
    for (int q = 0; q < Q; ++q) products[q] = (to_floats(high[q]) * 128.0f + to_floats(low[q])) * unit_[query + q];
  }

  // Adds `count` values times weights [Q, kTileKeys], which are 0 behind the last, to the sums of `Q` queries.
  template <int Q, class Places>
  void accumulate(Places places, int64_t count, int64_t query, const float* weights) {
    float unit[Q];
    for (int q = 0; q < Q; ++q) unit[q] = round_weights(weights + q * kTileKeys, count, q);
    for (int64_t d = 0; d < call_.value_dim; d += kChunk) {
      if constexpr (Q < kMostQueries) {
        add_values<Q>(places, count, query, 0, d, unit);
      } else {  // the sums of so many do not fit into the registers
        add_values<Q / 2>(places, count, query, 0, d, unit);
        add_values<Q / 2>(places, count, query, Q / 2, d, unit);
      }
    }
  }

  void scale_total(int64_t query, float factor) {
    float* total = total_ + query * call_.value_dim;
    for (int64_t d = 0; d < call_.value_dim; d += kLanes) store(total + d, load<Floats>(total + d) * factor);
  }

  // From the order that interleaving leaves: four elements of each quarter of a chunk make a vector.
  void write_total(int64_t query, float* to) const {
    const float* total = total_ + query * call_.value_dim;
    for (int64_t d = 0; d < call_.value_dim; ++d) {
      const int64_t within = d % kChunk, vector = within % 16 / 4, lane = within / 16 * 4 + within % 4;
      to[d] = total[d - within + vector * kLanes + lane];
    }
  }

 private:
  // Elements of a key or value that make a vector, and the words and vectors of 32-bit sums that these are.
  static constexpr int64_t kChunk = 64;
  static constexpr int kWords = 16, kVectors = 4;
  static constexpr int64_t kMostQueries = 4;
  static constexpr float kMostWeight = 65535.0f;

  // A query as 128 * high + low, times a unit; words in the order in which transposed keys have them.
  void round_query(const Element* query, int64_t number) {
    float largest = 0.0f;
    for (int64_t d = 0; d < call_.head_dim; ++d) {
      const float magnitude = __builtin_fabsf(to_float(query + d));
      largest = magnitude > largest ? magnitude : largest;
    }
    const float unit = (largest > 0.0f ? largest : 1.0f) / (127.0f * 128.0f);
    int32_t sum_of_high = 0, sum_of_low = 0;
    for (int64_t word = 0; word < call_.head_dim / 4; ++word) {
      const int64_t from = word / kWords * kWords + WordOrder<kWords>::of(static_cast<int>(word % kWords));
      uint32_t high_word = 0, low_word = 0;
      for (int64_t byte = 0; byte < 4; ++byte) {
        const int32_t rounded = static_cast<int32_t>(__builtin_rintf(to_float(query + from * 4 + byte) / unit));
        const int32_t high = (rounded + 64) >> 7, low = rounded - high * 128;
        sum_of_high += high;
        sum_of_low += low;
        high_word |= (static_cast<uint32_t>(high) & 0xffu) << (8 * byte);
        low_word |= (static_cast<uint32_t>(low) & 0xffu) << (8 * byte);
      }
      high_[number * (call_.head_dim / 4) + word] = high_word;
      low_[number * (call_.head_dim / 4) + word] = low_word;
    }
    start_high_[number] = Int8Product::kStart * sum_of_high;
    start_low_[number] = Int8Product::kStart * sum_of_low;
    unit_[number] = unit;
  }

  // Weights as 256 * high + low, bytes without a sign, times a unit, which it gives.
  float round_weights(const float* weights, int64_t count, int64_t q) {
    const int64_t end = round_up(count, kLanes);
    Floats best = {};
    for (int64_t key = 0; key < end; key += kLanes) best = larger(best, load<Floats>(weights + key));
    const float most = largest(best), unit = (most > 0.0f ? most : 1.0f) / kMostWeight;
    for (int64_t key = 0; key < end; key += kLanes) {
      // The sum rounds to an integer in the lowest bits of its mantissa.
      const Words rounded = (Words)(load<Floats>(weights + key) * (1.0f / unit) + 8388608.0f) & 0xffffu;
      store(weights_[0] + q * kTileKeys + key, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)(rounded >> 8)));
      store(weights_[1] + q * kTileKeys + key, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)(rounded & 0xffu)));
    }
    return unit;
  }

  // Adds a chunk of values from element d on, times the weights of the tile's queries from `first` on, four keys at a
  // time, whose bytes are interleaved.
  template <int Q, class Places>
  ICEFORMER_INLINE void add_values(Places places, int64_t count, int64_t query, int first, int64_t d,
                                   const float* unit) {
    Ints high[Q][kVectors], low[Q][kVectors];
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < kVectors; ++v) high[q][v] = low[q][v] = Ints{};
    const int8_t* values = static_cast<const int8_t*>(call_.value) + d;
    for (int64_t key = 0; key < count; key += 4) {
      __m512i rows[4];
      for (int i = 0; i < 4; ++i)
        rows[i] = load<__m512i>(values + places[smaller(key + i, count - 1)] * call_.value_dim);
      const __m512i ab_low = _mm512_unpacklo_epi8(rows[0], rows[1]), ab_high = _mm512_unpackhi_epi8(rows[0], rows[1]);
      const __m512i cd_low = _mm512_unpacklo_epi8(rows[2], rows[3]), cd_high = _mm512_unpackhi_epi8(rows[2], rows[3]);
      const __m512i words[kVectors] = {_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
                                       _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
      for (int q = 0; q < Q; ++q) {
        const int64_t at = (first + q) * kTileKeys + key;
        const __m512i of_high = _mm512_set1_epi32(load<int32_t>(weights_[0] + at));
        const __m512i of_low = _mm512_set1_epi32(load<int32_t>(weights_[1] + at));
        for (int v = 0; v < kVectors; ++v) {
          high[q][v] = (Ints)_mm512_dpbusd_epi32((__m512i)high[q][v], of_high, words[v]);
          low[q][v] = (Ints)_mm512_dpbusd_epi32((__m512i)low[q][v], of_low, words[v]);
        }
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < kVectors; ++v) {
        float* at = total_ + (query + first + q) * call_.value_dim + d + v * kLanes;
        store(at, load<Floats>(at) + to_floats((high[q][v] << 8) + low[q][v]) * unit[first + q]);
      }
  }

  const Attention& call_;
  uint32_t *high_, *low_;
  int32_t *start_high_, *start_low_;
  float *unit_, *total_;
  uint8_t* weights_[2];  // high and low bytes [kMostQueries, kTileKeys]
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer

#endif
