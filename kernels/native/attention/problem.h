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

// softmax(query . key * scale) . value. Arrays are dense and row-major, [batch, heads, tokens, width].
struct Attention {
  bool bfloat16;           // of query, key, value and output; else float32
  const void* query;       // [batch, query_heads, queries, head_dim]
  const void* key;         // [batch, kv_heads, keys, head_dim]
  const void* value;       // [batch, kv_heads, keys, value_dim]
  void* output;            // [batch, query_heads, queries, value_dim]
  float* lse;              // [batch, query_heads, queries]: log-sum-exp of the logits attended to
  const int32_t* offset;   // [batch]: absolute position of the first query
  const int32_t* lengths;  // [batch]: tokens of the row; later keys are not seen
  int64_t batch, query_heads, kv_heads, queries, keys, head_dim, value_dim;
  int64_t query_block;  // queries, in tokens, of one task
  int64_t window;       // a query sees the keys less than this many positions from its own; 0 for all
  bool causal;
  float scale;
  float softcap;  // 0 for none

  ICEFORMER_INLINE int64_t group() const { return query_heads / kv_heads; }
  ICEFORMER_INLINE int64_t rows() const { return group() * query_block; }
  ICEFORMER_INLINE int64_t blocks() const { return (queries + query_block - 1) / query_block; }
  ICEFORMER_INLINE int64_t length(int64_t row) const { return lengths[row] < keys ? lengths[row] : keys; }
  // The first position that no query of the call sees. Under the causal mask that is no later than the call's end, where
  // the queries that fill up the last block would see what memory held before.
  ICEFORMER_INLINE int64_t seen_length(int64_t row) const {
    const int64_t all = length(row), end = offset[row] + queries;
    return causal && end < all ? end : all;
  }
};

// How two-stage attention selects keys; fields as in TwoStage (attention/config.py).
struct Selection {
  const int8_t* projected;  // [batch, kv_heads, keys, rank]: keys in the directions that stage 1 looks at
  const float*
      projected_queries;  // [batch * kv_heads, blocks, rows, rank]: the queries of each block, projected likewise
  int64_t rank;
  int64_t ranking_queries;  // how many queries of a block rank key blocks: those of the largest norm
  int64_t budget, key_block, candidate_blocks, sink, local;
};

// One query block of one KV head (counted through batch rows), attended exactly where there is no selection.
struct Task {
  int64_t head, block;
  const Selection* selection;
};

// Writes the indices of the `count` largest of `values`, rising; of equal values the lower index wins. No NaN.
// `scratch` has room for kSelectBuckets + size integers.
constexpr int64_t kSelectBuckets = 2048;
void select_largest(const float* values, int64_t size, int64_t count, int32_t* indices, int32_t* scratch);

}  // namespace iceformer
