// The kernels of one instruction set: this file is compiled once for each, with ICEFORMER_ISA naming it and the
// compiler's flags allowing its instructions.

#include "kernels.h"

#include "attention/maxima.h"
#include "attention/softmax.h"
#include "linear/int8_linear.h"

namespace iceformer {
namespace ICEFORMER_ISA {
namespace {

// The importance of what is always selected.
constexpr float kForced = 3.4028234663852886e38f;

ICEFORMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ICEFORMER_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
ICEFORMER_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Stage 1 of one query block: which key blocks its tokens are worth a second look.
class Ranking {
 public:
  Ranking(const Attention& call, const Selection& selection, Arena& arena)
      : call_(call),
        selection_(selection),
        depth_(selection.rank / 4),
        lanes_(round_up(selection.ranking_queries, kMaximaLanes)),
        maxima_(call, selection, arena) {
    const int64_t blocks = ceil_divide(call.keys, selection.key_block);
    query_ = arena.take<uint32_t>(maxima_.padded_depth() * lanes_);
    norm_ = arena.take<float>(call.rows());
    row_ = arena.take<int32_t>(call.rows());
    select_scratch_ = arena.take<int32_t>(kSelectBuckets + call.rows());
    start_ = arena.take<int32_t>(lanes_);
    scale_ = arena.take<float>(lanes_);
    normaliser_ = arena.take<float>(lanes_);
    logits_ = arena.take<float>(blocks * lanes_);
  }

  // Writes the importance of the first `count` key blocks: the log of the largest estimated softmax weight that a query
  // gives to one of its keys.
  void run(const Task& task, int64_t count, float* importance) {
    pack_queries(task);
    for (int64_t lane = 0; lane < lanes_; ++lane) normaliser_[lane] = kLowest;
    score(task, count);
    normalise(count);
    for (int64_t block = 0; block < count; ++block) {
      Floats best = fill(kMasked);
      for (int64_t lane = 0; lane < lanes_; lane += kLanes)
        best = larger(load<Floats>(logits_ + block * lanes_ + lane) - load<Floats>(normaliser_ + lane), best);
      importance[block] = largest(best);
    }
  }

 private:
  // Takes the queries of the largest norm and rounds each relative to its largest component. Those that only fill up
  // the block take no part.
  void pack_queries(const Task& task) {
    const int64_t rows = call_.rows(), rank = selection_.rank, row_of_call = task.head / call_.kv_heads;
    const int64_t left = call_.seen_length(row_of_call) - call_.offset[row_of_call] - task.block * call_.query_block;
    const int64_t present = smaller(left, call_.query_block);
    count_ = smaller(selection_.ranking_queries, call_.group() * present);
    const float* queries = selection_.projected_queries + (task.head * call_.blocks() + task.block) * rows * rank;
    for (int64_t row = 0; row < rows; ++row) {
      float sum = 0.0f;
      for (int64_t d = 0; d < rank; ++d) sum += queries[row * rank + d] * queries[row * rank + d];
      norm_[row] = row % call_.query_block < present ? sum : -1.0f;
    }
    select_largest(norm_, rows, count_, row_, select_scratch_);
    memset(query_, 0, sizeof(uint32_t) * maxima_.padded_depth() * lanes_);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      start_[lane] = 0;
      scale_[lane] = 0.0f;
      if (lane < count_) pack_query(queries + row_[lane] * rank, lane);
    }
  }

  void pack_query(const float* query, int64_t lane) {
    float largest = 0.0f;
    for (int64_t d = 0; d < selection_.rank; ++d) {
      const float magnitude = __builtin_fabsf(query[d]);
      if (magnitude > largest) largest = magnitude;
    }
    const float unit = (largest > 0.0f ? largest : 1.0f) / 127.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < depth_; ++k) {
      uint32_t word = 0;
      for (int64_t byte = 0; byte < 4; ++byte) {
        const int32_t rounded = static_cast<int32_t>(__builtin_rintf(query[4 * k + byte] / unit));
        sum += rounded;
        word |= (static_cast<uint32_t>(rounded) & 0xffu) << (8 * byte);
      }
      query_[k * lanes_ + lane] = word;
    }
    start_[lane] = Int8Product::kStart * sum;
    scale_[lane] = unit * call_.scale;
  }

  // The largest logit of each query in each of the first `count` key blocks.
  void score(const Task& task, int64_t count) {
    [[maybe_unused]] const auto scope = maxima_.scope();
    const RankingQueries queries = {query_, start_, lanes_};
    for (int64_t block = 0; block < count; block += maxima_.blocks()) {
      const int64_t some = smaller(maxima_.blocks(), count - block);
      float* logits = logits_ + block * lanes_;
      maxima_.run(task.head, block, some, queries, reinterpret_cast<int32_t*>(logits));
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

  const Attention& call_;
  const Selection& selection_;
  int64_t depth_, lanes_;
  int64_t count_ = 0;  // of the queries that rank
  BlockMaxima maxima_;
  uint32_t* query_;
  int32_t *start_, *row_, *select_scratch_;
  float *norm_, *scale_, *normaliser_, *logits_;
};

// Two-stage attention of one query block (attention/two_stage.py is the reference).
template <class Format>
class TwoStage {
 public:
  TwoStage(const Attention& call, const Selection& selection, Arena& arena)
      : call_(call),
        selection_(selection),
        most_candidates_(smaller(selection.candidate_blocks, ceil_divide(call.keys, selection.key_block)) *
                         selection.key_block),
        block_(call, arena, larger_of(most_candidates_, kTileKeys)),
        ranking_(call, selection, arena) {
    const int64_t blocks = ceil_divide(call.keys, selection.key_block);
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
      block_.score(block_.keys(candidate_ + start, 0), smaller(kTileKeys, candidates - start),
                   block_.logits() + start * block_.stride());
    block_.exponentiate(block_.logits(), candidates, true);
    const int64_t chosen = rank_tokens(candidates);
    keep(chosen);
    if (!enough_weight()) {
      // What was selected weighs next to nothing beside what was not: the weights have lost their precision.
      block_.restart();
      block_.attend(candidate_, 0, chosen);
    } else {
      for (int64_t start = 0; start < chosen; start += kTileKeys)
        block_.accumulate(block_.values(candidate_ + start, 0), smaller(kTileKeys, chosen - start),
                          block_.logits() + start * block_.stride());
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
      ranking_.run(task, ranked, importance_);
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
    for (int64_t lane = 0; lane < block_.rows(); ++lane)
      if (block_.present(lane) && block_.weights()[lane] < 1e-20f) return false;
    return true;
  }

  const Attention& call_;
  const Selection& selection_;
  int64_t most_candidates_;
  QueryBlock<Format> block_;
  Ranking ranking_;
  int64_t sink_end_ = 0, forced_start_ = 0, forced_end_ = 0;
  float *importance_, *inverse_;
  int32_t *chosen_, *candidate_, *select_scratch_;
};

template <class Format>
size_t scratch_bytes_of(const Attention& call, const Selection* selection) {
  Arena arena(nullptr);
  if (selection)
    TwoStage<Format>(call, *selection, arena);
  else
    QueryBlock<Format>(call, arena, kTileKeys);
  return arena.used();
}

template <class Format>
void run_task(const Attention& call, const Task& task, void* scratch) {
  Arena arena(scratch);
  if (task.selection) return TwoStage<Format>(call, *task.selection, arena).run(task);
  QueryBlock<Format> block(call, arena, kTileKeys);
  [[maybe_unused]] const typename Format::Product::Scope scope{};
  block.begin(task);
  block.attend(nullptr, block.start(), block.end() - block.start());
  block.finish();
}

size_t scratch_bytes(const Attention& call, const Selection* selection) {
  return call.bfloat16 ? scratch_bytes_of<Bfloat16>(call, selection) : scratch_bytes_of<Float32>(call, selection);
}

void run(const Attention& call, const Task& task, void* scratch) {
  return call.bfloat16 ? run_task<Bfloat16>(call, task, scratch) : run_task<Float32>(call, task, scratch);
}

size_t linear_scratch_bytes(const Linear& call, const LinearTask& task) {
  Arena arena(nullptr);
  visit_linear(call, task, arena, [](auto&&) {});
  return arena.used();
}

void run_linear(const Linear& call, const LinearTask& task, void* scratch) {
  Arena arena(scratch);
  visit_linear(call, task, arena, [](auto&& work) { work.run(); });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {scratch_bytes, run, linear_scratch_bytes, run_linear};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
