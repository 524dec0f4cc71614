// The XLA custom calls: check shapes, cut the work into tasks, run them on XLA's threads.

#include <string.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace ffi = xla::ffi;

namespace iceformer {
namespace {

thread_local Scratch scratch;

using Vector = ffi::Buffer<ffi::DataType::S32, 1>;
using Bytes = ffi::Buffer<ffi::DataType::S8, 4>;
using Queries = ffi::Buffer<ffi::DataType::F32, 4>;
using Floats = ffi::Buffer<ffi::DataType::F32, 3>;

struct Operands {
  ffi::AnyBuffer query, key, value;
  Vector offset, lengths;
};

struct Options {
  int64_t query_block, window;
  bool causal;
  float scale, softcap;
};

template <class Buffer>
bool has_shape(Buffer buffer, std::vector<int64_t> shape) {
  const auto found = buffer.dimensions();
  return std::equal(found.begin(), found.end(), shape.begin(), shape.end());
}

// The call's arrays and sizes, or an error that names the array that does not fit.
ffi::ErrorOr<Attention> describe(const Operands& in, const Options& options, ffi::AnyBuffer output, Floats lse) {
  const auto query = in.query.dimensions(), key = in.key.dimensions(), value = in.value.dimensions();
  const auto type = in.query.element_type();
  if (type != ffi::DataType::F32 && type != ffi::DataType::BF16)
    return ffi::Unexpected(ffi::Error::InvalidArgument("query: expected float32 or bfloat16"));
  if (in.key.element_type() != type || in.value.element_type() != type || output.element_type() != type)
    return ffi::Unexpected(ffi::Error::InvalidArgument("key, value, output: expected the type of query"));
  if (query.size() != 4 || key.size() != 4 || value.size() != 4)
    return ffi::Unexpected(ffi::Error::InvalidArgument("query, key, value: expected four axes"));
  Attention call = {};
  call.bfloat16 = type == ffi::DataType::BF16;
  call.batch = query[0];
  call.query_heads = query[1];
  call.queries = query[2];
  call.head_dim = query[3];
  call.kv_heads = key[1];
  call.keys = key[2];
  call.value_dim = value[3];
  const bool fits = has_shape(in.key, {call.batch, call.kv_heads, call.keys, call.head_dim}) &&
                    has_shape(in.value, {call.batch, call.kv_heads, call.keys, call.value_dim}) &&
                    has_shape(output, {call.batch, call.query_heads, call.queries, call.value_dim}) &&
                    has_shape(lse, {call.batch, call.query_heads, call.queries}) &&
                    has_shape(in.offset, {call.batch}) && has_shape(in.lengths, {call.batch});
  if (!fits || call.kv_heads < 1 || call.query_heads % call.kv_heads || call.head_dim % 2)
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "expected query [batch, query_heads, queries, head_dim], key and value [batch, kv_heads, keys, width], an even "
        "head_dim and query_heads a multiple of kv_heads"));
  call.query = in.query.untyped_data();
  call.key = in.key.untyped_data();
  call.value = in.value.untyped_data();
  call.output = output.untyped_data();
  call.lse = lse.typed_data();
  call.offset = in.offset.typed_data();
  call.lengths = in.lengths.typed_data();
  call.query_block = options.query_block;
  call.window = options.window;
  call.causal = options.causal;
  call.scale = options.scale;
  call.softcap = options.softcap;
  return call;
}

bool between(int64_t least, int64_t value) { return value >= least && value <= INT32_MAX; }

int64_t clip(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

// Query blocks of a row that hold a query before the row's length.
int64_t valid_blocks(const Attention& call, int64_t row) {
  const int64_t left = call.length(row) - call.offset[row];
  return clip((left + call.query_block - 1) / call.query_block, 0, call.blocks());
}

// Writes what a block of padding has for output.
void clear(const Attention& call, int64_t head, int64_t first_block) {
  const int64_t start = first_block * call.query_block, width = call.value_dim * (call.bfloat16 ? 2 : 4);
  if (start >= call.queries) return;
  for (int64_t member = 0; member < call.group(); ++member) {
    const int64_t first = (head * call.group() + member) * call.queries + start, count = call.queries - start;
    memset(static_cast<char*>(call.output) + first * width, 0, count * width);
    for (int64_t i = 0; i < count; ++i) call.lse[first + i] = kMasked;
  }
}

ffi::Error run(ffi::ThreadPool pool, const Attention& call, const Selection* selection,
               const std::vector<Task>& tasks) {
  const Kernels& chosen = kernels();
  const size_t bytes = chosen.scratch_bytes(call, nullptr);
  const size_t selected_bytes = selection ? chosen.scratch_bytes(call, selection) : 0;
  std::atomic<bool> out_of_memory{false};
  parallel_for(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    void* memory = scratch.get(std::max(bytes, selected_bytes));
    if (memory)
      chosen.run(call, tasks[i], memory);
    else
      out_of_memory = true;
  });
  if (out_of_memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention: out of memory");
  return ffi::Error::Success();
}

ffi::Error exact(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value, Vector offset,
                 Vector lengths, ffi::Result<ffi::AnyBuffer> output, ffi::Result<Floats> lse, int64_t query_block,
                 int64_t window, bool causal, float scale, float softcap) {
  auto described =
      describe({query, key, value, offset, lengths}, {query_block, window, causal, scale, softcap}, *output, *lse);
  if (described.has_error()) return described.error();
  if (!between(1, query_block) || !between(0, window))
    return ffi::Error::InvalidArgument("query_block: expected 1 to 2^31 - 1; window: 0 to 2^31 - 1");
  const Attention& call = *described;
  std::vector<Task> tasks;
  for (int64_t head = 0; head < call.batch * call.kv_heads; ++head) {
    // With neither mask queries may belong to another sequence than the keys, so all of them count.
    const int64_t count = causal || window ? valid_blocks(call, head / call.kv_heads) : call.blocks();
    // Later blocks see more keys: the longest tasks go first.
    for (int64_t block = count - 1; block >= 0; --block) tasks.push_back({head, block, nullptr});
    clear(call, head, count);
  }
  return run(pool, call, nullptr, tasks);
}

ffi::Error two_stage(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                     Bytes projected, Queries projected_queries, Vector offset, Vector lengths,
                     ffi::Result<ffi::AnyBuffer> output, ffi::Result<Floats> lse, int64_t query_block, bool causal,
                     float scale, float softcap, int64_t budget, int64_t key_block, int64_t candidate_blocks,
                     int64_t sink, int64_t local, int64_t exact_keys, bool exact_last_block, int64_t ranking_queries) {
  auto described =
      describe({query, key, value, offset, lengths}, {query_block, 0, causal, scale, softcap}, *output, *lse);
  if (described.has_error()) return described.error();
  if (!between(1, query_block) || !between(1, key_block) || !between(1, budget) || !between(1, candidate_blocks) ||
      !between(0, sink) || !between(0, local) || !between(0, exact_keys))
    return ffi::Error::InvalidArgument(
        "query_block, key_block, budget, candidate_blocks: expected 1 to 2^31 - 1; sink, local, exact_keys: 0 to "
        "2^31 - 1");
  const Attention& call = *described;
  const int64_t heads = call.batch * call.kv_heads, blocks = call.blocks();
  const int64_t rank = projected.dimensions()[3];
  if (!has_shape(projected, {call.batch, call.kv_heads, call.keys, rank}) || rank < 4 || rank % 4 ||
      !has_shape(projected_queries, {heads, blocks, call.rows(), rank}) || call.keys % key_block ||
      ranking_queries < 1 || ranking_queries > call.rows())
    return ffi::Error::InvalidArgument(
        "expected projected [batch, kv_heads, keys, rank], projected_queries [heads, blocks, rows, rank], rank a "
        "positive multiple of 4, keys one of key_block, and 1 to all of the rows as ranking_queries");
  const Selection selection = {projected.typed_data(),
                               projected_queries.typed_data(),
                               rank,
                               ranking_queries,
                               budget,
                               key_block,
                               candidate_blocks,
                               sink,
                               local};
  std::vector<Task> exact_tasks, tasks;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t row = head / call.kv_heads, length = call.length(row), start = call.offset[row];
    const int64_t count = valid_blocks(call, row);
    const int64_t few_keys = causal ? clip((exact_keys - start) / query_block, 0, count) : 0;
    const int64_t first = length <= exact_keys ? count : few_keys;
    // A quotient below 0 may round either way: it is clipped.
    const int64_t tail = length - query_block - start;
    const int64_t last = exact_last_block ? clip(tail < 0 ? 0 : tail / query_block, 0, count) : count;
    for (int64_t block = count - 1; block >= 0; --block) {
      const bool selected = block >= first && block < last;
      (selected ? tasks : exact_tasks).push_back({head, block, selected ? &selection : nullptr});
    }
    clear(call, head, count);
  }
  // Exact blocks over many keys take longest and go first.
  exact_tasks.insert(exact_tasks.end(), tasks.begin(), tasks.end());
  return run(pool, call, &selection, exact_tasks);
}

}  // namespace
}  // namespace iceformer

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(iceformer_exact, iceformer::exact,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<iceformer::Floats>()
                                  .Attr<int64_t>("query_block")
                                  .Attr<int64_t>("window")
                                  .Attr<bool>("causal")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(iceformer_two_stage, iceformer::two_stage,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<iceformer::Bytes>()
                                  .Arg<iceformer::Queries>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<iceformer::Floats>()
                                  .Attr<int64_t>("query_block")
                                  .Attr<bool>("causal")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("budget")
                                  .Attr<int64_t>("key_block")
                                  .Attr<int64_t>("candidate_blocks")
                                  .Attr<int64_t>("sink")
                                  .Attr<int64_t>("local")
                                  .Attr<int64_t>("exact_keys")
                                  .Attr<bool>("exact_last_block")
                                  .Attr<int64_t>("ranking_queries"));

#pragma GCC visibility pop
