// Stage 1 of decoding by the method low_rank: the few queries of a group against all keys of a head. Keys stand in the
// lanes, one of each of kLanes key blocks at a time, so that a block's largest product is a maximum of vectors.
#pragma once

#include "attention/low_rank.h"
#include "common/transpose.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// From kLanes rows of `depth` words to words [depth, kLanes].
template <int W>
void transpose_rows(const uint32_t* rows, uint32_t* words) {
  Words registers[W];
  for (int i = 0; i < W; ++i) registers[i] = load<Words>(rows + i * kLanes);
  transpose_words<W>(registers);
  for (int i = 0; i < W; ++i) store(words + WordOrder<W>::of(i) * kLanes, registers[i]);
}
inline void transpose_rows(const uint32_t* rows, int64_t depth, uint32_t* words) {
  if (depth == 4) return transpose_rows<4>(rows, words);
  if (depth == 8) return transpose_rows<8>(rows, words);
  if (depth == 16) return transpose_rows<16>(rows, words);
  for (int64_t lane = 0; lane < kLanes; ++lane)
    for (int64_t k = 0; k < depth; ++k) words[k * kLanes + lane] = rows[lane * depth + k];
}

// Products of a word of each key, passed through Int8Product::kFlip, with a word of a query.
ICEFORMER_INLINE Ints add_word_products(Ints sums, Words keys, const uint32_t* query) {
#if defined(__AVX512VNNI__)
  return Int8Product::add(sums, (__m512i)keys, (Words)fill_ints(load<int32_t>(query)));
#else
  return Int8Product::add(sums, Int8Product::broadcast(query), keys);
#endif
}

class BlockScan {
 public:
  BlockScan(const Attention& call, const Choice& choice, Arena& arena)
      : call_(call), choice_(choice), depth_(choice.low_rank.rank / 4) {
    query_ = arena.take<uint32_t>(call.group() * depth_);
    start_ = arena.take<int32_t>(call.group());
    scale_ = arena.take<float>(call.group());
    rows_ = arena.take<uint32_t>(choice.key_block * kLanes * depth_);
    words_ = arena.take<uint32_t>(kLanes * depth_);
    largest_ = arena.take<int32_t>(call.group() * kLanes);
  }

  // Writes the largest estimated logit of each query in each block.
  void run(const ScanTask& task) {
    const int64_t rank = choice_.low_rank.rank;
    const float* queries = choice_.low_rank.queries + task.head * call_.group() * rank;
    for (int64_t q = 0; q < call_.group(); ++q)
      scale_[q] = round_query(queries + q * rank, rank, query_ + q * depth_, 1, start_ + q) * call_.scale;
    const HeadMemory memory = call_.memory(task.head);
    for (int64_t block = task.first; block < task.first + task.count; block += kLanes)
      scan(memory, task, block, smaller(task.first + task.count - block, kLanes));
  }

 private:
  // Up to kLanes blocks; behind the last, that block again.
  void scan(const HeadMemory& memory, const ScanTask& task, int64_t first, int64_t count) {
    const int64_t size = choice_.key_block;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t place = memory.place((first + smaller(lane, count - 1)) * size);
      const int8_t* from = choice_.low_rank.keys + place * choice_.low_rank.rank;
      for (int64_t i = 0; i < size; ++i)
        memcpy(rows_ + (i * kLanes + lane) * depth_, from + i * choice_.low_rank.rank, choice_.low_rank.rank);
    }
    for (int64_t i = 0; i < size; ++i) {
      transpose_rows(rows_ + i * kLanes * depth_, depth_, words_);
      for (int64_t q = 0; q < call_.group(); ++q) raise_largest(q, i == 0);
    }
    for (int64_t q = 0; q < call_.group(); ++q) {
      const Ints products = load<Ints>(largest_ + q * kLanes);
      const Floats logits = cap(to_floats(products) * scale_[q], call_.softcap);
      memcpy(task.logits + q * task.stride + first, &logits, sizeof(float) * count);
    }
  }

  void raise_largest(int64_t q, bool first) {
    Ints sums = fill_ints(start_[q]);
    for (int64_t k = 0; k < depth_; ++k) {
      const Words keys = load<Words>(words_ + k * kLanes) ^ (Words)fill_ints(static_cast<int32_t>(Int8Product::kFlip));
      sums = add_word_products(sums, keys, query_ + q * depth_ + k);
    }
    store(largest_ + q * kLanes, first ? sums : larger(sums, load<Ints>(largest_ + q * kLanes)));
  }

  const Attention& call_;
  const Choice& choice_;
  int64_t depth_;  // words of a projected key
  uint32_t *query_, *rows_, *words_;
  int32_t *start_, *largest_;
  float* scale_;
};

// Writes the mean, over the queries, of their softmax weights over `count` logits, which are used up.
inline void average_weights(float* logits, int64_t queries, int64_t stride, int64_t count, float* mean) {
  for (int64_t i = 0; i < count; ++i) mean[i] = 0.0f;
  for (int64_t q = 0; q < queries; ++q) {
    float* row = logits + q * stride;
    Floats best = fill(kMasked), sum_of_weights = {};
    // Rows are padded to whole vectors.
    for (int64_t i = count; i < round_up(count, kLanes); ++i) row[i] = kMasked;
    for (int64_t i = 0; i < count; i += kLanes) best = larger(best, load<Floats>(row + i));
    const float peak = largest(best);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats weight = exponential(load<Floats>(row + i) - peak);
      store(row + i, weight);
      sum_of_weights += weight;
    }
    const float share = 1.0f / (sum(sum_of_weights) * static_cast<float>(queries));
    for (int64_t i = 0; i < count; ++i) mean[i] += row[i] * share;
  }
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
