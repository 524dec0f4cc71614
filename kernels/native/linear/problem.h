// A product with a kernel of int8, as plain data that every instruction set's kernels understand.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace iceformer {

// output = (input . kernel) * scale. Arrays are dense and row-major.
struct Linear {
  bool bfloat16;         // of input; else float32
  const void* input;     // [rows, in_features]
  const int8_t* kernel;  // [in_features, out_features]
  const float* scale;    // [out_features]
  float* output;         // [rows, out_features]
  int64_t rows, in_features, out_features;
};

// A rectangle of the output.
struct LinearTask {
  int64_t row, rows, column, columns;
};

// Up to this many rows the kernel is read where it lies, and its reading is what takes the time. More rows multiply
// with panels of it that were converted to floats.
constexpr int64_t kFewRows = 4;

// Up to this many rows vectors multiply, also where there are tiles, of which they would fill less than half.
constexpr int64_t kWideRows = 8;

// The largest task of more rows.
constexpr int64_t kLinearRows = 512, kLinearColumns = 256;

}  // namespace iceformer
