// The XLA custom call for products with the weights of linear layers.

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "common/tasks.h"

namespace ffi = xla::ffi;

namespace iceformer {
namespace {

using Matrix = ffi::Buffer<ffi::DataType::F32, 2>;

// Columns of a task of few rows at most, whose results stay in the nearest cache.
constexpr int64_t kMostColumns = 2048;
// Of few rows: bytes of the kernel that are a task's, about, and tasks that add to one result, at most. The number of
// tasks depends on the kernel alone, so that the sums do not depend on the number of threads.
constexpr int64_t kTaskBytes = 128 * 1024, kMostParts = 16;
// The same of panels, whose tasks have a result each.
constexpr int64_t kPanelTaskBytes = 32 * 1024;
// Outputs of a task where the kernel is transposed, at least: a few cache lines.
constexpr int64_t kLeastOutputs = 64;

// One kernel's product in the making.
struct Product {
  Linear call;
  std::vector<LinearTask> tasks;
  std::vector<float> parts;  // [parts, rows, out_features], a task's columns together; empty where there is one part
  int64_t count = 1;         // of the parts
  // Of few rows times panels: the input rounded.
  std::vector<int16_t> rounded;
  std::vector<float> units;
};

// Of weights that are floats.
int64_t weight_bytes(const Linear& call) { return call.weights == WeightType::kBfloat16 ? 2 : 4; }

void cut_many_rows(Product& product) {
  const Linear& call = product.call;
  const int64_t rows = call.levels ? kIntegerRows : kLinearRows;
  const int64_t columns = call.levels ? kIntegerColumns : kLinearColumns;
  for (int64_t row = 0; row < call.rows; row += rows)
    for (int64_t column = 0; column < call.out_features; column += columns)
      product.tasks.push_back({row, std::min(rows, call.rows - row), column,
                               std::min(columns, call.out_features - column), 0, call.in_features, nullptr});
}

// The rows of an input rounded to integers, for all kernels whose groups are of one size.
struct RoundedRows {
  Linear call;
  std::unique_ptr<uint32_t[]> integers;  // not filled with zeros, which would take time
  std::unique_ptr<float[]> units;
};

// Finds the rows as this call takes them among those of others, or has them made.
void share_rounded_rows(Linear& call, std::vector<RoundedRows>& all) {
  auto found = std::find_if(all.begin(), all.end(), [&](const auto& rows) { return rows.call.group == call.group; });
  if (found == all.end()) {
    RoundedRows rows = {call, std::unique_ptr<uint32_t[]>(new uint32_t[call.integer_words()]),
                        std::unique_ptr<float[]>(new float[call.rows * call.chunks()])};
    rows.call.integers = rows.integers.get();
    rows.call.units = rows.units.get();
    found = all.insert(all.end(), std::move(rows));
  }
  call.integers = found->call.integers;
  call.units = found->call.units;
}

void round_all(ffi::ThreadPool pool, const std::vector<RoundedRows>& all) {
  for (const RoundedRows& rows : all) {
    const int64_t tasks = (rows.call.rows + kRoundedRows - 1) / kRoundedRows;
    parallel_for(pool, tasks, [&](int64_t i) {
      const int64_t first = i * kRoundedRows;
      kernels().round_many_rows(rows.call, first, std::min(kRoundedRows, rows.call.rows - first));
    });
  }
}

void cut_transposed(Product& product) {
  const Linear& call = product.call;
  const int64_t row_bytes = std::max<int64_t>(call.in_features * weight_bytes(call), 1);
  const int64_t outputs = std::max(kTaskBytes / row_bytes / kLeastOutputs * kLeastOutputs, kLeastOutputs);
  for (int64_t row = 0; row < call.rows; row += kFewRows)
    for (int64_t column = 0; column < call.out_features; column += outputs)
      product.tasks.push_back({row, std::min(kFewRows, call.rows - row), column,
                               std::min(outputs, call.out_features - column), 0, call.in_features, nullptr});
}

void cut_panels(Product& product) {
  Linear& call = product.call;
  const int64_t panel_bytes = std::max<int64_t>(call.steps() * output_bytes(call.weights) * kPanelOutputs, 1);
  const int64_t columns = std::max<int64_t>(kPanelTaskBytes / panel_bytes, 1) * kPanelOutputs;
  for (int64_t column = 0; column < call.out_features; column += columns)
    product.tasks.push_back(
        {0, call.rows, column, std::min(columns, call.out_features - column), 0, call.in_features, nullptr});
  // Whole vectors are written, hence some room behind the last.
  product.rounded.resize(call.rows * call.steps() * 2 * kPanelInputs + 32);
  product.units.resize(call.rows * call.chunks());
  call.parts = product.rounded.data();
  call.units = product.units.data();
  kernels().round_rows(call);
}

// Rows of the kernel follow each other in memory, so that a task takes some of them whole.
void cut_few_rows(Product& product) {
  const Linear& call = product.call;
  const int64_t columns = std::min(call.out_features, kMostColumns);
  const int64_t bytes = call.in_features * columns * weight_bytes(call);
  int64_t parts = std::min((bytes + kTaskBytes - 1) / kTaskBytes, kMostParts);
  if (parts > 1) parts += parts % 2;
  const int64_t depth = std::max<int64_t>((call.in_features / std::max<int64_t>(parts, 1) + 7) / 8 * 8, 8);
  product.count = std::max<int64_t>((call.in_features + depth - 1) / depth, 1);
  if (product.count > 1) product.parts.resize(product.count * call.rows * call.out_features);
  for (int64_t part = 0; part < product.count; ++part)
    for (int64_t column = 0; column < call.out_features; column += columns) {
      float* sums = product.parts.data() + (part * call.out_features + column) * call.rows;
      product.tasks.push_back({0, call.rows, column, std::min(columns, call.out_features - column), part * depth,
                               std::min(depth, call.in_features - part * depth), product.count > 1 ? sums : nullptr});
    }
}

// Adds up the parts.
void merge(const Product& product) {
  const Linear& call = product.call;
  if (product.count == 1) return;
  for (const LinearTask& task : product.tasks) {
    if (task.first) break;
    for (int64_t row = 0; row < call.rows; ++row) {
      float* to = call.output + row * call.out_features + task.column;
      const float* from = task.part + row * task.columns;
      std::copy(from, from + task.columns, to);
      for (int64_t part = 1; part < product.count; ++part) {
        const float* more = from + part * call.rows * call.out_features;
        for (int64_t i = 0; i < task.columns; ++i) to[i] += more[i];
      }
    }
  }
}

ffi::Error refused(const char* reason) { return ffi::Error::InvalidArgument(reason); }

WeightType weight_type(ffi::DataType stored) {
  return stored == ffi::DataType::U8     ? WeightType::kInt4
         : stored == ffi::DataType::S8   ? WeightType::kInt8
         : stored == ffi::DataType::BF16 ? WeightType::kBfloat16
                                         : WeightType::kFloat32;
}

bool are_panels(ffi::AnyBuffer kernel, const Linear& call) {
  const auto found = kernel.dimensions();
  return found.size() == 4 && found[0] == (call.out_features + kPanelOutputs - 1) / kPanelOutputs &&
         found[1] == call.steps() && found[2] == kPanelOutputs && found[3] == output_bytes(call.weights);
}

// The product of the input with a kernel, whose scales are not known yet.
ffi::Error describe(ffi::AnyBuffer input, ffi::AnyBuffer kernel, Matrix output, bool transposed, Linear& call) {
  const auto in = input.dimensions(), weights = kernel.dimensions(), out = output.dimensions();
  const auto type = input.element_type(), stored = kernel.element_type();
  if (in.size() != 2 || out[0] != in[0]) return refused("expected input [rows, in_features]");
  if (type != ffi::DataType::F32 && type != ffi::DataType::BF16)
    return refused("input: expected float32 or bfloat16");
  if (stored != ffi::DataType::F32 && stored != ffi::DataType::BF16 && stored != ffi::DataType::S8 &&
      stored != ffi::DataType::U8)
    return refused("kernel: expected float32, bfloat16, int8 or uint8");
  call = {type == ffi::DataType::BF16,
          weight_type(stored),
          transposed,
          input.untyped_data(),
          kernel.untyped_data(),
          nullptr,
          std::max<int64_t>(in[1], 1),
          output.typed_data(),
          in[0],
          in[1],
          out[1],
          nullptr,
          nullptr,
          0,
          nullptr};
  if (call.in_panels() && !are_panels(kernel, call))
    return refused(
        "expected kernel [out_features / 16, in_features / 4, 16, 4] of int8, or [out_features / 16, in_features / 4, "
        "16, 2] of uint8");
  if (!call.in_panels() && (weights.size() != 2 || in[1] != weights[transposed] || out[1] != weights[!transposed]))
    return refused("expected kernel [in_features, out_features]");
  if (in[0] > kFewRows && (transposed || stored == ffi::DataType::F32))
    return refused("expected at most 4 rows with a kernel that is transposed or float32");
  if (transposed && call.in_panels()) return refused("expected no int8 or uint8 in a kernel that is transposed");
  return ffi::Error::Success();
}

ffi::Error scale(Linear& call, ffi::AnyBuffer scales) {
  const auto size = scales.dimensions();
  if (size.size() != 2 || size[1] != call.out_features || size[0] < 1 || call.in_features % size[0])
    return refused("expected scales [groups of input features, out_features]");
  const auto expected = call.weights == WeightType::kInt4 ? ffi::DataType::BF16 : ffi::DataType::F32;
  if (scales.element_type() != expected) return refused("scales: expected float32 with int8, bfloat16 with uint8");
  call.scale = scales.untyped_data();
  call.group = std::max<int64_t>(call.in_features / size[0], 1);
  if (size[0] > 1 && call.group % kGroupUnit) return refused("expected groups of a multiple of 8 input features");
  return ffi::Error::Success();
}

void cut(Product& product) {
  const Linear& call = product.call;
  if (call.rows == 0) return;
  if (call.transposed) return cut_transposed(product);
  if (call.rows > kFewRows) return cut_many_rows(product);
  call.in_panels() ? cut_panels(product) : cut_few_rows(product);
}

// Products of one input with several kernels. Behind the input stand a kernel for each result, then the scales of those
// that are in panels. With int8, more than kFewRows rows are rounded to integers of at most `levels`, if it is not 0.
ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer input, ffi::RemainingArgs arrays, ffi::RemainingRets outputs,
                  bool transposed, int64_t levels) {
  const size_t count = outputs.size();
  if (levels < 0 || levels > kMostLevels) return refused("expected levels from 0 to 32767");
  if (count < 1 || arrays.size() < count) return refused("expected a kernel for each result");
  std::vector<Product> products(count);  // whose tasks point into them
  std::vector<RoundedRows> rounded;
  size_t used = count;
  for (size_t i = 0; i < count; ++i) {
    auto kernel = arrays.get<ffi::AnyBuffer>(i);
    auto output = outputs.get<Matrix>(i);
    if (kernel.has_error()) return kernel.error();
    if (output.has_error()) return output.error();
    Linear& call = products[i].call;
    ffi::Error error = describe(input, *kernel, **output, transposed, call);
    if (error.success() && call.in_panels()) {
      auto scales = arrays.get<ffi::AnyBuffer>(used++);
      if (scales.has_error()) return scales.error();
      error = scale(call, *scales);
      if (levels && call.weights == WeightType::kInt4) return refused("expected levels of 0 with uint8");
      if (error.success() && levels && call.rows > kFewRows) {
        call.levels = levels;
        share_rounded_rows(call, rounded);
      }
    }
    if (error.failure()) return error;
    cut(products[i]);
  }
  if (used != arrays.size()) return refused("expected scales for the kernels that are int8 or uint8, and no others");
  std::vector<std::pair<const Linear*, const LinearTask*>> tasks;
  for (const Product& product : products)
    for (const LinearTask& task : product.tasks) tasks.push_back({&product.call, &task});
  round_all(pool, rounded);
  const Kernels& chosen = kernels();
  const ffi::Error error = run_tasks(
      pool, "linear product", static_cast<int64_t>(tasks.size()),
      [&](int64_t i) { return chosen.linear_scratch_bytes(*tasks[i].first, *tasks[i].second); },
      [&](int64_t i, void* memory) { chosen.run_linear(*tasks[i].first, *tasks[i].second, memory); });
  for (const Product& product : products) merge(product);
  return error;
}

}  // namespace
}  // namespace iceformer

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(iceformer_linear, iceformer::linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("levels"));

#pragma GCC visibility pop
