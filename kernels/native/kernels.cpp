// The kernels of one instruction set: this file is compiled once for each, with ICEFORMER_ISA naming it and the
// compiler's flags allowing its instructions.

#include "kernels.h"

#include "attention/decode.h"
#include "attention/decode_int8.h"
#include "attention/decode_shorts.h"
#include "attention/low_rank.h"
#include "attention/scan.h"
#include "attention/softmax.h"
#include "attention/two_stage.h"
#include "linear/linear.h"

namespace iceformer {
namespace ICEFORMER_ISA {
namespace {

template <class Format>
size_t scratch_bytes_of(const Attention& call, const Selection* selection) {
  Arena arena(nullptr);
  if (selection)
    TwoStage<Format, LowRankRanker>(call, *selection, arena);
  else
    QueryBlock<Format>(call, arena, kTileKeys);
  return arena.used();
}

template <class Format>
void run_task(const Attention& call, const Task& task, void* scratch) {
  Arena arena(scratch);
  if (task.selection) return TwoStage<Format, LowRankRanker>(call, *task.selection, arena).run(task);
  QueryBlock<Format> block(call, arena, kTileKeys);
  [[maybe_unused]] const typename Format::Product::Scope scope{};
  block.begin(task);
  block.attend(nullptr, block.start(), block.end() - block.start());
  block.finish();
}

size_t scratch_bytes(const Attention& call, const Selection* selection) {
  return call.bfloat16 ? scratch_bytes_of<Bfloat16>(call, selection) : scratch_bytes_of<Float32>(call, selection);
}

void run(const Attention& call, const Task& task, void* scratch) {
  return call.bfloat16 ? run_task<Bfloat16>(call, task, scratch) : run_task<Float32>(call, task, scratch);
}

// Does `visit(part)` with what decodes a part of a call.
template <class Format, class Visit>
void visit_decode_of(const Attention& call, Arena& arena, const Visit& visit) {
#if defined(__AVX512VNNI__)
  if (call.int8 && Int8Products<Format>::fits(call)) return visit(DecodePart<Int8Products<Format>>(call, arena));
#endif
  if (call.int8 && ShortProducts<Format>::fits(call))
    visit(DecodePart<ShortProducts<Format>>(call, arena));
  else if (call.int8)
    visit(DecodePart<FloatProducts<Format, Int8Memory<Format>>>(call, arena));
  else
    visit(DecodePart<FloatProducts<Format, FloatMemory<Format>>>(call, arena));
}

template <class Visit>
void visit_decode(const Attention& call, Arena& arena, const Visit& visit) {
  return call.bfloat16 ? visit_decode_of<DecodeBfloat16>(call, arena, visit)
                       : visit_decode_of<Float32>(call, arena, visit);
}

size_t decode_scratch_bytes(const Attention& call) {
  Arena arena(nullptr);
  visit_decode(call, arena, [](auto&&) {});
  return arena.used();
}

void run_decode(const Attention& call, const DecodeTask& task, void* scratch) {
  Arena arena(scratch);
  visit_decode(call, arena, [&](auto&& part) { part.run(task); });
}

void merge(const Attention& call, int64_t head, float* parts, int64_t count) {
  return call.bfloat16 ? merge_parts<DecodeBfloat16>(call, head, parts, count)
                       : merge_parts<Float32>(call, head, parts, count);
}

size_t scan_scratch_bytes(const Attention& call, const Choice& choice) {
  Arena arena(nullptr);
  BlockScan(call, choice, arena);
  return arena.used();
}

void run_scan(const Attention& call, const Choice& choice, const ScanTask& task, void* scratch) {
  Arena arena(scratch);
  BlockScan(call, choice, arena).run(task);
}

void round_rows(const Linear& call) {
  return call.bfloat16 ? round_rows_of<Bfloat16Bits>(call) : round_rows_of<float>(call);
}

void round_many_rows(const Linear& call, int64_t first, int64_t count) {
  visit_integers(call, [&](auto format) {
    call.bfloat16 ? round_to_integers<decltype(format), Bfloat16Bits>(call, first, count)
                  : round_to_integers<decltype(format), float>(call, first, count);
  });
}

size_t linear_scratch_bytes(const Linear& call, const LinearTask& task) {
  Arena arena(nullptr);
  visit_linear(call, task, arena, [](auto&&) {});
  return arena.used();
}

void run_linear(const Linear& call, const LinearTask& task, void* scratch) {
  Arena arena(scratch);
  visit_linear(call, task, arena, [](auto&& work) { work.run(); });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {scratch_bytes,        run,        decode_scratch_bytes, run_decode, merge,
                         scan_scratch_bytes,   run_scan,   average_weights,      round_rows, round_many_rows,
                         linear_scratch_bytes, run_linear};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
