// Two-stage attention: rank key blocks, rank the tokens of the best, attend to the best of these.
#pragma once

#include "attention/softmax.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Two-stage attention of one query block (attention/selected_block.py is the reference). A `Ranker` is stage 1: it is
// made of (call, selection, arena), and for a query block its run(task, count, importance) writes the importance of the
// first `count` key blocks with a fixed budget, and weigh(task, count, beside, mean, importance) what selection by mass
// needs of them.
template <class Format, class Ranker>
class TwoStage {
 public:
  TwoStage(const Attention& call, const Selection& selection, Arena& arena)
      : call_(call),
        selection_(selection),
        most_candidates_(smaller(most_candidate_blocks(call, selection), ceil_divide(call.capacity(), selection.key_block)) *
                         selection.key_block),
        block_(call, arena, larger_of(rows(call, selection), kTileKeys) + Format::Product::kRows),
        ranker_(call, selection, arena) {
    const int64_t blocks = ceil_divide(call.capacity(), selection.key_block);
    const int64_t size = larger_of(blocks, most_candidates_);
    importance_ = arena.take<float>(size);
    chosen_ = arena.take<int32_t>(size);
    candidate_ = arena.take<int32_t>(most_candidates_);
    select_scratch_ = arena.take<int32_t>(larger_of(kSelectBuckets + size, 3 * kSelectBuckets));
    inverse_ = arena.take<float>(block_.lanes());
    mean_ = selection.mass > 0 ? arena.take<float>(size) : nullptr;
    beside_ = selection.mass > 0 ? arena.take<float>(call.lanes()) : nullptr;
  }

  void run(const Task& task) {
    block_.begin(task);
    force();
    if (selection_.mass > 0)
      run_by_mass(task);
    else
      run_with_budget(task);
    block_.finish();
  }

 private:
  using Scope = typename Format::Product::Scope;

  static int64_t most_candidate_blocks(const Attention& call, const Selection& selection) {
    if (!(selection.mass > 0)) return selection.candidate_blocks;
    return selection.candidate_blocks + ceil_divide(selection.most_forced(call.query_block), selection.key_block);
  }

  // Candidates whose logits are held at once.
  int64_t rows(const Attention& call, const Selection& selection) const {
    if (!(selection.mass > 0)) return most_candidates_;
    return smaller(most_candidates_, larger_of(kRescored, selection.most_forced(call.query_block)));
  }

  void run_with_budget(const Task& task) {
    const int64_t candidates = rank_blocks(task);
    [[maybe_unused]] const Scope scope{};
    score(0, candidates);
    block_.exponentiate(block_.logits(), candidates, true);
    attend_to_chosen(rank_tokens(candidates));
  }

  // As few keys as hold the mass, of which each stage may leave out half of what may be left.
  void run_by_mass(const Task& task) {
    const int64_t size = selection_.key_block;
    const int64_t near_blocks = find_near();
    const int64_t near = add_blocks(chosen_, near_blocks, 0);
    {
      [[maybe_unused]] const Scope scope{};
      score(0, near);
    }
    block_.log_sum_exp(block_.logits(), near, inverse_);
    // In the terms of stage 1's estimates.
    const float* offsets = selection_.low_rank.offsets + (task.head * call_.blocks() + task.block) * call_.lanes();
    for (int64_t lane = 0; lane < block_.queries(); ++lane) {
      const int64_t whole = block_.whole_lane(lane);
      beside_[whole] = inverse_[lane] - offsets[whole] * call_.scale;
    }
    const int64_t others = rank_blocks_by_mass(task, near_blocks);
    const int64_t candidates = add_blocks(chosen_, others, near);
    [[maybe_unused]] const Scope scope{};
    if ((near_blocks + others) * size > kRescored) {
      block_.restart();
      block_.attend(candidate_, 0, candidates);
      return;
    }
    score(near, candidates);
    block_.exponentiate(block_.logits(), candidates, true);
    attend_to_chosen(rank_tokens_by_mass(candidates));
  }

  // Logits of the candidates [first, last), each in its row.
  void score(int64_t first, int64_t last) {
    for (int64_t start = first; start < last; start += kTileKeys) {
      const KeyTile tile = {candidate_ + start, 0, smaller(last - start, kTileKeys)};
      block_.score(tile, block_.logits() + start * block_.stride());
    }
  }

  // Attends to the candidates that chosen_ names.
  void attend_to_chosen(int64_t chosen) {
    keep(chosen);
    if (!enough_weight()) {
      // What was selected weighs next to nothing beside what was not: the weights have lost their precision.
      block_.restart();
      block_.attend(candidate_, 0, chosen);
    } else {
      for (int64_t start = 0; start < chosen; start += kTileKeys)
        block_.accumulate(block_.tile(candidate_, 0, chosen, start), block_.logits() + start * block_.stride());
    }
  }

  // What is always selected: positions [0, sink_end_) and [forced_start_, forced_end_).
  void force() {
    const int64_t size = selection_.key_block;
    sink_end_ = ceil_divide(selection_.sink, size) * size;
    forced_start_ = larger_of(block_.first() - selection_.local, 0) / size * size;
    const int64_t after = block_.first() + call_.query_block + selection_.local;
    forced_end_ = call_.causal ? block_.end() : smaller(after, block_.seen_length());
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
      const int64_t ranked = ranked_blocks();
      ranker_.run(task, ranked, importance_);
      for (int64_t block = 0; block < visible; ++block)
        if (block >= ranked || forced(block * size)) importance_[block] = kForced;
      select_largest(importance_, visible, count, chosen_, select_scratch_);
    } else {
      for (int64_t block = 0; block < count; ++block) chosen_[block] = static_cast<int32_t>(block);
    }
    return add_blocks(chosen_, count, 0);
  }

  // Puts the tokens of key blocks into candidate_, behind `candidates` that are there, and gives their number then.
  int64_t add_blocks(const int32_t* blocks, int64_t count, int64_t candidates) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = blocks[i] * selection_.key_block;
      for (int64_t position = start; position < smaller(start + selection_.key_block, block_.end()); ++position)
        candidate_[candidates++] = static_cast<int32_t>(position);
    }
    return candidates;
  }

  // Key blocks that every query sees whole, which are ranked; one at the edge of what is visible is forced.
  int64_t ranked_blocks() const {
    return (call_.causal ? forced_start_ : block_.seen_length()) / selection_.key_block;
  }

  // Fills chosen_ with the key blocks that are attended to anyway, and marks them in importance_. Gives their number.
  int64_t find_near() {
    const int64_t visible = ceil_divide(block_.end(), selection_.key_block), ranked = ranked_blocks();
    int64_t count = 0;
    for (int64_t block = 0; block < visible; ++block) {
      const bool near = block >= ranked || forced(block * selection_.key_block);
      importance_[block] = near ? kForced : 0.0f;
      if (near) chosen_[count++] = static_cast<int32_t>(block);
    }
    return count;
  }

  // Stage 1: fills chosen_ with the other key blocks whose tokens are candidates and gives their number.
  int64_t rank_blocks_by_mass(const Task& task, int64_t near) {
    const int64_t size = selection_.key_block, ranked = ranked_blocks();
    ranker_.weigh(task, ranked, beside_, mean_, importance_);
    // What is near is no longer a question.
    double sum = 0;
    int64_t others = 0;
    for (int64_t block = 0; block < ranked; ++block) {
      if (importance_[block] == kForced) {
        importance_[block] = kMasked;
        mean_[block] = 0.0f;
      } else {
        sum += mean_[block];
        ++others;
      }
    }
    const int64_t held = count_reaching(importance_, mean_, ranked, sum - selection_.left_out(), select_scratch_);
    const int64_t most = larger_of(selection_.budget / size - near, 0);
    const int64_t least = smaller(larger_of(selection_.least / size - near, 0), others);
    const int64_t count = larger_of(smaller(smaller(held, most), others), least);
    select_largest(importance_, ranked, count, chosen_, select_scratch_);
    return count;
  }

  // The factor that makes of each lane's exponentials its softmax weights among the candidates. Gives the number of
  // queries.
  int64_t find_inverses() {
    int64_t present = 0;
    for (int64_t lane = 0; lane < block_.lanes(); ++lane) {
      present += block_.present(lane);
      inverse_[lane] = block_.present(lane) && block_.weights()[lane] > 0 ? 1.0f / block_.weights()[lane] : 0.0f;
    }
    return present;
  }

  // Stage 2 by mass: the same as rank_tokens, of the fewest that hold it.
  int64_t rank_tokens_by_mass(int64_t candidates) {
    const int64_t present = find_inverses();
    double held_by_all = 0;
    int64_t always = 0;
    for (int64_t i = 0; i < candidates; ++i) {
      Floats all = {}, best = {};
      for (int64_t lane = 0; lane < block_.lanes(); lane += kLanes) {
        const Floats weight = load<Floats>(block_.logits() + i * block_.stride() + lane) * load<Floats>(inverse_ + lane);
        all += weight;
        best = larger(weight, best);
      }
      mean_[i] = sum(all) / static_cast<float>(present);
      held_by_all += mean_[i];
      const bool is_forced = forced(candidate_[i]);
      importance_[i] = is_forced ? kForced : mean_[i] * largest(best);
      always += is_forced;
    }
    const double target = held_by_all * (1.0 - selection_.left_out());
    const int64_t held = count_reaching(importance_, mean_, candidates, target, select_scratch_);
    const int64_t wanted = larger_of(larger_of(held, always), selection_.least);
    const int64_t count = smaller(smaller(wanted, selection_.budget), candidates);
    select_largest(importance_, candidates, count, chosen_, select_scratch_);
    return count;
  }

  // Stage 2: fills chosen_ with the indices of the candidates of the largest exact weight and gives their number.
  int64_t rank_tokens(int64_t candidates) {
    const int64_t count = smaller(selection_.budget, candidates);
    if (count == candidates) {
      for (int64_t i = 0; i < count; ++i) chosen_[i] = static_cast<int32_t>(i);
      return count;
    }
    find_inverses();
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
  float *importance_, *inverse_, *mean_;
  float* beside_;  // of each query, if the block has all of them: log-sum-exp of what is attended to anyway
  int32_t *chosen_, *candidate_, *select_scratch_;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
