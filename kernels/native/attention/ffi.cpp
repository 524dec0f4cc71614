// The XLA custom calls: check shapes, cut the work into tasks, run them on XLA's threads.

#include <string.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/tasks.h"

namespace ffi = xla::ffi;

namespace iceformer {
namespace {

using Vector = ffi::Buffer<ffi::DataType::S32, 1>;
using Integers = ffi::Buffer<ffi::DataType::S32, 2>;
using Bytes = ffi::Buffer<ffi::DataType::S8, 4>;
using Queries = ffi::Buffer<ffi::DataType::F32, 4>;
using Floats = ffi::Buffer<ffi::DataType::F32, 3>;

// Pages are cut into runs of keys, the longest of kTileKeys, and no run may cross from page to page.
constexpr int64_t kLeastPage = 128;

struct Operands {
  ffi::AnyBuffer query, key, value;
  Floats key_scale, value_scale;  // empty unless key and value are int8
  Vector slot, offset, length;
  Integers table;
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

// Takes the table of pages, none where it is empty, and sees to it that no row reads outside of the `pages` that there are.
ffi::Error find_pages(Attention& call, Integers table, int64_t pages) {
  const int64_t slot_pages = table.dimensions()[1];
  const bool paged = table.element_count() > 0;
  call.table = paged ? table.typed_data() : nullptr;
  call.slot_pages = paged ? slot_pages : 1;
  if (paged && (call.page < kLeastPage || call.page & (call.page - 1) || pages * call.kv_heads * call.page > INT32_MAX))
    return ffi::Error::InvalidArgument(
        "expected pages of a power of two of at least 128 tokens, and fewer than 2^31 tokens of all heads");
  const int64_t slots = paged ? table.dimensions()[0] : pages;
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t slot = call.slot[row];
    if (slot < -1 || slot >= slots) return ffi::Error::InvalidArgument("slot: expected one of the slots, or -1");
    const int64_t length = call.row_length(row), used = paged ? (length + call.page - 1) / call.page : 0;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = call.table[slot * slot_pages + i];
      if (page < 0 || page >= pages) return ffi::Error::InvalidArgument("table: expected one of the pages");
    }
  }
  return ffi::Error::Success();
}

// The call's arrays and sizes, or an error that names the array that does not fit.
ffi::ErrorOr<Attention> describe(const Operands& in, const Options& options, ffi::AnyBuffer output, Floats lse) {
  const auto query = in.query.dimensions(), key = in.key.dimensions(), value = in.value.dimensions();
  const auto type = in.query.element_type();
  if (type != ffi::DataType::F32 && type != ffi::DataType::BF16)
    return ffi::Unexpected(ffi::Error::InvalidArgument("query: expected float32 or bfloat16"));
  const auto stored = in.key.element_type();
  if (in.value.element_type() != stored || output.element_type() != type ||
      (stored != type && stored != ffi::DataType::S8))
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("output: expected the type of query; key and value: that, or int8"));
  if (query.size() != 4 || key.size() != 4 || value.size() != 4)
    return ffi::Unexpected(ffi::Error::InvalidArgument("query, key, value: expected four axes"));
  Attention call = {};
  call.bfloat16 = type == ffi::DataType::BF16;
  call.int8 = stored == ffi::DataType::S8;
  call.rows = query[0];
  call.query_heads = query[1];
  call.queries = query[2];
  call.head_dim = query[3];
  call.kv_heads = key[1];
  call.page = key[2];
  call.value_dim = value[3];
  const bool fits = has_shape(in.key, {key[0], call.kv_heads, call.page, call.head_dim}) &&
                    has_shape(in.value, {key[0], call.kv_heads, call.page, call.value_dim}) &&
                    has_shape(output, {call.rows, call.query_heads, call.queries, call.value_dim}) &&
                    has_shape(lse, {call.rows, call.query_heads, call.queries}) && has_shape(in.slot, {call.rows}) &&
                    has_shape(in.offset, {call.rows}) && has_shape(in.length, {call.rows});
  if (!fits || call.kv_heads < 1 || call.query_heads % call.kv_heads || call.head_dim % 2)
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "expected query [rows, query_heads, queries, head_dim], key and value [pages, kv_heads, page, width], slot, "
        "offset and length [rows], an even head_dim and query_heads a multiple of kv_heads"));
  const std::vector<int64_t> scales = {key[0], call.kv_heads, call.page};
  if (call.int8 && !(has_shape(in.key_scale, scales) && has_shape(in.value_scale, scales)))
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("key_scale, value_scale: expected [pages, kv_heads, page] beside int8"));
  call.key_scale = call.int8 ? in.key_scale.typed_data() : nullptr;
  call.value_scale = call.int8 ? in.value_scale.typed_data() : nullptr;
  call.query = in.query.untyped_data();
  call.key = in.key.untyped_data();
  call.value = in.value.untyped_data();
  call.output = output.untyped_data();
  call.lse = lse.typed_data();
  call.slot = in.slot.typed_data();
  call.offset = in.offset.typed_data();
  call.length = in.length.typed_data();
  call.query_block = options.query_block;
  call.window = options.window;
  call.causal = options.causal;
  call.scale = options.scale;
  call.softcap = options.softcap;
  const ffi::Error found = find_pages(call, in.table, key[0]);
  if (found.failure()) return ffi::Unexpected(found);
  return call;
}

bool between(int64_t least, int64_t value) { return value >= least && value <= INT32_MAX; }

int64_t clip(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

// Query blocks of a row that hold a query before the row's length; none of an idle row.
int64_t valid_blocks(const Attention& call, int64_t row) {
  const int64_t left = call.row_length(row) - call.offset[row];
  return clip((left + call.query_block - 1) / call.query_block, 0, call.blocks());
}

// Query blocks of a row that exact attention computes.
int64_t exact_blocks(const Attention& call, int64_t row) {
  // With neither mask queries may belong to another sequence than the keys, so all of them count.
  const bool all = !call.causal && !call.window && call.slot[row] >= 0;
  return all ? call.blocks() : valid_blocks(call, row);
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
  const size_t exact_bytes = chosen.scratch_bytes(call, nullptr);
  const size_t bytes = selection ? std::max(exact_bytes, chosen.scratch_bytes(call, selection)) : exact_bytes;
  return run_tasks(
      pool, "attention", static_cast<int64_t>(tasks.size()), [&](int64_t) { return bytes; },
      [&](int64_t i, void* memory) { chosen.run(call, tasks[i], memory); });
}

// A call of one query a head, cut into parts of the keys that each head attends to.
class Decode {
 public:
  explicit Decode(const Attention& call) : call_(call) {}

  void begin_head(int64_t head) { heads_.push_back({head, static_cast<int64_t>(tasks_.size())}); }

  // Keys at the positions [first, last) of the head that was begun.
  void add(int64_t first, int64_t last) { cut(first, last, kDecodeKeys, nullptr, 0); }

  // The tokens of some key blocks of the head that was begun.
  void add_blocks(const int32_t* blocks, int64_t count, int64_t key_block) {
    cut(0, count * key_block, kDecodeChosenKeys, blocks, key_block);
  }

  // All parts at once, then each head's parts together.
  ffi::Error run(ffi::ThreadPool pool) {
    const int64_t part_size = call_.group() * call_.part_width();
    std::vector<float> parts(tasks_.size() * part_size);
    for (size_t i = 0; i < tasks_.size(); ++i) tasks_[i].part = parts.data() + i * part_size;
    const Kernels& chosen = kernels();
    const size_t bytes = chosen.decode_scratch_bytes(call_);
    const ffi::Error error = run_tasks(
        pool, "attention", static_cast<int64_t>(tasks_.size()), [&](int64_t) { return bytes; },
        [&](int64_t i, void* memory) { chosen.run_decode(call_, tasks_[i], memory); });
    for (size_t i = 0; i < heads_.size(); ++i) {
      const size_t end = i + 1 < heads_.size() ? heads_[i + 1].first : tasks_.size();
      chosen.merge_parts(call_, heads_[i].head, parts.data() + heads_[i].first * part_size, end - heads_[i].first);
    }
    return error;
  }

 private:
  struct Head {
    int64_t head, first;  // of its tasks
  };

  void cut(int64_t first, int64_t last, int64_t size, const int32_t* blocks, int64_t key_block) {
    for (int64_t start = first; start < last; start += size)
      tasks_.push_back({heads_.back().head, start, std::min(start + size, last), blocks, key_block, nullptr});
  }

  const Attention& call_;
  std::vector<Head> heads_;
  std::vector<DecodeTask> tasks_;
};

ffi::Error decode(ffi::ThreadPool pool, const Attention& call) {
  Decode parts(call);
  for (int64_t head = 0; head < call.rows * call.kv_heads; ++head) {
    const int64_t row = head / call.kv_heads, position = call.offset[row];
    if (exact_blocks(call, row) == 0) {
      clear(call, head, 0);
      continue;
    }
    const int64_t seen = call.seen_length(row);
    const int64_t first = call.window ? std::max<int64_t>(position - call.window + 1, 0) : 0;
    parts.begin_head(head);
    parts.add(first, call.window && !call.causal ? std::min(position + call.window, seen) : seen);
  }
  return parts.run(pool);
}

ffi::Error exact(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                 Floats key_scale, Floats value_scale, Vector slot, Vector offset, Vector length, Integers table, ffi::Result<ffi::AnyBuffer> output,
                 ffi::Result<Floats> lse, int64_t query_block, int64_t window, bool causal, float scale,
                 float softcap) {
  auto described = describe({query, key, value, key_scale, value_scale, slot, offset, length, table},
                            {query_block, window, causal, scale, softcap}, *output, *lse);
  if (described.has_error()) return described.error();
  if (!between(1, query_block) || !between(0, window))
    return ffi::Error::InvalidArgument("query_block: expected 1 to 2^31 - 1; window: 0 to 2^31 - 1");
  const Attention& call = *described;
  if (call.queries == 1) return decode(pool, call);
  std::vector<Task> tasks;
  for (int64_t head = 0; head < call.rows * call.kv_heads; ++head) {
    const int64_t count = exact_blocks(call, head / call.kv_heads);
    // Later blocks see more keys: the longest tasks go first.
    for (int64_t block = count - 1; block >= 0; --block) tasks.push_back({head, block, nullptr});
    clear(call, head, count);
  }
  return run(pool, call, nullptr, tasks);
}

ffi::Error two_stage(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                     Floats key_scale, Floats value_scale, Bytes projected, Queries projected_queries, Floats offsets, Integers selecting, Vector slot, Vector offset,
                     Vector length, Integers table, ffi::Result<ffi::AnyBuffer> output, ffi::Result<Floats> lse,
                     int64_t query_block, bool causal, float scale, float softcap, int64_t budget, int64_t key_block,
                     int64_t candidate_blocks, int64_t sink, int64_t local, int64_t ranking_queries, int64_t least, float mass) {
  auto described = describe({query, key, value, key_scale, value_scale, slot, offset, length, table}, {query_block, 0, causal, scale, softcap},
                            *output, *lse);
  if (described.has_error()) return described.error();
  if (!between(1, query_block) || !between(1, key_block) || !between(1, budget) || !between(1, candidate_blocks) ||
      !between(0, sink) || !between(0, local) || !between(1, least) || least > budget || !(mass >= 0 && mass < 1))
    return ffi::Error::InvalidArgument(
        "query_block, key_block, budget, candidate_blocks: expected 1 to 2^31 - 1; sink, local: 0 to 2^31 - 1; least: 1 "
        "to the budget; mass: 0 to below 1");
  const Attention& call = *described;
  const int64_t heads = call.rows * call.kv_heads, rank = projected.dimensions()[3];
  if (!has_shape(projected, {key.dimensions()[0], call.kv_heads, call.page, rank}) || rank < 4 || rank % 4 ||
      !has_shape(projected_queries, {heads, call.blocks(), call.lanes(), rank}) ||
      (mass > 0 && !has_shape(offsets, {heads, call.blocks(), call.lanes()})) ||
      !has_shape(selecting, {call.rows, 2}) || call.page % key_block || ranking_queries < 1 ||
      ranking_queries > call.lanes())
    return ffi::Error::InvalidArgument(
        "expected projected [pages, kv_heads, page, rank], projected_queries [heads, blocks, lanes, rank], offsets "
        "[heads, blocks, lanes] by mass, selecting [rows, 2], rank a positive multiple of 4, page one of key_block, and 1 to all of the lanes as "
        "ranking_queries");
  const LowRank low_rank = {projected.typed_data(), projected_queries.typed_data(), mass > 0 ? offsets.typed_data() : nullptr,
                            rank, ranking_queries};
  const Selection selection = {low_rank, budget, least, key_block, candidate_blocks, sink, local, mass};
  std::vector<Task> exact_tasks, tasks;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t row = head / call.kv_heads, count = valid_blocks(call, row);
    const int32_t* range = selecting.typed_data() + 2 * row;
    for (int64_t block = count - 1; block >= 0; --block) {
      const bool selects = block >= range[0] && block < range[1];
      (selects ? tasks : exact_tasks).push_back({head, block, selects ? &selection : nullptr});
    }
    clear(call, head, count);
  }
  // Exact blocks over many keys take longest and go first.
  exact_tasks.insert(exact_tasks.end(), tasks.begin(), tasks.end());
  return run(pool, call, &selection, exact_tasks);
}

// Keys that a new token attends to without a choice: from the start of a key block on, up to its own.
int64_t local_start(const Attention& call, int64_t row, int64_t local, int64_t key_block) {
  return std::max<int64_t>(call.seen_length(row) - 1 - local, 0) / key_block * key_block;
}

// The key blocks of one head in the making: those of the sink, then those of the largest weight.
void choose_blocks(const Attention& call, const Choice& choice, int64_t head, int64_t ranked, float* logits,
                   int64_t stride, int32_t* blocks, int32_t* count) {
  const int64_t size = choice.key_block, seen = call.seen_length(head / call.kv_heads);
  const int64_t local = (seen - 1) / size + 1 - ranked, sink = (choice.sink + size - 1) / size;
  const int64_t most = std::min(choice.budget / size - local, ranked);
  std::vector<float> mean(ranked), importance;
  kernels().average_weights(logits, call.group(), stride, ranked, mean.data());
  importance = mean;
  for (int64_t block = 0; block < std::min(sink, ranked); ++block) importance[block] = -kMasked;
  std::vector<int32_t> chosen(most), memory(kSelectBuckets + ranked);
  select_largest(importance.data(), ranked, most, chosen.data(), memory.data());
  int64_t taken = most;
  if (choice.mass > 0) {
    std::stable_sort(chosen.begin(), chosen.end(), [&](int32_t a, int32_t b) { return importance[a] > importance[b]; });
    float before = 0.0f;
    for (taken = 0; taken < most && (before < choice.mass || chosen[taken] < sink); ++taken)
      before += mean[chosen[taken]];
    std::sort(chosen.begin(), chosen.begin() + taken);
  }
  std::copy(chosen.begin(), chosen.begin() + taken, blocks);
  *count = static_cast<int32_t>(taken);
}

// Blocks of a task of stage 1.
constexpr int64_t kScanBlocks = 256;

ffi::Error choose(ffi::ThreadPool pool, Bytes projected, Floats queries, Vector slot, Vector offset, Vector length,
                  Integers table, ffi::Result<Integers> blocks, ffi::Result<Vector> counts, float scale, float softcap,
                  int64_t key_block, int64_t budget, int64_t sink, int64_t local, int64_t exact_keys, float mass) {
  const auto keys = projected.dimensions(), query = queries.dimensions();
  const int64_t rank = keys[3], most = blocks->dimensions()[1];
  Attention call = {};
  call.rows = slot.dimensions()[0];
  call.kv_heads = keys[1];
  call.page = keys[2];
  call.query_heads = call.kv_heads * query[1];
  call.queries = 1;
  call.causal = true;
  call.scale = scale;
  call.softcap = softcap;
  call.slot = slot.typed_data();
  call.offset = offset.typed_data();
  call.length = length.typed_data();
  const int64_t heads = call.rows * call.kv_heads;
  if (!has_shape(queries, {heads, query[1], rank}) || query[1] < 1 || rank < 4 || rank % 4 ||
      !has_shape(offset, {call.rows}) || !has_shape(length, {call.rows}) || !has_shape(*blocks, {heads, most}) ||
      !has_shape(*counts, {heads}))
    return ffi::Error::InvalidArgument(
        "expected projected [pages, kv_heads, page, rank], queries [heads, group, rank], slot, offset and length [rows], "
        "blocks [heads, most], counts [heads], rank a positive multiple of 4");
  if (!between(1, key_block) || !between(1, budget) || !between(0, sink) || !between(0, local) ||
      !between(budget, exact_keys) || call.page % key_block || budget / key_block - local / key_block - 1 > most)
    return ffi::Error::InvalidArgument(
        "expected a page of whole key blocks, exact_keys of at least the budget, and room for all blocks of the budget");
  const ffi::Error found = find_pages(call, table, keys[0]);
  if (found.failure()) return found;
  const Choice choice = {{projected.typed_data(), queries.typed_data(), nullptr, rank, query[1]}, key_block, budget, sink, local,
                         exact_keys, mass};
  std::fill_n(blocks->typed_data(), heads * most, 0);
  std::fill_n(counts->typed_data(), heads, 0);
  std::vector<ScanTask> tasks, whole;  // parts of heads, and heads
  const int64_t stride = (call.capacity() / key_block + 63) / 64 * 64;
  std::vector<int64_t> choosing;
  for (int64_t head = 0; head < heads; ++head)
    if (call.seen_length(head / call.kv_heads) > exact_keys) choosing.push_back(head);
  std::vector<float> logits(choosing.size() * call.group() * stride);
  for (size_t i = 0; i < choosing.size(); ++i) {
    const int64_t head = choosing[i], ranked = local_start(call, head / call.kv_heads, local, key_block) / key_block;
    float* mine = logits.data() + i * call.group() * stride;
    whole.push_back({head, 0, ranked, mine, stride});
    for (int64_t first = 0; first < ranked; first += kScanBlocks)
      tasks.push_back({head, first, std::min(kScanBlocks, ranked - first), mine, stride});
  }
  const Kernels& chosen = kernels();
  const size_t bytes = chosen.scan_scratch_bytes(call, choice);
  const ffi::Error error = run_tasks(
      pool, "stage 1", static_cast<int64_t>(tasks.size()), [&](int64_t) { return bytes; },
      [&](int64_t i, void* memory) { chosen.run_scan(call, choice, tasks[i], memory); });
  if (error.failure()) return error;
  parallel_for(pool, static_cast<int64_t>(whole.size()), [&](int64_t i) {
    const ScanTask& head = whole[i];
    choose_blocks(call, choice, head.head, head.count, head.logits, stride, blocks->typed_data() + head.head * most,
                  counts->typed_data() + head.head);
  });
  return ffi::Error::Success();
}

ffi::Error attend_chosen(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                         Floats key_scale, Floats value_scale, Integers blocks, Vector counts, Vector slot,
                         Vector offset, Vector length, Integers table, ffi::Result<ffi::AnyBuffer> output,
                         ffi::Result<Floats> lse, int64_t query_block, bool causal, float scale, float softcap,
                         int64_t key_block, int64_t local, int64_t exact_keys) {
  auto described = describe({query, key, value, key_scale, value_scale, slot, offset, length, table},
                            {query_block, 0, causal, scale, softcap}, *output, *lse);
  if (described.has_error()) return described.error();
  const Attention& call = *described;
  const int64_t heads = call.rows * call.kv_heads, most = blocks.dimensions()[1];
  if (call.queries != 1 || !causal || !has_shape(blocks, {heads, most}) || !has_shape(counts, {heads}) ||
      !between(1, key_block) || !between(0, local) || !between(0, exact_keys) || call.page % key_block)
    return ffi::Error::InvalidArgument(
        "expected one causal query, blocks [heads, most], counts [heads], and a page of whole key blocks");
  Decode parts(call);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t row = head / call.kv_heads, seen = call.seen_length(row), count = counts.typed_data()[head];
    if (exact_blocks(call, row) == 0) {
      clear(call, head, 0);
      continue;
    }
    const bool selects = seen > exact_keys;
    const int64_t start = selects ? local_start(call, row, local, key_block) : 0;
    const int32_t* mine = blocks.typed_data() + head * most;
    if (count < 0 || count > most) return ffi::Error::InvalidArgument("counts: expected up to as many as blocks");
    for (int64_t i = 0; selects && i < count; ++i)
      if (mine[i] < 0 || mine[i] >= start / key_block)
        return ffi::Error::InvalidArgument("blocks: expected key blocks before the neighbourhood");
    parts.begin_head(head);
    if (selects) parts.add_blocks(mine, count, key_block);
    parts.add(start, seen);
  }
  return parts.run(pool);
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
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Integers>()
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
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Bytes>()
                                  .Arg<iceformer::Queries>()
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Integers>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Integers>()
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
                                  .Attr<int64_t>("ranking_queries")
                                  .Attr<int64_t>("least")
                                  .Attr<float>("mass"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(iceformer_choose, iceformer::choose,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<iceformer::Bytes>()
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Integers>()
                                  .Ret<iceformer::Integers>()
                                  .Ret<iceformer::Vector>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("key_block")
                                  .Attr<int64_t>("budget")
                                  .Attr<int64_t>("sink")
                                  .Attr<int64_t>("local")
                                  .Attr<int64_t>("exact_keys")
                                  .Attr<float>("mass"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(iceformer_attend_chosen, iceformer::attend_chosen,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Floats>()
                                  .Arg<iceformer::Integers>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Vector>()
                                  .Arg<iceformer::Integers>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<iceformer::Floats>()
                                  .Attr<int64_t>("query_block")
                                  .Attr<bool>("causal")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("key_block")
                                  .Attr<int64_t>("local")
                                  .Attr<int64_t>("exact_keys"));

#pragma GCC visibility pop
