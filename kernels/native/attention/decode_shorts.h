// The two products of decoding in integers of 16 bits, for keys and values of int8: a query, and the weights of a tile, are
// rounded to 15 bits and a sign, so that the int8 of keys and values decide how precise the result is.
#pragma once

#include "attention/decode.h"
#include "common/shorts.h"

namespace iceformer {
namespace ICEFORMER_ISA {

template <class Format>
class ShortProducts {
 public:
  using Element = typename Format::Element;
  using Stored = int8_t;
  static constexpr bool kScaled = true;

  // Whole vectors, and sums that 32 bits hold.
  static bool fits(const Attention& call) {
    return call.head_dim % kShorts == 0 && call.value_dim % kLanes == 0 && call.head_dim <= kMostWidth;
  }

  ShortProducts(const Attention& call, Arena& arena) : call_(call) {
    query_ = arena.take<int16_t>(call.group() * call.head_dim);
    unit_ = arena.take<float>(call.group());
    total_ = arena.take<float>(call.group() * call.value_dim);
    weights_ = arena.take<int16_t>(kMostQueries * kTileKeys);
  }

  void begin(const Element* queries) {
    memset(total_, 0, sizeof(float) * call_.group() * call_.value_dim);
    for (int64_t query = 0; query < call_.group(); ++query) round_query(queries + query * call_.head_dim, query);
  }

  // Products of kLanes keys with `Q` queries from `query` on.
  template <int Q>
  ICEFORMER_INLINE void score(const int8_t* const* keys, int64_t query, Floats (&products)[Q]) const {
    const int16_t* queries = query_ + query * call_.head_dim;
    Ints sums[Q][kLanes];
    for (int64_t key = 0; key < kLanes; key += kKeys) {
      Ints some[kKeys][Q];
      for (int i = 0; i < kKeys; ++i)
        for (int q = 0; q < Q; ++q) some[i][q] = Ints{};
      for (int64_t d = 0; d < call_.head_dim; d += kShorts)
        for (int i = 0; i < kKeys; ++i) {
          const Shorts of_key = widen_to_shorts(keys[key + i] + d);
          for (int q = 0; q < Q; ++q)
            some[i][q] = add_pairs(some[i][q], of_key, load<Shorts>(queries + q * call_.head_dim + d));
        }
      for (int i = 0; i < kKeys; ++i)
        for (int q = 0; q < Q; ++q) sums[q][key + i] = some[i][q];
    }
    for (int q = 0; q < Q; ++q) products[q] = sum_across(sums[q]) * unit_[query + q];
  }

  // Adds `count` values times weights [Q, kTileKeys], which are 0 behind the last, to the sums of `Q` queries.
  template <int Q, class Places>
  void accumulate(Places places, int64_t count, int64_t query, const float* weights) {
    float unit[Q];
    for (int q = 0; q < Q; ++q) unit[q] = round_weights(weights + q * kTileKeys, count, weights_ + q * kTileKeys);
    int64_t d = 0;
    for (; d + kColumns * kLanes <= call_.value_dim; d += kColumns * kLanes)
      add_values<Q, kColumns>(places, count, query, d, unit);
    for (; d < call_.value_dim; d += kLanes) add_values<Q, 1>(places, count, query, d, unit);
  }

  void scale_total(int64_t query, float factor) {
    float* total = total_ + query * call_.value_dim;
    for (int64_t d = 0; d < call_.value_dim; d += kLanes) store(total + d, load<Floats>(total + d) * factor);
  }
  void write_total(int64_t query, float* to) const {
    memcpy(to, total_ + query * call_.value_dim, sizeof(float) * call_.value_dim);
  }

 private:
  static constexpr float kMost = 32767.0f;
  static constexpr int64_t kMostQueries = 4, kMostWidth = 512;
  // Keys, and vectors of a value, whose sums are in registers at once.
  static constexpr int kKeys = 2, kColumns = 4;
  static_assert(kMostWidth * 127 * 32767 < int64_t{1} << 31 && kTileKeys <= kMostWidth && kTileKeys % kLanes == 0, "");

  void round_query(const Element* query, int64_t number) {
    float largest = 0.0f;
    for (int64_t d = 0; d < call_.head_dim; ++d) {
      const float magnitude = __builtin_fabsf(to_float(query + d));
      largest = magnitude > largest ? magnitude : largest;
    }
    unit_[number] = (largest > 0.0f ? largest : 1.0f) / kMost;
    for (int64_t d = 0; d < call_.head_dim; ++d)
      query_[number * call_.head_dim + d] = static_cast<int16_t>(__builtin_rintf(to_float(query + d) / unit_[number]));
  }

  // Weights as integers times a unit, which it gives.
  float round_weights(const float* weights, int64_t count, int16_t* to) const {
    const int64_t end = round_up(count, kLanes);
    Floats best = {};
    for (int64_t key = 0; key < end; key += kLanes) best = larger(best, load<Floats>(weights + key));
    const float most = largest(best), unit = (most > 0.0f ? most : 1.0f) / kMost;
    for (int64_t key = 0; key < end; key += kLanes) {
      // The sum rounds to an integer in the lowest bits of its mantissa.
      typedef int16_t Halves __attribute__((vector_size(2 * ICEFORMER_LANES)));
      const Ints rounded = (Ints)(load<Floats>(weights + key) * (1.0f / unit) + 8388608.0f);
      store(to + key, __builtin_convertvector(rounded & 0x7fff, Halves));
    }
    return unit;
  }

  // Adds `C` vectors of values from element d on, times the weights of `Q` queries, two keys at a time.
  template <int Q, int C, class Places>
  ICEFORMER_INLINE void add_values(Places places, int64_t count, int64_t query, int64_t d, const float* unit) {
    Ints sums[Q][C];
    for (int q = 0; q < Q; ++q)
      for (int c = 0; c < C; ++c) sums[q][c] = Ints{};
    const int8_t* values = static_cast<const int8_t*>(call_.value) + d;
    for (int64_t key = 0; key < count; key += 2) {
      const int8_t* one = values + places[key] * call_.value_dim;
      const int8_t* other = values + places[smaller(key + 1, count - 1)] * call_.value_dim;
      Shorts pairs[C];
      for (int c = 0; c < C; ++c) pairs[c] = interleave_to_shorts(one + c * kLanes, other + c * kLanes);
      for (int q = 0; q < Q; ++q) {
        const Shorts weights = repeat_two(weights_ + q * kTileKeys + key);
        for (int c = 0; c < C; ++c) sums[q][c] = add_pairs(sums[q][c], pairs[c], weights);
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int c = 0; c < C; ++c) {
        float* at = total_ + (query + q) * call_.value_dim + d + c * kLanes;
        store(at, load<Floats>(at) + to_floats(sums[q][c]) * unit[q]);
      }
  }

  const Attention& call_;
  int16_t *query_, *weights_;  // [group, head_dim]; [kMostQueries, kTileKeys]
  float *unit_, *total_;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
