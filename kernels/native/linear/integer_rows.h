// Many rows times a kernel of int8 panels, in integers. Rows are rounded to integers of at most `levels`, each chunk of a
// row with a unit of its own: an input that is far larger than the others takes bits from those of its chunk alone.
// Products of integers are 2 to 4 times as many in a second as those of floats.
//
// Integers of 8 bits are bytes where the processor has products of bytes (VNNI, Arm's dotprod), else shorts: the products of bytes that
// AVX2 has are no more in a second, because their sums of 16 bits have to be widened.
#pragma once

#include "common/arena.h"
#include "common/pack_tiles.h"
#include "common/shorts.h"
#include "linear/problem.h"

namespace iceformer {
namespace ICEFORMER_ISA {

constexpr int64_t kByteLevels = 127;

// Words of two shorts: of the four inputs of a step the first and the third, then the other two, which is how shifts
// make shorts of the bytes of a kernel.
struct ShortInputs {
  using Scope = NoScope;
  static constexpr int64_t kPerWord = 2;
  static constexpr bool kTiles = false, kMatrices = false;

  // Adds a word of a row times vectors of weights.
  template <int V>
  static ICEFORMER_INLINE void add(Ints (&sum)[V], Words row, const Words (&weights)[V]) {
    for (int v = 0; v < V; ++v) sum[v] = add_pairs(sum[v], (Shorts)row, (Shorts)weights[v]);
  }

  static ICEFORMER_INLINE void store_row(Ints values, uint32_t* to) {
    typedef int16_t Halves __attribute__((vector_size(2 * ICEFORMER_LANES)));
    const Halves narrow = __builtin_convertvector(values, Halves);
#if ICEFORMER_LANES == 16
    store(to, __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
#elif ICEFORMER_LANES == 8
    store(to, __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3, 4, 6, 5, 7));
#else
    store(to, __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3));
#endif
  }

  // The words of some steps of a panel.
  static void pack_panel(const int8_t* panel, int64_t steps, uint32_t* to) {
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t lane = 0; lane < kPanelOutputs; lane += kLanes) {
        const Shorts bytes = load<Shorts>(panel + (step * kPanelOutputs + lane) * kPanelInputs);
        store(to + 2 * step * kPanelOutputs + lane, bytes << 8 >> 8);
        store(to + (2 * step + 1) * kPanelOutputs + lane, bytes >> 8);
      }
  }

  // What the sums of a panel's outputs begin with.
  static ICEFORMER_INLINE Ints start(const uint32_t*, int64_t) { return Ints{}; }
};

#if defined(__AVX512VNNI__)

// Words of four bytes. vpdpbusd takes unsigned times signed, hence (a + 128) . b - 128 * sum(b).
struct ByteInputs {
  using Scope = NoScope;
  static constexpr int64_t kPerWord = 4;
  static constexpr bool kTiles = false, kMatrices = false;

  template <int V>
  static ICEFORMER_INLINE void add(Ints (&sum)[V], Words row, const Words (&weights)[V]) {
    for (int v = 0; v < V; ++v)
      sum[v] = (Ints)_mm512_dpbusd_epi32((__m512i)sum[v], (__m512i)row, (__m512i)weights[v]);
  }

  static ICEFORMER_INLINE void store_row(Ints values, uint32_t* to) {
    store(to, _mm_xor_si128(_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)values), _mm_set1_epi8(-128)));
  }

  static void pack_panel(const int8_t* panel, int64_t steps, uint32_t* to) {
    memcpy(to, panel, sizeof(uint32_t) * kPanelOutputs * steps);
  }

  static ICEFORMER_INLINE Ints start(const uint32_t* weights, int64_t words) {
    Ints sum[1] = {};
    for (int64_t k = 0; k < words; ++k)
      add(sum, (Words)fill_ints(static_cast<int32_t>(0x80808080u)), {load<Words>(weights + k * kPanelOutputs)});
    return -sum[0];
  }
};

#elif defined(ICEFORMER_NEON) && defined(__ARM_FEATURE_DOTPROD)

// Words of four bytes, all signed.
struct ByteInputs {
  using Scope = NoScope;
  static constexpr int64_t kPerWord = 4;
  static constexpr bool kTiles = false, kMatrices = false;

  template <int V>
  static ICEFORMER_INLINE void add(Ints (&sum)[V], Words row, const Words (&weights)[V]) {
    for (int v = 0; v < V; ++v)
      sum[v] = (Ints)vdotq_s32((int32x4_t)sum[v], (int8x16_t)row, (int8x16_t)weights[v]);
  }

  static ICEFORMER_INLINE void store_row(Ints values, uint32_t* to) {
    const int16x4_t shorts = vmovn_s32((int32x4_t)values);
    store(to, vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(shorts, shorts))), 0));
  }

  static void pack_panel(const int8_t* panel, int64_t steps, uint32_t* to) {
    memcpy(to, panel, sizeof(uint32_t) * kPanelOutputs * steps);
  }

  static ICEFORMER_INLINE Ints start(const uint32_t*, int64_t) { return Ints{}; }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)

// The same bytes for products of 2 by 8 with 8 by 2 (smmla): of two steps together, the weights of two outputs.
struct MatrixInputs : ByteInputs {
  static constexpr bool kMatrices = true;

  // A last single step is paired with zeros.
  static void pack_panel(const int8_t* panel, int64_t steps, uint32_t* to) {
    constexpr int64_t kBytes = kPanelOutputs * kPanelInputs;
    for (int64_t step = 0; step < steps; step += 2, panel += 2 * kBytes, to += 2 * kPanelOutputs)
      for (int64_t lane = 0; lane < kPanelOutputs; lane += kLanes) {
        const Words even = load<Words>(panel + lane * kPanelInputs);
        const Words odd = step + 1 < steps ? load<Words>(panel + kBytes + lane * kPanelInputs) : Words{};
        store(to + 2 * lane, interleave_low(even, odd));
        store(to + 2 * lane + kLanes, interleave_high(even, odd));
      }
  }

  // Products of `R` rows of `words` words with a packed panel. Behind a last single word of a row the next row's is
  // read, or what is behind all rows, and multiplied by 0.
  template <int R, int V>
  static ICEFORMER_INLINE void multiply(const uint32_t* rows, int64_t words, const uint32_t* panel, Ints (&sum)[R][V]) {
    constexpr int kPairs = (R + 1) / 2;
    int32x4_t sums[kPairs][2 * V];
    for (int pair = 0; pair < kPairs; ++pair)
      for (int v = 0; v < 2 * V; ++v) sums[pair][v] = vdupq_n_s32(0);
    for (int64_t k = 0; k < words; k += 2, panel += 2 * kPanelOutputs) {
      int8x16_t two[kPairs];
      for (int pair = 0; pair < kPairs; ++pair) {
        const uint32_t* from = rows + 2 * pair * words + k;
        const int8x8_t first = load<int8x8_t>(from), second = load<int8x8_t>(2 * pair + 1 < R ? from + words : from);
        two[pair] = vcombine_s8(first, second);
      }
      for (int v = 0; v < 2 * V; ++v) {
        const int8x16_t weights = load<int8x16_t>(panel + v * kLanes);
        for (int pair = 0; pair < kPairs; ++pair) sums[pair][v] = vmmlaq_s32(sums[pair][v], two[pair], weights);
      }
    }
    for (int row = 0; row < R; ++row)
      for (int v = 0; v < V; ++v) {
        const int64x2_t low = (int64x2_t)sums[row / 2][2 * v], high = (int64x2_t)sums[row / 2][2 * v + 1];
        sum[row][v] = (Ints)(row % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
      }
  }
};

#endif

#endif

#if defined(ICEFORMER_TILES)

// The same for tiles, which take signed bytes. Chunks are whole tiles.
struct TileInputs : ByteInputs {
  using Scope = Tiles;
  static constexpr bool kTiles = true, kMatrices = false;

  static bool fits(const Linear& call) {
    return call.levels == kByteLevels && call.rows > kWideRows && call.group % (kTileSide * kPerWord) == 0;
  }

  static ICEFORMER_INLINE void store_row(Ints values, uint32_t* to) {
    store(to, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)values));
  }

  static ICEFORMER_INLINE Ints start(const uint32_t*, int64_t) { return Ints{}; }
};

#endif

// Calls `visit(format)` with what the integers of a call are.
template <class Visit>
ICEFORMER_INLINE void visit_integers(const Linear& call, const Visit& visit) {
#if defined(ICEFORMER_TILES)
  if (TileInputs::fits(call)) return visit(TileInputs{});
#endif
#if defined(ICEFORMER_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
  if (call.levels == kByteLevels) return visit(MatrixInputs{});
#elif defined(__AVX512VNNI__) || (defined(ICEFORMER_NEON) && defined(__ARM_FEATURE_DOTPROD))
  if (call.levels == kByteLevels) return visit(ByteInputs{});
#endif
  visit(ShortInputs{});
}

// Rounds a chunk of a row and gives its unit. Zeros up to a whole step.
template <class Format, class Element>
ICEFORMER_INLINE float round_to_levels(const Element* from, int64_t count, float levels, uint32_t* to) {
  constexpr int32_t kMagnitude = 0x7fffffff, kExponent = 0x7f800000;
  Ints magnitudes = {};
  for (int64_t i = 0; i < count; i += kLanes)
    magnitudes = larger(magnitudes, (Ints)widen(from + i, count - i) & kMagnitude);
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = magnitudes[lane] > bits ? magnitudes[lane] : bits;
  const float most = load<float>(&bits);
  // Below this, units would be denormal.
  const float inverse = most < levels * 1.17549435e-38f ? 0.0f : levels / most;
  const int64_t padded = round_up(count, kPanelInputs);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Ints rounded = round_to_ints(widen(from + i, count - i) * inverse);
    if (i + kLanes <= padded) {
      Format::store_row(rounded, to + i / Format::kPerWord);
    } else {
      uint32_t words[kLanes / Format::kPerWord];
      Format::store_row(rounded, words);
      memcpy(to + i / Format::kPerWord, words, sizeof(uint32_t) * (padded - i) / Format::kPerWord);
    }
  }
  if (bits >= kExponent) return __builtin_nanf("");  // of a number that is not finite
  return most * (1.0f / levels);
}

// Rounds some rows of a call.
template <class Format, class Element>
void round_to_integers(const Linear& call, int64_t row, int64_t count) {
  const float levels = static_cast<float>(call.levels);
  for (const int64_t last = row + count; row < last; ++row) {
    const Element* from = static_cast<const Element*>(call.input) + row * call.in_features;
    float* unit = call.row_units(row);
    for (int64_t first = 0, end; first < call.in_features; first = end) {
      end = call.chunk_end(first);
      const int64_t inputs = round_up(end - first, kPanelInputs);
      uint32_t* to = call.integers + (first * call.rows + row * inputs) / Format::kPerWord;
      *unit++ = round_to_levels<Format>(from + first, end - first, levels, to);
    }
  }
}

// A task of rows that are rounded: some chunks of a panel at a time become words, which stay in the nearest cache.
template <class Format>
class IntegerRows {
 public:
  IntegerRows(const Linear& call, const LinearTask& task, Arena& arena) : call_(call), task_(task), chunks_(call.chunks()) {
    words_ = arena.take<uint32_t>(kDepth / Format::kPerWord * kColumns);
    scales_ = arena.take<float>(kMostChunks * kColumns);
    starts_ = arena.take<int32_t>(kMostChunks * kColumns);
    result_ = arena.take<float>(task.rows * stride());
    if constexpr (Format::kTiles) products_ = arena.take<int32_t>(kTallRows * kPanelOutputs);
  }

  void run() {
    [[maybe_unused]] const typename Format::Scope scope{};
    memset(result_, 0, sizeof(float) * task_.rows * stride());
    for (int64_t first = 0, chunk = 0; first < call_.in_features;) {
      const Piece piece = piece_from(first, chunk);
      for (int64_t column = 0; column < task_.columns; column += kColumns) {
        pack(piece, column);
        multiply(piece, column);
      }
      first = piece.end;
      chunk += piece.chunks;
    }
    for (int64_t row = 0; row < task_.rows; ++row)
      memcpy(call_.output + (task_.row + row) * call_.out_features + task_.column, result_ + row * stride(),
             sizeof(float) * task_.columns);
  }

 private:
  // Chunks that follow each other, all of the same number of inputs.
  struct Piece {
    int64_t first, end, chunk, chunks, inputs;

    int64_t words() const { return inputs / Format::kPerWord; }
  };

  // Rows and vectors whose sums are in registers at once, and the outputs that are packed together.
#if ICEFORMER_REGISTERS == 32
  // Compilers load all eight vectors of weights that matrices are multiplied with first.
  static constexpr int64_t kRows = Format::kMatrices ? 4 : 6, kVectors = 4;
#elif ICEFORMER_LANES == 8
  static constexpr int64_t kRows = 6, kVectors = 2;
#else
  static constexpr int64_t kRows = 3, kVectors = 2;
#endif
  static constexpr int64_t kTallRows = 32;  // of tiles
  static constexpr int64_t kPanelVectors = kPanelOutputs / kLanes;
  static constexpr int64_t kColumns = kVectors > kPanelVectors ? kVectors * kLanes : kPanelOutputs;
  static constexpr int64_t kDepth = 256, kMostChunks = kDepth / kGroupUnit;
  static_assert(kDepth == kMostChunk, "a piece has at least one chunk");
  static_assert(!Format::kMatrices || (kVectors == kPanelVectors && kGroupUnit % (2 * kPanelInputs) == 0),
                "a matrix has the outputs of one panel, and of the chunks of a piece only a single one has an odd step");

  int64_t stride() const { return round_up(task_.columns, kColumns); }

  Piece piece_from(int64_t first, int64_t chunk) const {
    const int64_t size = call_.chunk_end(first) - first;
    Piece piece = {first, first, chunk, 0, round_up(size, kPanelInputs)};
    while (piece.end < call_.in_features && piece.end + size - first <= kDepth &&
           call_.chunk_end(piece.end) - piece.end == size) {
      piece.end += size;
      ++piece.chunks;
    }
    return piece;
  }

  // The words, scales and starts of kColumns outputs. Columns behind the last have zeros.
  void pack(const Piece& piece, int64_t column) {
    const int64_t words = piece.chunks * piece.words();
    for (int64_t at = 0; at < kColumns; at += kPanelOutputs) {
      const int64_t output = task_.column + column + at, left = call_.out_features - output;
      uint32_t* to = words_ + at * words;
      if (left > 0)
        Format::pack_panel(static_cast<const int8_t*>(call_.kernel) +
                               (output * call_.steps() + piece.first / kPanelInputs * kPanelOutputs) * kPanelInputs,
                           piece.chunks * piece.inputs / kPanelInputs, to);
      else
        memset(to, 0, sizeof(uint32_t) * words * kPanelOutputs);
      for (int64_t i = 0; i < piece.chunks; ++i)
        for (int64_t lane = 0; lane < kPanelOutputs; lane += kLanes) {
          const int64_t group = (piece.first + i * piece.inputs) / call_.group;
          const float* scale = static_cast<const float*>(call_.scale) + group * call_.out_features + output + lane;
          store(scales_ + i * kColumns + at + lane, widen(scale, left - lane));
          store(starts_ + i * kColumns + at + lane,
                Format::start(to + i * piece.words() * kPanelOutputs + lane, piece.words()));
        }
    }
  }

  void multiply(const Piece& piece, int64_t column) {
    if constexpr (Format::kTiles) {
      for (int64_t lane = 0; lane < kColumns; lane += kPanelOutputs)
        for (int64_t row = 0; row < task_.rows; row += kTallRows) add_tiles(piece, row, column, lane);
    } else {
      for (int64_t vector = 0; vector < kColumns / kLanes; vector += kVectors)
        for (int64_t row = 0; row < task_.rows; row += kRows)
          add_rest<kRows>(piece, smaller(task_.rows - row, kRows), row, column, vector);
    }
  }

  template <int R>
  ICEFORMER_INLINE void add_rest(const Piece& piece, int64_t rows, int64_t row, int64_t column, int64_t vector) {
    if constexpr (R > 0) {
      if (rows == R) return add<R>(piece, row, column, vector);
      add_rest<R - 1>(piece, rows, row, column, vector);
    }
  }

  // Adds the products of at most kTallRows rows with a panel, from tiles.
  void add_tiles([[maybe_unused]] const Piece& piece, [[maybe_unused]] int64_t row, [[maybe_unused]] int64_t column,
                 [[maybe_unused]] int64_t lane) {
#if defined(ICEFORMER_TILES)
    const int64_t words = piece.words(), rows = smaller(task_.rows - row, kTallRows);
    const uint32_t* panel = words_ + lane * piece.chunks * words;
    const Sums sums = sums_of(piece, row, column, lane);
    for (int64_t i = 0; i < piece.chunks; ++i, panel += words * kPanelOutputs) {
      multiply_by_tiles<true>(rows, kPanelOutputs, {row_words(piece, i, row), words, 1}, {panel, kPanelOutputs}, words,
                              kTileSide, products_, kPanelOutputs, false);
      const Floats scale = load<Floats>(sums.scales + i * kColumns);
      for (int64_t r = 0; r < rows; ++r) sums.add(i, r, 0, load<Ints>(products_ + r * kPanelOutputs), scale);
    }
#endif
  }

  // Adds the products of some rows with some vectors of what is packed.
  template <int R>
  void add(const Piece& piece, int64_t row, int64_t column, int64_t vector) {
    const int64_t words = piece.words(), panel_words = piece.chunks * words * kPanelOutputs;
    const uint32_t* weights = words_ + vector / kPanelVectors * panel_words + vector % kPanelVectors * kLanes;
    const int32_t* starts = starts_ + vector * kLanes;
    const Sums sums = sums_of(piece, row, column, vector * kLanes);
    for (int64_t i = 0; i < piece.chunks; ++i, weights += words * kPanelOutputs) {
      const uint32_t* rows = row_words(piece, i, row);
      Ints sum[R][kVectors];
      if constexpr (Format::kMatrices) {
        Format::multiply(rows, words, weights, sum);
      } else {
        for (int v = 0; v < kVectors; ++v)
          for (int r = 0; r < R; ++r) sum[r][v] = load<Ints>(starts + i * kColumns + v * kLanes);
        for (int64_t k = 0; k < words; ++k) {
          Words lanes[kVectors];
          for (int v = 0; v < kVectors; ++v)
            lanes[v] = load<Words>(weights + k * kPanelOutputs + v / kPanelVectors * panel_words +
                                   v % kPanelVectors * kLanes);
          for (int r = 0; r < R; ++r) {
            const Words word = (Words)fill_ints(load<int32_t>(rows + r * words + k));
            Format::add(sum[r], word, lanes);
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const Floats scale = load<Floats>(sums.scales + i * kColumns + v * kLanes);
        for (int r = 0; r < R; ++r) sums.add(i, r, v * kLanes, sum[r][v], scale);
      }
    }
  }

  // Where the products of some rows and lanes are summed, with what their integers are multiplied by.
  struct Sums {
    float* result;
    int64_t stride;
    const float *scales, *units;
    int64_t chunks;

    ICEFORMER_INLINE void add(int64_t i, int64_t row, int64_t lane, Ints sum, Floats scale) const {
      float* to = result + row * stride + lane;
      store(to, load<Floats>(to) + to_floats(sum) * (scale * units[row * chunks + i]));
    }
  };

  Sums sums_of(const Piece& piece, int64_t row, int64_t column, int64_t lane) const {
    const float* units = call_.units + (task_.row + row) * chunks_ + piece.chunk;
    return {result_ + row * stride() + column + lane, stride(), scales_ + lane, units, chunks_};
  }

  // A row's words of one of the chunks.
  const uint32_t* row_words(const Piece& piece, int64_t i, int64_t row) const {
    const int64_t before = (piece.first + i * piece.inputs) * call_.rows + (task_.row + row) * piece.inputs;
    return call_.integers + before / Format::kPerWord;
  }

  const Linear& call_;
  const LinearTask& task_;
  int64_t chunks_;
  uint32_t* words_;
  float *scales_, *result_;
  int32_t *starts_, *products_ = nullptr;
};

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
