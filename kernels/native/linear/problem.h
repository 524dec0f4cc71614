// A product with the weights of a linear layer, as plain data that every instruction set's kernels understand.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/inline.h"

namespace iceformer {

enum class WeightType { kFloat32, kBfloat16, kInt8, kInt4 };

// The int8 of a kernel lie as [panels, steps, kPanelOutputs, kPanelInputs], zeros behind the last output and input: what
// a task reads is one piece of memory, and the inputs that an instruction sums over are neighbours.
constexpr int64_t kPanelOutputs = 16, kPanelInputs = 4;

// Two int4 of a kernel, in two's complement: of input features i and, in the high bits, i + 2. Panels of them are
// [panels, steps, kPanelOutputs, kPanelInputs / 2], so that an instruction's sums are one output's each.
struct Int4Pair {
  uint8_t bits;
};

// Bytes of an output in a step.
constexpr int64_t output_bytes(WeightType type) { return type == WeightType::kInt4 ? kPanelInputs / 2 : kPanelInputs; }

// Input features whose products with int8 are summed as integers, at most.
constexpr int64_t kMostChunk = 256;

// The largest integers that rows may be rounded to: sums of a chunk stay below 2^31.
constexpr int64_t kMostLevels = 32767;

// output = input . (kernel * scale), each scale for a group of input features. Arrays are dense and row-major.
struct Linear {
  bool bfloat16;       // of input; else float32
  WeightType weights;  // of kernel
  bool transposed;     // whether kernel is [out_features, in_features]
  const void* input;   // [rows, in_features]
  const void* kernel;  // [in_features, out_features], or panels of int8 or int4
  const void* scale;   // [in_features / group, out_features] of float32, or bfloat16 with int4; null for 1
  int64_t group;       // input features: all, or a multiple of kGroupUnit
  float* output;       // [rows, out_features]
  int64_t rows, in_features, out_features;
  // At most kFewRows rows of input, rounded for panels: units * (high * 2^15 + low), a unit for each chunk.
  int16_t* parts;  // [rows, steps, 2, kPanelInputs], high and low
  float* units;    // [rows, chunks]
  // More rows: rounded to integers of at most `levels`, or multiplied as floats where that is 0. A chunk of all rows
  // lies together, [rows, inputs of the chunk], with zeros up to whole steps.
  int64_t levels;
  uint32_t* integers;

  ICEFORMER_INLINE bool in_panels() const { return weights == WeightType::kInt8 || weights == WeightType::kInt4; }
  ICEFORMER_INLINE int64_t steps() const { return (in_features + kPanelInputs - 1) / kPanelInputs; }
  ICEFORMER_INLINE int64_t chunks() const { return in_features / group * ((group + kMostChunk - 1) / kMostChunk); }
  // Where the chunk that begins with an input feature ends: none has features of two groups.
  ICEFORMER_INLINE int64_t chunk_end(int64_t first) const {
    const int64_t of_group = (first / group + 1) * group, most = first + kMostChunk;
    return of_group < most ? of_group : most;
  }
  // Room for the integers, of 16 bits each at most, and for the rows behind the last that tiles read.
  ICEFORMER_INLINE int64_t integer_words() const { return (rows * steps() * kPanelInputs + 16 * kMostChunk) / 2; }
  ICEFORMER_INLINE int16_t* row_parts(int64_t row) const { return parts + row * steps() * 2 * kPanelInputs; }
  ICEFORMER_INLINE float* row_units(int64_t row) const { return units + row * chunks(); }
};

// A rectangle of the output, or what the input features [first, first + depth) add to it.
struct LinearTask {
  int64_t row, rows, column, columns, first, depth;
  float* part;  // [rows, columns]; null where the task is all there is to add
};

// What the size of a group is a multiple of.
constexpr int64_t kGroupUnit = 8;

// Up to this many rows the kernel is read where it lies, and its reading is what takes the time. More rows multiply
// with panels of it that were converted to floats.
constexpr int64_t kFewRows = 4;

// Up to this many rows vectors multiply, also where there are tiles, of which they would fill less than half.
constexpr int64_t kWideRows = 8;

// The largest task of more rows, and of rows that are integers.
constexpr int64_t kLinearRows = 512, kLinearColumns = 256;
constexpr int64_t kIntegerRows = 256, kIntegerColumns = 64;

// Rows that a task rounds to integers.
constexpr int64_t kRoundedRows = 64;

}  // namespace iceformer
