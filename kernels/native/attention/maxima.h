// Stage 1's products: integer products of keys with the queries that rank them, of which each key block's largest stay.
#pragma once

#include "attention/problem.h"
#include "common/arena.h"
#include "common/pack_tiles.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Packed ranking queries: [depth][lanes], and what the sums of each lane begin with where keys are flipped.
struct RankingQueries {
  const uint32_t* words;
  const int32_t* start;
  int64_t lanes;
};

#if !defined(ICEFORMER_TILES)

#if ICEFORMER_LANES == 16
constexpr int kProductRows = 8, kProductVectors = 2;
#elif ICEFORMER_REGISTERS == 32
constexpr int kProductRows = 4, kProductVectors = 4;
#else
constexpr int kProductRows = 4, kProductVectors = 2;
#endif

// Ranking queries are padded to a multiple of this.
constexpr int64_t kMaximaLanes = kProductVectors * kLanes;

// Integer products of `R` keys with `V` vectors of queries; raises `best` to their largest.
template <int R, int V>
ICEFORMER_INLINE void raise_to_products(Left keys, Lanes queries, int64_t depth, const int32_t* start,
                                        Ints (&best)[V]) {
  Ints sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = load<Ints>(start + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Words lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = load<Words>(queries.words + k * queries.stride + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const auto word = Int8Product::broadcast(keys.words + r * keys.row + k * keys.step);
      for (int v = 0; v < V; ++v) sum[r][v] = Int8Product::add(sum[r][v], word, lanes[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) best[v] = larger(best[v], sum[r][v]);
}

// The products of one key block after the other.
class BlockMaxima {
 public:
  BlockMaxima(const Selection& selection, Arena& arena) : selection_(selection), depth_(selection.low_rank.rank / 4) {
    flipped_ = arena.take<uint32_t>(depth_ * selection.key_block);
  }

  // Words of a packed query.
  int64_t padded_depth() const { return depth_; }
  // Key blocks of one run.
  int64_t blocks() const { return 1; }
  // To be kept while products are made.
  NoScope scope() const { return {}; }

  // Writes the largest product of each lane with the keys of `count` key blocks: [count][lanes].
  void run(const HeadMemory& memory, int64_t block, int64_t, RankingQueries queries, int32_t* largest) {
    const int64_t size = selection_.key_block;
    const uint32_t* keys =
        reinterpret_cast<const uint32_t*>(selection_.low_rank.keys) + memory.place(block * size) * depth_;
    if (Int8Product::kFlip) {
      for (int64_t i = 0; i < size * depth_; ++i) flipped_[i] = keys[i] ^ Int8Product::kFlip;
      keys = flipped_;
    }
    for (int64_t lane = 0; lane < queries.lanes; lane += kMaximaLanes) {
      Ints best[kProductVectors];
      for (auto& vector : best) vector = fill_ints(INT32_MIN);
      const Lanes right = {queries.words + lane, queries.lanes};
      const int32_t* start = queries.start + lane;
      int64_t key = 0;
      for (; key + kProductRows <= size; key += kProductRows)
        raise_to_products<kProductRows>({keys + key * depth_, depth_, 1}, right, depth_, start, best);
      for (; key < size; ++key) raise_to_products<1>({keys + key * depth_, depth_, 1}, right, depth_, start, best);
      for (int v = 0; v < kProductVectors; ++v) store(largest + lane + v * kLanes, best[v]);
    }
  }

 private:
  const Selection& selection_;
  int64_t depth_;
  uint32_t* flipped_;
};

#else

constexpr int64_t kMaximaLanes = 2 * kTileSide;

// The same on tiles, which multiply signed bytes as they are.
class BlockMaxima {
 public:
  BlockMaxima(const Selection& selection, Arena& arena)
      : selection_(selection),
        depth_(selection.low_rank.rank / 4),
        step_(depth_ < kTileSide ? depth_ : kTileSide),
        blocks_(selection.key_block < kKeys ? kKeys / selection.key_block : 1) {
    const int64_t rows = round_up(blocks_ * selection.key_block, kTileSide);
    copy_ = arena.take<uint32_t>(rows * padded_depth());
    products_ = arena.take<int32_t>(rows * kMaximaLanes);
  }

  int64_t padded_depth() const { return round_up(depth_, step_); }
  int64_t blocks() const { return blocks_; }
  Tiles scope() const { return Tiles(step_); }

  // Writes the largest product of each lane with the keys of `count` key blocks: [count][lanes].
  void run(const HeadMemory& memory, int64_t block, int64_t count, RankingQueries queries, int32_t* largest) {
    const int64_t size = selection_.key_block;
    const Left left = keys(memory, block * size, count * size);
    for (int64_t lane = 0; lane < queries.lanes; lane += kMaximaLanes) {
      multiply_by_tiles<true>(count * size, kMaximaLanes, left, {queries.words + lane, queries.lanes}, depth_, step_,
                              products_, kMaximaLanes, false);
      for (int64_t i = 0; i < count; ++i)
        store_largest(products_ + i * size * kMaximaLanes, largest + i * queries.lanes + lane);
    }
  }

 private:
  // Keys of one run, at least: their tiles and products stay in the first cache. A divisor of every page.
  static constexpr int64_t kKeys = 64;

  // Keys as whole tiles: where they lie if the page holds that many, which may be of the next key blocks.
  Left keys(const HeadMemory& memory, int64_t first, int64_t count) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(selection_.low_rank.keys) + memory.place(first) * depth_;
    const int64_t rows = round_up(count, kTileSide), width = padded_depth();
    if (width == depth_ && rows <= memory.left_in_page(first)) return {from, depth_, 1};
    memset(copy_, 0, sizeof(uint32_t) * rows * width);
    for (int64_t i = 0; i < count; ++i) memcpy(copy_ + i * width, from + i * depth_, sizeof(uint32_t) * depth_);
    return {copy_, width, 1};
  }

  // The largest of each column of one key block's products.
  void store_largest(const int32_t* products, int32_t* largest) const {
    Ints low = load<Ints>(products), high = load<Ints>(products + kLanes);
    for (int64_t key = 1; key < selection_.key_block; ++key) {
      low = larger(low, load<Ints>(products + key * kMaximaLanes));
      high = larger(high, load<Ints>(products + key * kMaximaLanes + kLanes));
    }
    store(largest, low);
    store(largest + kLanes, high);
  }

  const Selection& selection_;
  int64_t depth_, step_, blocks_;
  uint32_t* copy_;
  int32_t* products_;
};

#endif

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
