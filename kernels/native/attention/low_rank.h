// Stage 1 by the method low_rank: which key blocks' tokens are worth a second look.
#pragma once

#include "attention/maxima.h"
#include "attention/softmax.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// The importance of what is always selected.
constexpr float kForced = 3.4028234663852886e38f;

// Rounds a projected query relative to its largest component into packed words, `step` apart. Gives the factor of its
// products, and what their sums start with.
ICEFORMER_INLINE float round_query(const float* query, int64_t rank, uint32_t* words, int64_t step, int32_t* start) {
  float largest = 0.0f;
  for (int64_t d = 0; d < rank; ++d) {
    const float magnitude = __builtin_fabsf(query[d]);
    if (magnitude > largest) largest = magnitude;
  }
  const float unit = (largest > 0.0f ? largest : 1.0f) / 127.0f;
  int32_t sum = 0;
  for (int64_t k = 0; k < rank / 4; ++k) {
    uint32_t word = 0;
    for (int64_t byte = 0; byte < 4; ++byte) {
      const int32_t rounded = static_cast<int32_t>(__builtin_rintf(query[4 * k + byte] / unit));
      sum += rounded;
      word |= (static_cast<uint32_t>(rounded) & 0xffu) << (8 * byte);
    }
    words[k * step] = word;
  }
  *start = Int8Product::kStart * sum;
  return unit;
}

// The ranker low_rank (attention/methods/low_rank.py is the reference).
class LowRankRanker {
 public:
  LowRankRanker(const Attention& call, const Selection& selection, Arena& arena)
      : call_(call),
        low_rank_(selection.low_rank),
        lanes_(round_up(low_rank_.ranking_queries, kMaximaLanes)),
        maxima_(selection, arena) {
    const int64_t blocks = ceil_divide(call.capacity(), selection.key_block);
    query_ = arena.take<uint32_t>(maxima_.padded_depth() * lanes_);
    norm_ = arena.take<float>(call.lanes());
    query_lane_ = arena.take<int32_t>(call.lanes());
    select_scratch_ = arena.take<int32_t>(kSelectBuckets + call.lanes());
    start_ = arena.take<int32_t>(lanes_);
    scale_ = arena.take<float>(lanes_);
    normaliser_ = arena.take<float>(lanes_);
    logits_ = arena.take<float>(blocks * lanes_);
  }

  // Writes the importance of the first `count` key blocks: the log of the largest estimated softmax weight that a query
  // gives to one of its keys.
  void run(const Task& task, int64_t count, float* importance) {
    score(task, count);
    normalise(count);
    for (int64_t block = 0; block < count; ++block) {
      Floats best = fill(kMasked);
      for (int64_t lane = 0; lane < lanes_; lane += kLanes)
        best = larger(load<Floats>(logits_ + block * lanes_ + lane) - load<Floats>(normaliser_ + lane), best);
      importance[block] = largest(best);
    }
  }

  // Writes the mean weight of the first `count` key blocks beside keys whose log-sum-exp is known for each lane of the
  // block, and the mean times the largest weight. Passes over what is forced.
  void weigh(const Task& task, int64_t count, const float* beside, float* mean, float* importance) {
    score(task, count);
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) weigh_lanes(count, lane, beside, importance);
    for (int64_t block = 0; block < count; ++block) {
      if (importance[block] == kForced) continue;
      Floats all = {}, best = {};
      for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
        const Floats weight = load<Floats>(logits_ + block * lanes_ + lane) * load<Floats>(normaliser_ + lane);
        all += weight;
        best = larger(weight, best);
      }
      mean[block] = sum(all) / static_cast<float>(count_);
      importance[block] = mean[block] * largest(best);
    }
  }

 private:
  // Takes the queries of the largest norm and rounds each relative to its largest component. Those that only fill up
  // the block take no part.
  void pack_queries(const Task& task) {
    const int64_t lanes = call_.lanes(), rank = low_rank_.rank, row = task.head / call_.kv_heads;
    const int64_t of_call = smaller(call_.seen_length(row) - call_.offset[row], call_.queries);
    const int64_t present = smaller(of_call - task.block * call_.query_block, call_.query_block);
    count_ = smaller(low_rank_.ranking_queries, call_.group() * present);
    const float* queries = low_rank_.queries + (task.head * call_.blocks() + task.block) * lanes * rank;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      float sum = 0.0f;
      for (int64_t d = 0; d < rank; ++d) sum += queries[lane * rank + d] * queries[lane * rank + d];
      norm_[lane] = lane % call_.query_block < present ? sum : -1.0f;
    }
    select_largest(norm_, lanes, count_, query_lane_, select_scratch_);
    memset(query_, 0, sizeof(uint32_t) * maxima_.padded_depth() * lanes_);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      start_[lane] = 0;
      scale_[lane] = 0.0f;
      if (lane >= count_) continue;
      const float* query = queries + query_lane_[lane] * rank;
      scale_[lane] = round_query(query, rank, query_ + lane, lanes_, start_ + lane) * call_.scale;
    }
  }

  // The largest logit of each query in each of the first `count` key blocks.
  void score(const Task& task, int64_t count) {
    pack_queries(task);
    for (int64_t lane = 0; lane < lanes_; ++lane) normaliser_[lane] = kLowest;
    [[maybe_unused]] const auto scope = maxima_.scope();
    const HeadMemory memory = call_.memory(task.head);
    const RankingQueries queries = {query_, start_, lanes_};
    for (int64_t block = 0; block < count; block += maxima_.blocks()) {
      const int64_t some = smaller(maxima_.blocks(), count - block);
      float* logits = logits_ + block * lanes_;
      maxima_.run(memory, block, some, queries, reinterpret_cast<int32_t*>(logits));
      for (int64_t i = 0; i < some; ++i) scale_products(logits + i * lanes_);
    }
  }

  // From integer products to logits, in place; raises the largest of each lane.
  void scale_products(float* logits) {
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
      const Floats logit = cap(to_floats(load<Ints>(logits + lane)) * load<Floats>(scale_ + lane), call_.softcap);
      store(logits + lane, logit);
      store(normaliser_ + lane, larger(load<Floats>(normaliser_ + lane), logit));
    }
  }

  // From each query's largest logit to its log-sum-exp; lanes without a query give weight to nothing.
  void normalise(int64_t count) {
    static_assert(kMaximaLanes % (2 * kLanes) == 0, "lanes are summed two vectors at a time");
    for (int64_t lane = 0; lane < lanes_; lane += 2 * kLanes) {
      const Floats peak[2] = {load<Floats>(normaliser_ + lane), load<Floats>(normaliser_ + lane + kLanes)};
      Floats sum[2] = {};
      for (int64_t block = 0; block < count; ++block)
        for (int v = 0; v < 2; ++v)
          sum[v] += exponential(load<Floats>(logits_ + block * lanes_ + lane + v * kLanes) - peak[v]);
      for (int64_t i = 0; i < 2 * kLanes; ++i) {
        const float total = peak[i / kLanes][i % kLanes] + __builtin_logf(sum[i / kLanes][i % kLanes]);
        normaliser_[lane + i] = lane + i < count_ ? total : -kMasked;
      }
    }
  }

  // From logits to weights relative to the largest, in place, and from each query's largest logit to the factor of its
  // weights; lanes without a query give weight to nothing.
  void weigh_lanes(int64_t count, int64_t lane, const float* beside, const float* importance) {
    Floats apart = fill(kMasked);
    for (int64_t i = 0; i < kLanes && lane + i < count_; ++i)
      apart[i] = beside[query_lane_[lane + i]] - kLogOfKeysWorth;
    const Floats peak = larger(load<Floats>(normaliser_ + lane), apart);
    Floats sum = exponential(apart - peak);
    for (int64_t block = 0; block < count; ++block) {
      if (importance[block] == kForced) continue;
      float* at = logits_ + block * lanes_ + lane;
      const Floats weight = exponential(load<Floats>(at) - peak);
      store(at, weight);
      sum += weight;
    }
    for (int64_t i = 0; i < kLanes; ++i) normaliser_[lane + i] = lane + i < count_ ? 1.0f / sum[i] : 0.0f;
  }

  // A key block is estimated to weigh as much as two of its best key: KEYS_WORTH in attention/selection.py.
  static constexpr float kLogOfKeysWorth = 0.69314718f;

  const Attention& call_;
  const LowRank& low_rank_;
  int64_t lanes_;
  int64_t count_ = 0;  // of the queries that rank
  BlockMaxima maxima_;
  uint32_t* query_;
  int32_t *start_, *query_lane_, *select_scratch_;
  float *norm_, *scale_, *normaliser_, *logits_;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
