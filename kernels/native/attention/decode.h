// Exact attention of one query a head, as every decoding step asks for: keys and values are streamed once, as they lie.
// The keys of a row are cut into parts of a fixed size, so that all threads work on one row and the result does not
// depend on how many there are (flash-decoding, Dao et al. 2023); parts are merged by their log-sum-exp.
#pragma once

#include "attention/softmax.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// A vector of elements as floats.
ICEFORMER_INLINE Floats widen(const float* from) { return load<Floats>(from); }
ICEFORMER_INLINE Floats widen(const Bfloat16Bits* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * ICEFORMER_LANES)));
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// The first `count` elements, then zeros.
template <class Element>
ICEFORMER_INLINE Floats widen(const Element* from, int64_t count) {
  if (count >= kLanes) return widen(from);
  Element padded[kLanes] = {};
  memcpy(padded, from, sizeof(Element) * count);
  return widen(padded);
}

// How keys are multiplied: pairs of bfloat16 where the processor has a product of them, floats elsewhere.
#if defined(ICEFORMER_BFLOAT16_DOT)
using DecodeBfloat16 = Bfloat16Pairs;
#else
using DecodeBfloat16 = Bfloat16;
#endif

// A vector of a key's words, as they lie or widened.
template <class Format>
ICEFORMER_INLINE Words key_words(const typename Format::Element* from) {
  if constexpr (sizeof(typename Format::Element) * Format::kPerWord == sizeof(uint32_t))
    return load<Words>(from);
  else
    return (Words)widen(from);
}

// One part of the keys of one head, for all queries that share it.
template <class Format>
class DecodePart {
 public:
  using Element = typename Format::Element;
  using Product = typename Format::Product;

  DecodePart(const Attention& call, Arena& arena)
      : call_(call),
        key_words_(round_up(call.head_dim / Format::kPerWord, kLanes)),
        value_width_(round_up(call.value_dim, kLanes)) {
    query_ = arena.take<uint32_t>(call.group() * key_words_);
    total_ = arena.take<float>(call.group() * value_width_);
    logits_ = arena.take<float>(kQueries * kTileKeys);
    largest_ = arena.take<float>(call.group());
    weight_ = arena.take<float>(call.group());
  }

  // Writes, for each query of the group, `value_dim` sums of values, the weight that they were summed with, and the
  // largest logit, to which weights are relative.
  void run(const DecodeTask& task) {
    const HeadMemory memory = call_.memory(task.head);
    begin(task.head);
    for (int64_t start = task.first; start < task.last;) {
      const int64_t count = smaller(smaller(task.last - start, kTileKeys), memory.left_in_page(start));
      const int64_t place = memory.place(start);
      const Element* keys = static_cast<const Element*>(call_.key) + place * call_.head_dim;
      const Element* values = static_cast<const Element*>(call_.value) + place * call_.value_dim;
      for (int64_t query = 0; query < call_.group(); query += kQueries)
        attend_some(keys, values, count, query, smaller(call_.group() - query, kQueries));
      start += count;
    }
    for (int64_t query = 0; query < call_.group(); ++query) {
      float* part = task.part + query * call_.part_width();
      memcpy(part, total_ + query * value_width_, sizeof(float) * call_.value_dim);
      part[call_.value_dim] = weight_[query];
      part[call_.value_dim + 1] = largest_[query];
    }
  }

 private:
  // Queries that share what is loaded of keys and values, and vectors of a value that stay in registers for them.
  static constexpr int kQueries = 4;
  static constexpr int kColumns = kLanes == 16 ? 4 : 2;

  void begin(int64_t head) {
    const int64_t group = call_.group(), row = head / call_.kv_heads, first = head % call_.kv_heads * group;
    const Element* from = static_cast<const Element*>(call_.query) + (row * call_.query_heads + first) * call_.head_dim;
    memset(query_, 0, sizeof(uint32_t) * group * key_words_);
    for (int64_t query = 0; query < group; ++query) {
      for (int64_t word = 0; word < call_.head_dim / Format::kPerWord; ++word)
        query_[query * key_words_ + word] = Format::word(from + query * call_.head_dim + word * Format::kPerWord);
      largest_[query] = kLowest;
      weight_[query] = 0.0f;
    }
    memset(total_, 0, sizeof(float) * group * value_width_);
  }

  void attend_some(const Element* keys, const Element* values, int64_t count, int64_t query, int64_t queries) {
    if (queries == 4) return attend<4>(keys, values, count, query);
    if (queries == 3) return attend<3>(keys, values, count, query);
    if (queries == 2) return attend<2>(keys, values, count, query);
    attend<1>(keys, values, count, query);
  }

  // Attends `Q` queries from `query` on to `count` keys.
  template <int Q>
  void attend(const Element* keys, const Element* values, int64_t count, int64_t query) {
    for (int64_t key = 0; key < count; ++key) score<Q>(keys + key * call_.head_dim, key, query);
    for (int q = 0; q < Q; ++q) exponentiate(logits_ + q * kTileKeys, count, query + q);
    int64_t d = 0;
    for (; d + kColumns * kLanes <= call_.value_dim; d += kColumns * kLanes)
      accumulate<Q, kColumns>(values + d, count, query, d);
    for (; d < call_.value_dim; d += kLanes) accumulate<Q, 1>(values + d, count, query, d);
  }

  // Products of a key with `Q` queries.
  template <int Q>
  void score(const Element* key, int64_t index, int64_t query) {
    constexpr int64_t kStep = kLanes * Format::kPerWord;
    Floats sums[Q] = {};
    const uint32_t* words = query_ + query * key_words_;
    int64_t d = 0;
    for (; d + kStep <= call_.head_dim; d += kStep, words += kLanes) add_products<Q>(key + d, words, sums);
    if (d < call_.head_dim) {
      Element padded[kStep] = {};
      memcpy(padded, key + d, sizeof(Element) * (call_.head_dim - d));
      add_products<Q>(padded, words, sums);
    }
    for (int q = 0; q < Q; ++q) logits_[q * kTileKeys + index] = sum(sums[q]);
  }

  template <int Q>
  ICEFORMER_INLINE void add_products(const Element* key, const uint32_t* words, Floats (&sums)[Q]) {
    const auto some = (typename Product::Broadcast)key_words<Format>(key);
    for (int q = 0; q < Q; ++q) sums[q] = Product::add(sums[q], some, load<Words>(words + q * key_words_));
  }

  // Products of one query to softmax weights, relative to the largest logit so far; what was summed before follows.
  void exponentiate(float* logits, int64_t count, int64_t query) {
    const int64_t end = round_up(count, kLanes);
    Floats best = fill(largest_[query]);
    for (int64_t key = 0; key < end; key += kLanes) {
      Floats logit = cap(load<Floats>(logits + key) * call_.scale, call_.softcap);
      for (int64_t i = count - key; i < kLanes; ++i) logit[i] = kMasked;
      store(logits + key, logit);
      best = larger(best, logit);
    }
    const float now = largest(best);
    Floats weights = {};
    for (int64_t key = 0; key < end; key += kLanes) {
      const Floats weight = exponential(load<Floats>(logits + key) - now);
      store(logits + key, weight);
      weights += weight;
    }
    if (now > largest_[query]) {
      const float decay = exponential(fill(largest_[query] - now))[0];
      float* total = total_ + query * value_width_;
      for (int64_t d = 0; d < value_width_; d += kLanes) store(total + d, load<Floats>(total + d) * decay);
      weight_[query] *= decay;
      largest_[query] = now;
    }
    weight_[query] += sum(weights);
  }

  // Adds values times weights in `C` vectors from column `d` on.
  template <int Q, int C>
  void accumulate(const Element* values, int64_t count, int64_t query, int64_t d) {
    Floats sums[Q][C];
    for (int q = 0; q < Q; ++q)
      for (int c = 0; c < C; ++c) sums[q][c] = load<Floats>(total_ + (query + q) * value_width_ + d + c * kLanes);
    const int64_t left = call_.value_dim - d;
    for (int64_t key = 0; key < count; ++key) {
      Floats some[C];
      for (int c = 0; c < C; ++c) {
        const Element* from = values + key * call_.value_dim + c * kLanes;
        some[c] = C == 1 ? widen(from, left) : widen(from);
      }
      for (int q = 0; q < Q; ++q)
        for (int c = 0; c < C; ++c) sums[q][c] += some[c] * logits_[q * kTileKeys + key];
    }
    for (int q = 0; q < Q; ++q)
      for (int c = 0; c < C; ++c) store(total_ + (query + q) * value_width_ + d + c * kLanes, sums[q][c]);
  }

  const Attention& call_;
  int64_t key_words_, value_width_;
  uint32_t* query_;
  float *total_, *logits_, *largest_, *weight_;
};

// Writes output and log-sum-exp of a head's queries from its parts, which are used up.
template <class Format>
void merge_parts(const Attention& call, int64_t head, float* parts, int64_t count) {
  using Element = typename Format::Element;
  const int64_t group = call.group(), row = head / call.kv_heads, width = call.part_width();
  const int64_t first = row * call.query_heads + head % call.kv_heads * group;
  for (int64_t query = 0; query < group; ++query) {
    float* mine = parts + query * width;
    float best = kLowest, weight = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float largest = mine[i * group * width + call.value_dim + 1];
      best = largest > best ? largest : best;
    }
    for (int64_t i = 0; i < count; ++i) {
      float* part = mine + i * group * width + call.value_dim;
      part[1] = __builtin_expf(part[1] - best);
      weight += part[0] * part[1];
    }
    const bool some = weight > 0.0f;
    Element* output = static_cast<Element*>(call.output) + (first + query) * call.value_dim;
    for (int64_t d = 0; d < call.value_dim; ++d) {
      float total = 0.0f;
      for (int64_t i = 0; i < count; ++i) {
        const float* part = mine + i * group * width;
        total += part[d] * part[call.value_dim + 1];
      }
      Format::store_output(output + d, some ? total / weight : 0.0f);
    }
    call.lse[first + query] = some ? best + __builtin_logf(weight) : kMasked;
  }
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
