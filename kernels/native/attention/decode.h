// Exact attention of one query a head, as every decoding step asks for: keys and values are streamed once, as they lie.
// The keys of a row are cut into parts of a fixed size, so that all threads work on one row and the result does not
// depend on how many there are (flash-decoding, Dao et al. 2023); parts are merged by their log-sum-exp.
#pragma once

#include "attention/softmax.h"
#include "common/rows.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// How decoding multiplies keys: pairs of bfloat16 where the processor has a product of them, floats elsewhere.
#if defined(ICEFORMER_BFLOAT16_DOT)
using DecodeBfloat16 = Bfloat16Pairs;
#else
using DecodeBfloat16 = Bfloat16;
#endif

// Where the keys of a tile lie, counted in tokens: one behind the other, or anywhere.
struct Run {
  int64_t first;
  ICEFORMER_INLINE int64_t operator[](int64_t i) const { return first + i; }
};
struct Scattered {
  const int32_t* places;
  ICEFORMER_INLINE int64_t operator[](int64_t i) const { return places[i]; }
};

// The rows from number `first` on of those at some places; behind number `last`, that row again.
template <class Stored>
ICEFORMER_INLINE void find_rows(Run run, const Stored* base, int64_t width, int64_t first, int64_t last,
                                const Stored* (&rows)[kLanes]) {
  const Stored* row = base + run[first] * width;
  for (int64_t i = 0; i < kLanes; ++i) {
    rows[i] = row;
    row += first + i < last ? width : 0;
  }
}
template <class Stored>
ICEFORMER_INLINE void find_rows(Scattered at, const Stored* base, int64_t width, int64_t first, int64_t last,
                                const Stored* (&rows)[kLanes]) {
  for (int64_t i = 0; i < kLanes; ++i) rows[i] = base + at[smaller(first + i, last)] * width;
}

// Asks the memory for rows [first, last) of those at some places, each of `bytes`.
ICEFORMER_INLINE void prefetch_bytes(const char* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}
ICEFORMER_INLINE void prefetch_rows(const char* base, Run run, int64_t first, int64_t last, int64_t bytes) {
  prefetch_bytes(base + run[first] * bytes, (last - first) * bytes);
}
ICEFORMER_INLINE void prefetch_rows(const char* base, Scattered rows, int64_t first, int64_t last, int64_t bytes) {
  for (int64_t i = first; i < last; ++i) prefetch_bytes(base + rows[i] * bytes, bytes);
}

// Keys and values in memory as the queries are.
template <class Format>
struct FloatMemory {
  using Stored = typename Format::Element;
  using Product = typename Format::Product;
  static constexpr bool kScaled = false;
  static constexpr int64_t kPerWord = Format::kPerWord;

  static ICEFORMER_INLINE uint32_t query_word(const Stored* from) { return Format::word(from); }
  // A vector of a key's words, as they lie or widened.
  static ICEFORMER_INLINE Words words(const Stored* from) {
    if constexpr (sizeof(Stored) * kPerWord == sizeof(uint32_t))
      return load<Words>(from);
    else
      return (Words)widen(from);
  }
};

// Keys and values of int8, with a scale for each token.
template <class Format>
struct Int8Memory : WideRows<int8_t> {
  static constexpr bool kScaled = true;

  static ICEFORMER_INLINE uint32_t query_word(const float* from) { return load<uint32_t>(from); }
  static ICEFORMER_INLINE uint32_t query_word(const Bfloat16Bits* from) { return uint32_t{from->bits} << 16; }
};

// The two products of decoding, in floats: of queries with keys, and of weights with values.
template <class Format, class Memory>
class FloatProducts {
 public:
  using Element = typename Format::Element;
  using Stored = typename Memory::Stored;
  static constexpr bool kScaled = Memory::kScaled;

  FloatProducts(const Attention& call, Arena& arena)
      : call_(call),
        key_words_(round_up(call.head_dim / Memory::kPerWord, kLanes)),
        value_width_(round_up(call.value_dim, kLanes)) {
    query_ = arena.take<uint32_t>(call.group() * key_words_);
    total_ = arena.take<float>(call.group() * value_width_);
  }

  void begin(const Element* queries) {
    memset(query_, 0, sizeof(uint32_t) * call_.group() * key_words_);
    memset(total_, 0, sizeof(float) * call_.group() * value_width_);
    for (int64_t query = 0; query < call_.group(); ++query)
      for (int64_t word = 0; word < call_.head_dim / Memory::kPerWord; ++word)
        query_[query * key_words_ + word] =
            Memory::query_word(queries + query * call_.head_dim + word * Memory::kPerWord);
  }

  // Products of kLanes keys with `Q` queries from `query` on.
  template <int Q>
  ICEFORMER_INLINE void score(const Stored* const* keys, int64_t query, Floats (&products)[Q]) const {
    multiply_rows<Memory, Q>(keys, call_.head_dim, query_ + query * key_words_, key_words_, products);
  }

  // Adds `count` values times weights [Q, kTileKeys] to the sums of `Q` queries.
  template <int Q, class Places>
  void accumulate(Places places, int64_t count, int64_t query, const float* weights) {
    int64_t d = 0;
    for (; d + kColumns * kLanes <= call_.value_dim; d += kColumns * kLanes)
      accumulate_columns<Q, kColumns>(places, count, query, weights, d);
    for (; d < call_.value_dim; d += kLanes) accumulate_columns<Q, 1>(places, count, query, weights, d);
  }

  void scale_total(int64_t query, float factor) {
    float* total = total_ + query * value_width_;
    for (int64_t d = 0; d < value_width_; d += kLanes) store(total + d, load<Floats>(total + d) * factor);
  }
  void write_total(int64_t query, float* to) const {
    memcpy(to, total_ + query * value_width_, sizeof(float) * call_.value_dim);
  }

 private:
  // Vectors of a value that stay in registers.
  static constexpr int kColumns = ICEFORMER_REGISTERS == 32 ? 4 : 2;

  template <int Q, int C, class Places>
  void accumulate_columns(Places places, int64_t count, int64_t query, const float* weights, int64_t d) {
    Floats sums[Q][C];
    for (int q = 0; q < Q; ++q)
      for (int c = 0; c < C; ++c) sums[q][c] = load<Floats>(total_ + (query + q) * value_width_ + d + c * kLanes);
    const int64_t left = call_.value_dim - d;
    for (int64_t key = 0; key < count; ++key) {
      const Stored* from = static_cast<const Stored*>(call_.value) + places[key] * call_.value_dim + d;
      Floats some[C];
      for (int c = 0; c < C; ++c) some[c] = C == 1 ? widen(from, left) : widen(from + c * kLanes);
      for (int q = 0; q < Q; ++q)
        for (int c = 0; c < C; ++c) sums[q][c] += some[c] * weights[q * kTileKeys + key];
    }
    for (int q = 0; q < Q; ++q)
      for (int c = 0; c < C; ++c) store(total_ + (query + q) * value_width_ + d + c * kLanes, sums[q][c]);
  }

  const Attention& call_;
  int64_t key_words_, value_width_;
  uint32_t* query_;
  float* total_;
};

// One part of the keys of one head, for all queries that share it.
template <class Products>
class DecodePart {
 public:
  using Element = typename Products::Element;
  using Stored = typename Products::Stored;

  DecodePart(const Attention& call, Arena& arena) : call_(call), products_(call, arena) {
    logits_ = arena.take<float>(kQueries * kTileKeys);
    largest_ = arena.take<float>(call.group());
    weight_ = arena.take<float>(call.group());
    for (Tile& tile : tiles_)
      tile = {arena.take<int32_t>(kTileKeys), arena.take<float>(kTileKeys + kLanes),
              arena.take<float>(kTileKeys + kLanes), 0, 0};
  }

  // Writes, for each query of the group, `value_dim` sums of values, the weight that they were summed with, and the
  // largest logit, to which weights are relative.
  void run(const DecodeTask& task) {
    memory_ = call_.memory(task.head);
    begin(task.head);
    int64_t start = task.first;
    Tile *now = &tiles_[0], *next = &tiles_[1];
    for (start += place_tile(task, start, *now); now->count; start += now->count) {
      place_tile(task, start, *next);
      for (int64_t query = 0; query < call_.group(); query += kQueries) {
        const int64_t queries = smaller(call_.group() - query, kQueries);
        task.blocks ? attend_some<Scattered>(*now, *next, query, queries)
                    : attend_some<Run>(*now, *next, query, queries);
      }
      Tile* done = now;
      now = next;
      next = done;
    }
    for (int64_t query = 0; query < call_.group(); ++query) {
      float* part = task.part + query * call_.part_width();
      products_.write_total(query, part);
      part[call_.value_dim] = weight_[query];
      part[call_.value_dim + 1] = largest_[query];
    }
  }

 private:
  // Queries that share what is loaded of keys and values.
  static constexpr int kQueries = 4;

  void begin(int64_t head) {
    const int64_t group = call_.group(), row = head / call_.kv_heads, first = head % call_.kv_heads * group;
    products_.begin(static_cast<const Element*>(call_.query) + (row * call_.query_heads + first) * call_.head_dim);
    for (int64_t query = 0; query < group; ++query) {
      largest_[query] = kLowest;
      weight_[query] = 0.0f;
    }
  }

  // Up to kTileKeys keys: where they lie, a run of them or each by itself, and what keys and values are multiplied by.
  struct Tile {
    int32_t* place;
    float *key_scale, *value_scale;
    int64_t count, first;

    void places(Run& run) const { run = {first}; }
    void places(Scattered& scattered) const { scattered = {place}; }
  };

  // The keys from number `start` on; gives their number.
  int64_t place_tile(const DecodeTask& task, int64_t start, Tile& tile) {
    tile.count = smaller(task.last - start, kTileKeys);
    if (task.blocks)
      place_blocks(task, start, tile);
    else if (tile.count > 0)
      place_run(start, tile);
    return tile.count;
  }

  void place_blocks(const DecodeTask& task, int64_t start, Tile& tile) {
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t number = start + i, block = task.blocks[number / task.key_block];
      tile.place[i] = static_cast<int32_t>(memory_.place(block * task.key_block + number % task.key_block));
    }
    for (int64_t i = 0; Products::kScaled && i < round_up(tile.count, kLanes); ++i) {
      tile.key_scale[i] = i < tile.count ? call_.key_scale[tile.place[i]] : 0.0f;
      tile.value_scale[i] = i < tile.count ? call_.value_scale[tile.place[i]] : 0.0f;
    }
  }

  // Up to the end of the page.
  void place_run(int64_t start, Tile& tile) {
    tile.count = smaller(tile.count, memory_.left_in_page(start));
    tile.first = memory_.place(start);
    if (!Products::kScaled) return;
    const int64_t whole = tile.count / kLanes * kLanes;
    memset(tile.key_scale + whole, 0, sizeof(float) * kLanes);
    memset(tile.value_scale + whole, 0, sizeof(float) * kLanes);
    memcpy(tile.key_scale, call_.key_scale + tile.first, sizeof(float) * tile.count);
    memcpy(tile.value_scale, call_.value_scale + tile.first, sizeof(float) * tile.count);
  }

  // Asks the memory for keys or values of a tile, [first, last) of them. A processor has room for a few dozen such requests
  // and lets everything wait while it is full: so values are asked for while keys are multiplied, and the next tile's keys
  // while exponentials are taken, a few at a time.
  template <class Places>
  ICEFORMER_INLINE void prefetch_keys(const Tile& tile, int64_t first, int64_t last) const {
    prefetch<Places>(call_.key, call_.head_dim, tile, first, last);
  }
  template <class Places>
  ICEFORMER_INLINE void prefetch_values(const Tile& tile, int64_t first, int64_t last) const {
    prefetch<Places>(call_.value, call_.value_dim, tile, first, last);
  }
  template <class Places>
  ICEFORMER_INLINE static void prefetch(const void* base, int64_t width, const Tile& tile, int64_t first,
                                        int64_t last) {
    Places places;
    tile.places(places);
    const int64_t end = smaller(last, tile.count);
    if (first < end) prefetch_rows(static_cast<const char*>(base), places, first, end, width * sizeof(Stored));
  }

  template <class Places>
  void attend_some(const Tile& tile, const Tile& next, int64_t query, int64_t queries) {
    if (queries == 4) return attend<4, Places>(tile, next, query);
    if (queries == 3) return attend<3, Places>(tile, next, query);
    if (queries == 2) return attend<2, Places>(tile, next, query);
    attend<1, Places>(tile, next, query);
  }

  // Attends `Q` queries from `query` on to the keys of a tile.
  template <int Q, class Places>
  void attend(const Tile& tile, const Tile& next, int64_t query) {
    Places places;
    tile.places(places);
    const Stored* base = static_cast<const Stored*>(call_.key);
    for (int64_t key = 0; key < tile.count; key += kLanes) {
      if (query == 0) prefetch_values<Places>(tile, key, key + kLanes);
      // Behind the last key, that key again.
      const Stored* keys[kLanes];
      find_rows(places, base, call_.head_dim, key, tile.count - 1, keys);
      Floats products[Q];
      products_.template score<Q>(keys, query, products);
      for (int q = 0; q < Q; ++q) store(logits_ + q * kTileKeys + key, products[q]);
    }
    for (int q = 0; q < Q; ++q) exponentiate<Q, Places>(logits_ + q * kTileKeys, tile, next, query, q);
    products_.template accumulate<Q>(places, tile.count, query, logits_);
  }

  // Products of one query to softmax weights, relative to the largest logit so far, times the values' scales; what was
  // summed before follows. Behind the last key weights are 0.
  template <int Q, class Places>
  void exponentiate(float* logits, const Tile& tile, const Tile& next, int64_t first, int q) {
    const int64_t query = first + q;
    const int64_t count = tile.count, end = round_up(count, kLanes);
    Floats best = fill(largest_[query]);
    for (int64_t key = 0; key < end; key += kLanes) {
      Floats logit = load<Floats>(logits + key) * call_.scale;
      if (Products::kScaled) logit *= load<Floats>(tile.key_scale + key);
      logit = cap(logit, call_.softcap);
      if (count - key < kLanes) logit = lane_numbers() < fill_ints(static_cast<int32_t>(count - key)) ? logit : fill(kMasked);
      store(logits + key, logit);
      best = larger(best, logit);
    }
    const float now = largest(best);
    Floats weights = {};
    for (int64_t key = 0; key < end; key += kLanes) {
      if (first == 0) prefetch_keys<Places>(next, key + kLanes * q / Q, key + kLanes * (q + 1) / Q);
      Floats weight = exponential(load<Floats>(logits + key) - now);
      weights += weight;
      if (Products::kScaled) weight *= load<Floats>(tile.value_scale + key);
      store(logits + key, weight);
    }
    if (now > largest_[query]) {
      const float decay = exponential(fill(largest_[query] - now))[0];
      products_.scale_total(query, decay);
      weight_[query] *= decay;
      largest_[query] = now;
    }
    weight_[query] += sum(weights);
  }

  const Attention& call_;
  Products products_;
  HeadMemory memory_ = {};
  Tile tiles_[2];
  float *logits_, *largest_, *weight_;
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
