// The XLA custom call for products with a kernel of int8.

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/tasks.h"

namespace ffi = xla::ffi;

namespace iceformer {
namespace {

using Matrix = ffi::Buffer<ffi::DataType::F32, 2>;
using Scales = ffi::Buffer<ffi::DataType::F32, 1>;
using Int8Matrix = ffi::Buffer<ffi::DataType::S8, 2>;

// Columns of a task of few rows: every thread has one, whose results stay in the nearest cache.
constexpr int64_t kLeastColumns = 256, kMostColumns = 2048;

std::vector<LinearTask> cut(const Linear& call, int64_t threads) {
  int64_t columns = kLinearColumns;
  if (call.rows <= kFewRows) {
    const int64_t share = (call.out_features / threads + kLeastColumns) / kLeastColumns * kLeastColumns;
    columns = std::min(share, kMostColumns);
  }
  std::vector<LinearTask> tasks;
  for (int64_t row = 0; row < call.rows; row += kLinearRows)
    for (int64_t column = 0; column < call.out_features; column += columns)
      tasks.push_back(
          {row, std::min(kLinearRows, call.rows - row), column, std::min(columns, call.out_features - column)});
  return tasks;
}

ffi::Error int8_linear(ffi::ThreadPool pool, ffi::AnyBuffer input, Int8Matrix kernel, Scales scale,
                       ffi::Result<Matrix> output) {
  const auto type = input.element_type();
  if (type != ffi::DataType::F32 && type != ffi::DataType::BF16)
    return ffi::Error::InvalidArgument("input: expected float32 or bfloat16");
  const auto in = input.dimensions(), weights = kernel.dimensions(), out = output->dimensions();
  if (in.size() != 2 || in[1] != weights[0] || scale.dimensions()[0] != weights[1] || out[0] != in[0] ||
      out[1] != weights[1])
    return ffi::Error::InvalidArgument(
        "expected input [rows, in_features], kernel [in_features, out_features], scale [out_features]");
  const Linear call = {type == ffi::DataType::BF16,
                       input.untyped_data(),
                       kernel.typed_data(),
                       scale.typed_data(),
                       output->typed_data(),
                       in[0],
                       weights[0],
                       weights[1]};
  const std::vector<LinearTask> tasks = cut(call, pool.num_threads());
  const Kernels& chosen = kernels();
  return run_tasks(
      pool, "int8 product", static_cast<int64_t>(tasks.size()),
      [&](int64_t i) { return chosen.linear_scratch_bytes(call, tasks[i]); },
      [&](int64_t i, void* memory) { chosen.run_linear(call, tasks[i], memory); });
}

}  // namespace
}  // namespace iceformer

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(iceformer_int8_linear, iceformer::int8_linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<iceformer::Int8Matrix>()
                                  .Arg<iceformer::Scales>()
                                  .Ret<iceformer::Matrix>());

#pragma GCC visibility pop
