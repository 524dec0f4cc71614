// Matrix products on AMX tiles: the operands of matmul.h, with the rows and the depth padded to whole tiles. Only where
// the build asks for it, because a process has to be granted tiles before it uses them (amx.cpp): that the compiler may
// use their instructions does not say so.
#pragma once

#include "common/matmul.h"

#if defined(ICEFORMER_EMULATE_AMX)
#define ICEFORMER_TILES
#include "amx_emulation.h"
#endif

#if defined(ICEFORMER_TILES)

namespace iceformer {
namespace ICEFORMER_ISA {

// Rows of a full tile, and words of each.
constexpr int64_t kTileSide = 16;

// What the compiler may still hold in registers is in memory after this. Compilers do not know what memory the tile
// instructions read: GCC takes a configuration for 8 bytes, and a tile that is loaded for none.
ICEFORMER_INLINE void settle_memory(const void* at) { __asm__ volatile("" : : "r"(at) : "memory"); }

// While it lives, the thread's tiles have the shapes that `multiply_tiles` uses, for sums in steps of `step` words:
// tiles 0 to 3 hold results, 4 and 5 rows of the left operand, 6 and 7 rows of the right one. Nothing else in the
// thread may use tiles meanwhile, and afterwards they are free for others.
class Tiles {
 public:
  explicit Tiles(int64_t step = kTileSide) {
    Configuration shapes = {};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool left = tile == 4 || tile == 5, right = tile >= 6;
      shapes.row_bytes[tile] = static_cast<uint16_t>(4 * (left ? step : kTileSide));
      shapes.rows[tile] = static_cast<uint8_t>(right ? step : kTileSide);
    }
    settle_memory(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64, "the processor's layout");
};

// `R` by `V` tiles of result (+)= left . right. The tiles' numbers are part of the instructions, hence literals.
template <bool kIntegers, int R, int V>
ICEFORMER_INLINE void multiply_tiles(Left left, Lanes right, int64_t depth, int64_t step, void* result, int64_t stride,
                                     bool add) {
#define ICEFORMER_DOT(sum, a, b) \
  do {                           \
    if constexpr (kIntegers)     \
      _tile_dpbssd(sum, a, b);   \
    else                         \
      _tile_dpbf16ps(sum, a, b); \
  } while (false)
  const int64_t left_bytes = 4 * left.row, right_bytes = 4 * right.stride, bytes = 4 * stride;
  char *upper = static_cast<char*>(result), *lower = upper + kTileSide * bytes;
  if (add) {
    _tile_loadd(0, upper, bytes);
    if constexpr (V == 2) _tile_loadd(1, upper + 64, bytes);
    if constexpr (R == 2) _tile_loadd(2, lower, bytes);
    if constexpr (R == 2 && V == 2) _tile_loadd(3, lower + 64, bytes);
  } else {
    _tile_zero(0);
    if constexpr (V == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && V == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += step) {
    const uint32_t *a = left.words + k, *b = right.words + k * right.stride;
    _tile_loadd(6, b, right_bytes);
    _tile_loadd(4, a, left_bytes);
    ICEFORMER_DOT(0, 4, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, b + kTileSide, right_bytes);
      ICEFORMER_DOT(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + kTileSide * left.row, left_bytes);
      ICEFORMER_DOT(2, 5, 6);
    }
    if constexpr (R == 2 && V == 2) ICEFORMER_DOT(3, 5, 7);
  }
  _tile_stored(0, upper, bytes);
  if constexpr (V == 2) _tile_stored(1, upper + 64, bytes);
  if constexpr (R == 2) _tile_stored(2, lower, bytes);
  if constexpr (R == 2 && V == 2) _tile_stored(3, lower + 64, bytes);
#undef ICEFORMER_DOT
}

// `multiply` of words of four int8 (`kIntegers`; the result is int32) or of two bfloat16 (it is float32), inside
// `Tiles(step)`. Reads and writes whole tiles: rows are rounded up to 16, whatever they hold, and depth to `step`,
// where both operands must hold zeros. Lanes are a multiple of 16, and left.step is 1.
template <bool kIntegers>
void multiply_by_tiles(int64_t rows, int64_t lanes, Left left, Lanes right, int64_t depth, int64_t step, void* result,
                       int64_t stride, bool add) {
  settle_memory(result);
  for (int64_t lane = 0; lane < lanes; lane += 2 * kTileSide) {
    const Lanes columns = {right.words + lane, right.stride};
    const bool wide = lane + kTileSide < lanes;
    for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
      const Left part = {left.words + row * left.row, left.row, left.step};
      void* to = static_cast<uint32_t*>(result) + row * stride + lane;
      const bool tall = row + kTileSide < rows;
      if (tall && wide)
        multiply_tiles<kIntegers, 2, 2>(part, columns, depth, step, to, stride, add);
      else if (tall)
        multiply_tiles<kIntegers, 2, 1>(part, columns, depth, step, to, stride, add);
      else if (wide)
        multiply_tiles<kIntegers, 1, 2>(part, columns, depth, step, to, stride, add);
      else
        multiply_tiles<kIntegers, 1, 1>(part, columns, depth, step, to, stride, add);
    }
  }
}

// Products of words of two bfloat16, inside a `Scope`.
struct Bfloat16TileProduct {
  using Scope = Tiles;
  static constexpr int64_t kRows = kTileSide, kDepth = kTileSide;
};

template <>
inline void multiply<Bfloat16TileProduct>(int64_t rows, int64_t lanes, Left left, Lanes right, int64_t depth,
                                          float* result, int64_t stride, bool add) {
  multiply_by_tiles<false>(rows, lanes, left, right, depth, kTileSide, result, stride, add);
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer

#endif
