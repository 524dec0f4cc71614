// The kernels of one instruction set, as a table of functions.
#pragma once

#include <stddef.h>

#include "attention/problem.h"
#include "linear/problem.h"

namespace iceformer {

// The kernels of one instruction set.
struct Kernels {
  // Bytes of scratch, aligned to 64, that a task of this call needs.
  size_t (*scratch_bytes)(const Attention&, const Selection*);
  void (*run)(const Attention&, const Task&, void* scratch);
  // The same two for a call of one query a head, and what makes a head's output of its parts.
  size_t (*decode_scratch_bytes)(const Attention&);
  void (*run_decode)(const Attention&, const DecodeTask&, void* scratch);
  void (*merge_parts)(const Attention&, int64_t head, float* parts, int64_t count);
  // Stage 1 of decoding: the same two for a part of a head's key blocks, and what makes weights of its logits.
  size_t (*scan_scratch_bytes)(const Attention&, const Choice&);
  void (*run_scan)(const Attention&, const Choice&, const ScanTask&, void* scratch);
  void (*average_weights)(float* logits, int64_t queries, int64_t stride, int64_t count, float* mean);
  // What few rows of input are before they are multiplied with int8: rounded.
  void (*round_rows)(const Linear&);
  // The same of some of many rows.
  void (*round_many_rows)(const Linear&, int64_t first, int64_t count);
  // The first two for a product with the weights of a linear layer.
  size_t (*linear_scratch_bytes)(const Linear&, const LinearTask&);
  void (*run_linear)(const Linear&, const LinearTask&, void* scratch);
};

}  // namespace iceformer
