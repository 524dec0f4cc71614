// One query block in the making: its packed queries, and an online softmax over tiles of keys (FlashAttention's
// recurrence). Every array has the block's queries in its lanes, those that are there: a block at the end of a row or of
// the call may have few, and then takes less time.
#pragma once

#include "attention/problem.h"
#include "common/arena.h"
#include "common/pack_tiles.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Keys of one step: with 128 queries, keys, values and logits of a step stay near the core.
constexpr int64_t kTileKeys = 128;
// Where the running maximum begins: below every logit that is visible, above kMasked.
constexpr float kLowest = -1e30f;

// Up to kTileKeys keys: those at `positions`, or those that follow each other from position `first` on, in one page.
struct KeyTile {
  const int32_t* positions;
  int64_t first, count;

  int64_t position(int64_t index) const { return positions ? positions[index] : first + index; }
};

// Logits after a cap, 0 for none.
ICEFORMER_INLINE Floats cap(Floats logits, float softcap) {
  return softcap > 0 ? softcap * hyperbolic_tangent(logits * (1.0f / softcap)) : logits;
}

template <class Format>
class QueryBlock {
 public:
  using Element = typename Format::Element;
  using Product = typename Format::Product;

  // `logit_rows`: keys whose logits the caller wants to hold at once.
  QueryBlock(const Attention& call, Arena& arena, int64_t logit_rows)
      : call_(call),
        scale_waits_(call.scale > 0 && !(call.softcap > 0)),
        factor_(scale_waits_ ? call.scale : 1.0f),
        depth_(round_up(call.head_dim / Format::kPerWord, Product::kDepth)),
        total_rows_(round_up(call.value_dim, Product::kRows)) {
    static_assert(kTileKeys % Product::kRows == 0 && kTileKeys / Format::kPerWord % Product::kDepth == 0);
    take_lanes(call.query_block);
    const int64_t key_words = kTileKeys * depth_;
    const int64_t value_words = total_rows_ * (kTileKeys / Format::kPerWord);
    query_ = arena.take<uint32_t>(depth_ * lanes_);
    packed_ = arena.take<uint32_t>(key_words > value_words ? key_words : value_words);
    logits_ = arena.take<float>(round_up(logit_rows, Product::kRows) * stride_);
    total_ = arena.take<float>(total_rows_ * stride_);
    largest_ = arena.take<float>(lanes_);
    weight_ = arena.take<float>(lanes_);
    decay_ = arena.take<float>(lanes_);
    position_ = arena.take<int32_t>(lanes_);
    place_ = call.table ? arena.take<int32_t>(kTileKeys) : nullptr;
    const int64_t width = larger_of(call.head_dim, call.value_dim);
    floats_ = call.int8 ? arena.take<Element>(kTileKeys * width + kLanes) : nullptr;
  }

  // Starts a block: packs its queries and forgets what was attended to.
  void begin(const Task& task) {
    head_ = task.head;
    block_ = task.block;
    memory_ = call_.memory(head_);
    const int64_t row = head_ / call_.kv_heads;
    first_ = call_.offset[row] + block_ * call_.query_block;
    take_lanes(count_present());
    for (int64_t lane = 0; lane < lanes_; ++lane)
      position_[lane] = lane < queries_ ? static_cast<int32_t>(first_ + lane % members_) : -1;
    pack_queries();
    restart();
  }

  void restart() {
    memset(total_, 0, sizeof(float) * total_rows_ * stride_);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      largest_[lane] = kLowest;
      weight_[lane] = 0.0f;
    }
  }

  int64_t lanes() const { return lanes_; }
  int64_t queries() const { return queries_; }
  int64_t stride() const { return stride_; }
  int64_t first() const { return first_; }
  int64_t last() const { return first_ + members_ - 1; }
  int64_t seen_length() const { return call_.seen_length(head_ / call_.kv_heads); }
  // Where a lane would be if the block had all of its queries.
  int64_t whole_lane(int64_t lane) const { return lane / members_ * call_.query_block + lane % members_; }
  // Whether a lane is a query before the end of its row and of the call; others fill up the last vector.
  bool present(int64_t lane) const { return lane < queries_ && position_[lane] < seen_length(); }
  // A key before which no query of the block sees any, such that what is summed over keys is cut into whole tiles.
  int64_t start() const {
    constexpr int64_t kUnit = Format::kPerWord * Product::kDepth;
    const int64_t start = call_.window ? first_ - call_.window + 1 : 0;
    return start > 0 ? start / kUnit * kUnit : 0;
  }
  // The first key from which on no query of the block sees any.
  int64_t end() const {
    const int64_t length = seen_length();
    if (!call_.causal && !call_.window) return length;
    const int64_t end = last() + (call_.causal ? 1 : call_.window);
    return end < length ? end : length;
  }
  float* logits() { return logits_; }
  float* weights() { return weight_; }

  // Logits of the keys of one tile into rows of `logits`, capped and masked; raises the largest of each lane. They are
  // still to be multiplied by `factor_`, which is the scale if that waits.
  void score(KeyTile tile, float* logits) {
    const int64_t depth = call_.head_dim / Format::kPerWord, count = tile.count;
    const Rows<Element> keys = rows(call_.key, call_.key_scale, call_.head_dim, tile);
    multiply<typename Format::Product>(count, lanes_, Format::keys(keys, count, packed_), {query_, lanes_}, depth,
                                       logits, stride_, false);
    for (int64_t i = 0; i < count; ++i) {
      const Span seeing = queries_that_see(tile.position(i));
      const bool masked = seeing.first > first_ || seeing.last < last();
      if (masked || !scale_waits_) finish_logits(logits + i * stride_, seeing, masked);
    }
    int64_t lane = 0;
    for (; lane + 4 * kLanes <= lanes_; lane += 4 * kLanes) raise_largest<4>(logits, count, lane);
    for (; lane < lanes_; lane += kLanes) raise_largest<1>(logits, count, lane);
  }

  // Logits to softmax weights relative to the largest; adds them to each lane's weight if `add`.
  void exponentiate(float* logits, int64_t count, bool add) {
    int64_t lane = 0;
    for (; lane + 4 * kLanes <= lanes_; lane += 4 * kLanes) exponentiate_lanes<4>(logits, count, lane, add);
    for (; lane < lanes_; lane += kLanes) exponentiate_lanes<1>(logits, count, lane, add);
  }

  // The log-sum-exp of each lane over some rows of logits, none of which is above the lane's largest.
  void log_sum_exp(const float* logits, int64_t count, float* lse) const {
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
      const Floats largest = load<Floats>(largest_ + lane);
      Floats sum = {};
      for (int64_t i = 0; i < count; ++i)
        sum += exponential((load<Floats>(logits + i * stride_ + lane) - largest) * factor_);
      for (int64_t i = 0; i < kLanes; ++i)
        lse[lane + i] = sum[i] > 0 ? largest[i] * factor_ + __builtin_logf(sum[i]) : kMasked;
    }
  }

  // Adds values times weights; the weights are used up.
  void accumulate(KeyTile tile, float* weights) {
    const int64_t count = tile.count;
    const Left left = Format::values(rows(call_.value, call_.value_scale, call_.value_dim, tile), count, packed_);
    const Lanes right = Format::weights(weights, count, lanes_, stride_);
    const int64_t depth = (count + Format::kPerWord - 1) / Format::kPerWord;
    multiply<Product>(call_.value_dim, lanes_, left, right, depth, total_, stride_, true);
  }

  // The tile that begins `start` keys behind `first`, of `count` keys that follow each other or are at `positions`. Tiles
  // of keys that follow each other end where a page does.
  KeyTile tile(const int32_t* positions, int64_t first, int64_t count, int64_t start) const {
    const int64_t size = smaller(count - start, kTileKeys);
    if (positions) return {positions + start, 0, size};
    return {nullptr, first + start, smaller(size, memory_.left_in_page(first + start))};
  }

  // Exact attention to `count` keys, consecutive ones from `first` on or those at `positions`.
  void attend(const int32_t* positions, int64_t first, int64_t count) {
    for (int64_t start = 0; start < count;) {
      const KeyTile some = tile(positions, first, count, start);
      memcpy(decay_, largest_, sizeof(float) * lanes_);
      score(some, logits_);
      scale_total();
      exponentiate(logits_, some.count, true);
      accumulate(some, logits_);
      start += some.count;
    }
  }

  // Writes output and log-sum-exp of the block's queries; zeros and kMasked where nothing was visible, and for the queries
  // of the call that fill up the block.
  void finish() {
    Element* output = static_cast<Element*>(call_.output);
    for (int64_t lane = 0; lane < queries_; ++lane) {
      const int64_t index = query_index(lane / members_, lane % members_);
      const bool some = weight_[lane] > 0.0f;
      const float factor = some ? 1.0f / weight_[lane] : 0.0f;
      for (int64_t d = 0; d < call_.value_dim; ++d)
        Format::store_output(output + index * call_.value_dim + d, total_[d * stride_ + lane] * factor);
      call_.lse[index] = some ? largest_[lane] * factor_ + __builtin_logf(weight_[lane]) : kMasked;
    }
    const int64_t end = smaller(call_.query_block, call_.queries - block_ * call_.query_block);
    for (int64_t member = 0; member < call_.group() && members_ < end; ++member) {
      const int64_t first = query_index(member, members_), count = end - members_;
      memset(output + first * call_.value_dim, 0, sizeof(Element) * count * call_.value_dim);
      for (int64_t i = 0; i < count; ++i) call_.lse[first + i] = kMasked;
    }
  }

 private:
  // Gives `members` queries of each head of the group lanes of their own, side by side.
  void take_lanes(int64_t members) {
    members_ = members;
    queries_ = call_.group() * members;
    lanes_ = round_up(queries_, kLanes);
    // Rows of a power of two apart would share the same few sets of the cache.
    stride_ = lanes_ + (lanes_ / kLanes % 2 == 0 ? kLanes : 0);
  }

  // Queries of the block before the end of the call and, where they are of the row that has the keys, of the row.
  int64_t count_present() const {
    const int64_t of_call = smaller(call_.query_block, call_.queries - block_ * call_.query_block);
    if (!call_.causal && !call_.window) return of_call;
    return larger_of(smaller(of_call, seen_length() - first_), 1);
  }

  // Where a query of the block stands in arrays of [rows, query_heads, queries].
  int64_t query_index(int64_t member, int64_t number) const {
    const int64_t row = head_ / call_.kv_heads, query_head = head_ % call_.kv_heads * call_.group() + member;
    return (row * call_.query_heads + query_head) * call_.queries + block_ * call_.query_block + number;
  }

  // Positions of queries, both ends included.
  struct Span {
    int64_t first, last;
  };

  // The rows of keys or values of a tile, as floats.
  Rows<Element> rows(const void* array, const float* scale, int64_t width, KeyTile tile) {
    if (!call_.int8) return stored_rows(static_cast<const Element*>(array), width, tile);
    const Rows<int8_t> stored = stored_rows(static_cast<const int8_t*>(array), width, tile);
    const float* scales = scale + (stored.base - static_cast<const int8_t*>(array)) / width;
    for (int64_t i = 0; i < tile.count; ++i) {
      stored.prefetch(i + kPrefetchRows, tile.count);
      const int8_t* from = stored.row(i);
      const Floats factor = fill(scales[stored.place(i)]);
      for (int64_t d = 0; d < width; d += kLanes) narrow(widen(from + d, width - d) * factor, floats_ + i * width + d);
    }
    return {floats_, width, nullptr};
  }

  // The same as they lie in memory.
  template <class Stored>
  Rows<Stored> stored_rows(const Stored* base, int64_t width, KeyTile tile) {
    if (!tile.positions) return {base + memory_.place(tile.first) * width, width, nullptr};
    if (!memory_.table) return {base + memory_.base * width, width, tile.positions};
    for (int64_t i = 0; i < tile.count; ++i) place_[i] = static_cast<int32_t>(memory_.place(tile.positions[i]));
    return {base, width, place_};
  }

  // Those of the block's queries that see a key, by the masks of positions.
  Span queries_that_see(int64_t position) const {
    Span span = {call_.causal ? position : first_, last()};
    if (!call_.window) return span;
    const int64_t first = position - call_.window + 1, last = position + call_.window - 1;
    if (!call_.causal && first > span.first) span.first = first;
    if (last < span.last) span.last = last;
    return span;
  }

  // Scales a key's logits, unless that waits, caps them and, if `masked`, masks the queries that do not see it.
  void finish_logits(float* logits, Span seeing, bool masked) {
    const Ints first = fill_ints(static_cast<int32_t>(seeing.first));
    const Ints last = fill_ints(static_cast<int32_t>(seeing.last));
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
      Floats logit = load<Floats>(logits + lane);
      if (!scale_waits_) logit *= call_.scale;
      logit = cap(logit, call_.softcap);
      const Ints position = load<Ints>(position_ + lane);
      if (masked) logit = (position >= first) & (position <= last) ? logit : fill(kMasked);
      store(logits + lane, logit);
    }
  }

  // `V` vectors of lanes at a time, so that a row is read in long pieces.
  template <int V>
  void raise_largest(const float* logits, int64_t count, int64_t lane) {
    Floats largest[V];
    for (int v = 0; v < V; ++v) largest[v] = load<Floats>(largest_ + lane + v * kLanes);
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < V; ++v)
        largest[v] = larger(largest[v], load<Floats>(logits + i * stride_ + lane + v * kLanes));
    for (int v = 0; v < V; ++v) store(largest_ + lane + v * kLanes, largest[v]);
  }

  template <int V>
  void exponentiate_lanes(float* logits, int64_t count, int64_t lane, bool add) {
    Floats largest[V], sum[V];
    for (int v = 0; v < V; ++v) {
      largest[v] = load<Floats>(largest_ + lane + v * kLanes);
      sum[v] = Floats{};
    }
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < V; ++v) {
        float* at = logits + i * stride_ + lane + v * kLanes;
        const Floats weight = exponential((load<Floats>(at) - largest[v]) * factor_);
        store(at, weight);
        sum[v] += weight;
      }
    for (int v = 0; add && v < V; ++v) {
      float* at = weight_ + lane + v * kLanes;
      store(at, load<Floats>(at) + sum[v]);
    }
  }

  void pack_queries() {
    const int64_t depth = call_.head_dim / Format::kPerWord;
    const Element* query = static_cast<const Element*>(call_.query);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      if (lane >= queries_) {
        for (int64_t k = 0; k < depth; ++k) query_[k * lanes_ + lane] = 0;
        continue;
      }
      const Element* from = query + query_index(lane / members_, lane % members_) * call_.head_dim;
      for (int64_t k = 0; k < depth; ++k) query_[k * lanes_ + lane] = Format::word(from + k * Format::kPerWord);
    }
    memset(query_ + depth * lanes_, 0, sizeof(uint32_t) * (depth_ - depth) * lanes_);
  }

  // Brings what was summed under an earlier largest logit, kept in decay_, to the present one.
  void scale_total() {
    bool changed = false;
    for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
      const Floats before = load<Floats>(decay_ + lane), now = load<Floats>(largest_ + lane);
      const Floats decay = exponential((before - now) * factor_);
      store(decay_ + lane, decay);
      store(weight_ + lane, load<Floats>(weight_ + lane) * decay);
      for (int64_t i = 0; i < kLanes; ++i) changed |= decay[i] != 1.0f;
    }
    if (!changed) return;
    for (int64_t d = 0; d < call_.value_dim; ++d)
      for (int64_t lane = 0; lane < lanes_; lane += kLanes) {
        float* at = total_ + d * stride_ + lane;
        store(at, load<Floats>(at) * load<Floats>(decay_ + lane));
      }
  }

  const Attention& call_;
  // A scale above 0 keeps the order of the logits, so that it can wait for the exponential; not where a cap comes after
  // it. `factor_` is what the exponential then multiplies by.
  bool scale_waits_;
  float factor_;
  int64_t members_ = 0, queries_ = 0, lanes_ = 0, stride_ = 0;  // queries of a head, of the group; lanes, and of a row
  int64_t depth_, total_rows_;  // words of a packed query or key, and rows of total_: whole tiles
  int64_t head_ = 0, block_ = 0, first_ = 0;
  HeadMemory memory_ = {};
  uint32_t *query_, *packed_;
  float *logits_, *total_, *largest_, *weight_, *decay_;
  int32_t *position_, *place_;
  Element* floats_;  // of a tile of int8
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
