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
  // The same two for a product with a kernel of int8.
  size_t (*linear_scratch_bytes)(const Linear&, const LinearTask&);
  void (*run_linear)(const Linear&, const LinearTask&, void* scratch);
};

}  // namespace iceformer
