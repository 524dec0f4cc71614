// What one call computes, as plain data that every instruction set's kernels understand.
//
// This header and those that kernels.cpp includes hold no standard library templates: kernels.cpp is compiled once for
// each instruction set, and a template instantiated there could be the copy that the linker keeps for everyone.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/inline.h"

namespace iceformer {

// The logit of a key that is not visible, and the log-sum-exp of a query that sees none: the lowest float32.
constexpr float kMasked = -3.4028234663852886e38f;

// Where the keys of one head of one row lie in an array of [pages, kv_heads, page, ...], counted in tokens.
struct HeadMemory {
  const int32_t* table;  // the row's pages; null where all of the row is one page
  int64_t base;          // of the head in the row's only page, or in page 0
  int64_t page, shift;   // tokens of a page; with a table a power of two, and which
  int64_t stride;        // from page to page: the tokens of all heads

  ICEFORMER_INLINE int64_t place(int64_t position) const {
    if (!table) return base + position;
    return table[position >> shift] * stride + base + (position & (page - 1));
  }
  // Tokens from a position to the end of its page.
  ICEFORMER_INLINE int64_t left_in_page(int64_t position) const {
    return page - (table ? position & (page - 1) : position);
  }
};

// softmax(query . key * scale) . value. Arrays are dense and row-major. The rows of the call need not be those of the
// memory: a row of the call has a slot, and a slot is a page, or several that the table names.
struct Attention {
  bool bfloat16;          // of query, output, and key and value if they are floats; else float32
  bool int8;              // of key and value, which have scales then
  const void* query;      // [rows, query_heads, queries, head_dim]
  const void* key;        // [pages, kv_heads, page, head_dim]
  const void* value;      // [pages, kv_heads, page, value_dim]
  const float* key_scale;    // [pages, kv_heads, page]: what a token's int8 are multiplied by; null without int8
  const float* value_scale;  // the same
  void* output;           // [rows, query_heads, queries, value_dim]
  float* lse;             // [rows, query_heads, queries]: log-sum-exp of the logits attended to
  const int32_t* slot;    // [rows]; -1 for an idle row, which reads nothing and whose output is 0
  const int32_t* offset;  // [rows]: absolute position of the first query
  const int32_t* length;  // [rows]: tokens of the row; later keys are not seen
  const int32_t* table;   // [slots, slot_pages]: the page of each run of tokens; null where a slot is one page
  int64_t rows, query_heads, kv_heads, queries, head_dim, value_dim;
  int64_t page, slot_pages;
  int64_t query_block;  // queries, in tokens, of one task
  int64_t window;       // a query sees the keys less than this many positions from its own; 0 for all
  bool causal;
  float scale;
  float softcap;  // 0 for none

  ICEFORMER_INLINE int64_t group() const { return query_heads / kv_heads; }
  ICEFORMER_INLINE int64_t lanes() const { return group() * query_block; }
  ICEFORMER_INLINE int64_t blocks() const { return (queries + query_block - 1) / query_block; }
  // Tokens that a slot may have.
  ICEFORMER_INLINE int64_t capacity() const { return page * slot_pages; }
  // Floats of a query's part in decoding: sums of values, their weight, the largest logit.
  ICEFORMER_INLINE int64_t part_width() const { return value_dim + 2; }
  ICEFORMER_INLINE int64_t row_length(int64_t row) const {
    if (slot[row] < 0) return 0;
    return length[row] < capacity() ? length[row] : capacity();
  }
  // The first position that no query of the call sees. Under the causal mask that is no later than the call's end, where
  // the queries that fill up the last block would see what memory held before.
  ICEFORMER_INLINE int64_t seen_length(int64_t row) const {
    const int64_t all = row_length(row), end = offset[row] + queries;
    return causal && end < all ? end : all;
  }
  // Of a head, counted through rows and KV heads, of a row that is not idle.
  ICEFORMER_INLINE HeadMemory memory(int64_t head) const {
    const int64_t of_row = slot[head / kv_heads], kv_head = head % kv_heads, stride = kv_heads * page;
    if (!table) return {nullptr, of_row * stride + kv_head * page, page, 0, stride};
    return {table + of_row * slot_pages, kv_head * page, page, __builtin_ctzll(page), stride};
  }
};

// What the ranker low_rank (attention/methods/low_rank.py) knows of keys and queries.
struct LowRank {
  const int8_t* keys;    // [pages, kv_heads, page, rank]: keys in the directions that stage 1 looks at
  const float* queries;  // [rows * kv_heads, blocks, lanes, rank]: the queries of each block, projected likewise
  const float* offsets;  // [rows * kv_heads, blocks, lanes]: what the products lack of each query's; null if not asked
  int64_t rank;
  int64_t ranking_queries;  // how many queries of a block rank key blocks: those of the largest norm
};

// How two-stage attention selects keys; fields as in TwoStage (attention/two_stage.py).
struct Selection {
  LowRank low_rank;
  int64_t budget, least, key_block, candidate_blocks, sink, local;
  float mass;  // 0 for a fixed budget

  // The share of the weight that each stage may leave out.
  ICEFORMER_INLINE double left_out() const { return (1.0 - static_cast<double>(mass)) / 2; }
  // Keys that are selected whatever they weigh, at most (`most_forced_keys`), and those of a block at the end of a row.
  ICEFORMER_INLINE int64_t most_forced(int64_t query_block) const {
    return sink + 2 * local + query_block + 4 * key_block;
  }
};

// One query block of one KV head (counted through rows), attended exactly where there is no selection.
struct Task {
  int64_t head, block;
  const Selection* selection;
};

// Some keys of one KV head (counted through rows), in a call of one query a head: those at the positions [first, last),
// or, of the tokens of some key blocks one after the other, those with these numbers.
struct DecodeTask {
  int64_t head, first, last;
  const int32_t* blocks;  // null for positions
  int64_t key_block;      // tokens of a key block, a power of two
  float* part;            // [group, part_width]: what comes of it
};

// How decoding chooses key blocks; fields as in DecodeSelection (attention/decode_selection.py).
struct Choice {
  LowRank low_rank;  // whose queries are [rows * kv_heads, group, rank]
  int64_t key_block, budget, sink, local, exact_keys;
  float mass;
};

// Key blocks of one head (counted through rows) whose logits are estimated.
struct ScanTask {
  int64_t head, first, count;
  float* logits;  // [group, stride], of the head
  int64_t stride;
};

// Keys of a task of decoding: enough work for a task, and at 8192 tokens eight tasks for each head.
constexpr int64_t kDecodeKeys = 1024;
// The same of chosen keys, of which there are few.
constexpr int64_t kDecodeChosenKeys = 256;

// Up to so many candidates stage 2 by mass looks at one by one (RESCORED in attention/selected_block.py).
constexpr int64_t kRescored = 2048;

// Writes the indices of the `count` largest of `values`, rising; of equal values the lower index wins. No NaN.
// `scratch` has room for kSelectBuckets + size integers.
constexpr int64_t kSelectBuckets = 2048;
void select_largest(const float* values, int64_t size, int64_t count, int32_t* indices, int32_t* scratch);

// How many of the largest `values` it takes for the sum of their `weights`, which are at most 1 together, to come within
// kSumSlack of `target`; all if it never does. Of equal values the lower index comes first. `scratch` has room for
// 3 * kSelectBuckets integers.
constexpr double kSumSlack = 1e-5;
int64_t count_reaching(const float* values, const float* weights, int64_t size, double target, int32_t* scratch);

}  // namespace iceformer
