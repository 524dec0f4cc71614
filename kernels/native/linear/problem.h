// A product with the weights of a linear layer, as plain data that every instruction set's kernels understand.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace iceformer {

enum class WeightType { kFloat32, kBfloat16, kInt8 };

// output = input . (kernel * scale), each scale for a group of input features. Arrays are dense and row-major.
struct Linear {
  bool bfloat16;       // of input; else float32
  WeightType weights;  // of kernel
  bool transposed;     // whether kernel is [out_features, in_features]
  const void* input;   // [rows, in_features]
  const void* kernel;  // [in_features, out_features]
  const float* scale;  // [in_features / group, out_features]; null for 1
  int64_t group;       // input features: all, or a multiple of kGroupUnit
  float* output;       // [rows, out_features]
  int64_t rows, in_features, out_features;
};

// A rectangle of the output, or what the input features [first, first + depth) add to it.
struct LinearTask {
  int64_t row, rows, column, columns, first, depth;
  float* part;  // [rows, columns]; null where the task is all there is to add
};

// Input features that are multiplied at a time where there are few rows.
constexpr int64_t kGroupUnit = 8;

// Up to this many rows the kernel is read where it lies, and its reading is what takes the time. More rows multiply
// with panels of it that were converted to floats.
constexpr int64_t kFewRows = 4;

// Up to this many rows vectors multiply, also where there are tiles, of which they would fill less than half.
constexpr int64_t kWideRows = 8;

// The largest task of more rows.
constexpr int64_t kLinearRows = 512, kLinearColumns = 256;

}  // namespace iceformer
