// Two-stage attention: rank key blocks, rank the tokens of the best, attend to the best of these.
#pragma once

#include "attention/softmax.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// The importance of what is always selected.
constexpr float kForced = 3.4028234663852886e38f;

// Two-stage attention of one query block (attention/selected_block.py is the reference). A `Ranker` is stage 1: it is
// made of (call, selection, arena), and its run(task, count, importance) writes the importance of the first `count` key
// blocks for a query block, the log of the largest estimated softmax weight that a query gives to one of their keys.
template <class Format, class Ranker>
class TwoStage {
 public:
  TwoStage(const Attention& call, const Selection& selection, Arena& arena)
      : call_(call),
        selection_(selection),
        most_candidates_(smaller(selection.candidate_blocks, ceil_divide(call.capacity(), selection.key_block)) *
                         selection.key_block),
        block_(call, arena, larger_of(most_candidates_, kTileKeys)),
        ranker_(call, selection, arena) {
    const int64_t blocks = ceil_divide(call.capacity(), selection.key_block);
    importance_ = arena.take<float>(larger_of(blocks, most_candidates_));
    chosen_ = arena.take<int32_t>(larger_of(blocks, most_candidates_));
    candidate_ = arena.take<int32_t>(most_candidates_);
    select_scratch_ = arena.take<int32_t>(kSelectBuckets + larger_of(blocks, most_candidates_));
    inverse_ = arena.take<float>(block_.lanes());
  }

  void run(const Task& task) {
    block_.begin(task);
    force();
    const int64_t candidates = rank_blocks(task);
    [[maybe_unused]] const typename Format::Product::Scope scope{};
    for (int64_t start = 0; start < candidates; start += kTileKeys)
      block_.score(block_.tile(candidate_, 0, candidates, start), block_.logits() + start * block_.stride());
    block_.exponentiate(block_.logits(), candidates, true);
    const int64_t chosen = rank_tokens(candidates);
    keep(chosen);
    if (!enough_weight()) {
      // What was selected weighs next to nothing beside what was not: the weights have lost their precision.
      block_.restart();
      block_.attend(candidate_, 0, chosen);
    } else {
      for (int64_t start = 0; start < chosen; start += kTileKeys)
        block_.accumulate(block_.tile(candidate_, 0, chosen, start), block_.logits() + start * block_.stride());
    }
    block_.finish();
  }

 private:
  // What is always selected: positions [0, sink_end_) and [forced_start_, forced_end_).
  void force() {
    const int64_t size = selection_.key_block;
    sink_end_ = ceil_divide(selection_.sink, size) * size;
    forced_start_ = larger_of(block_.first() - selection_.local, 0) / size * size;
    forced_end_ = call_.causal ? block_.end() : smaller(block_.last() + 1 + selection_.local, block_.seen_length());
  }

  bool forced(int64_t position) const {
    return position < sink_end_ || (position >= forced_start_ && position < forced_end_);
  }

  // Stage 1: fills candidate_ with the tokens of the best key blocks and gives their number.
  int64_t rank_blocks(const Task& task) {
    const int64_t size = selection_.key_block, end = block_.end();
    const int64_t visible = ceil_divide(end, size);
    const int64_t count = smaller(selection_.candidate_blocks, visible);
    if (count < visible) {
      // Only blocks that every query sees whole are ranked; one at the edge of what is visible is forced.
      const int64_t ranked = (call_.causal ? forced_start_ : block_.seen_length()) / size;
      ranker_.run(task, ranked, importance_);
      for (int64_t block = 0; block < visible; ++block)
        if (block >= ranked || forced(block * size)) importance_[block] = kForced;
      select_largest(importance_, visible, count, chosen_, select_scratch_);
    } else {
      for (int64_t block = 0; block < count; ++block) chosen_[block] = static_cast<int32_t>(block);
    }
    int64_t candidates = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = chosen_[i] * size;
      for (int64_t position = start; position < smaller(start + size, end); ++position)
        candidate_[candidates++] = static_cast<int32_t>(position);
    }
    return candidates;
  }

  // Stage 2: fills chosen_ with the indices of the candidates of the largest exact weight and gives their number.
  int64_t rank_tokens(int64_t candidates) {
    const int64_t count = smaller(selection_.budget, candidates);
    if (count == candidates) {
      for (int64_t i = 0; i < count; ++i) chosen_[i] = static_cast<int32_t>(i);
      return count;
    }
    for (int64_t lane = 0; lane < block_.lanes(); ++lane)
      inverse_[lane] = block_.present(lane) && block_.weights()[lane] > 0 ? 1.0f / block_.weights()[lane] : 0.0f;
    for (int64_t i = 0; i < candidates; ++i) {
      if (forced(candidate_[i])) {
        importance_[i] = kForced;
        continue;
      }
      Floats best = {};
      for (int64_t lane = 0; lane < block_.lanes(); lane += kLanes)
        best = larger(load<Floats>(block_.logits() + i * block_.stride() + lane) * load<Floats>(inverse_ + lane), best);
      importance_[i] = largest(best);
    }
    select_largest(importance_, candidates, count, chosen_, select_scratch_);
    return count;
  }

  // Moves the weights and positions of what was chosen together, and sums each lane's weight anew.
  void keep(int64_t count) {
    const int64_t lanes = block_.lanes(), stride = block_.stride();
    float *weights = block_.logits(), *sum = block_.weights();
    for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      candidate_[i] = candidate_[chosen_[i]];
      const float* from = weights + chosen_[i] * stride;
      float* to = weights + i * stride;
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        const Floats weight = load<Floats>(from + lane);
        store(to + lane, weight);
        store(sum + lane, load<Floats>(sum + lane) + weight);
      }
    }
  }

  bool enough_weight() {
    for (int64_t lane = 0; lane < block_.queries(); ++lane)
      if (block_.present(lane) && block_.weights()[lane] < 1e-20f) return false;
    return true;
  }

  const Attention& call_;
  const Selection& selection_;
  int64_t most_candidates_;
  QueryBlock<Format> block_;
  Ranker ranker_;
  int64_t sink_end_ = 0, forced_start_ = 0, forced_end_ = 0;
  float *importance_, *inverse_;
  int32_t *chosen_, *candidate_, *select_scratch_;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
