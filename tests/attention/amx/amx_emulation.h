// AMX tiles in plain C++, for processors that have none: the intrinsics that kernels/native/common/tiles.h uses, on a tile
// file of each thread. Aborts where the processor would raise an exception (Intel's manual, volume 2, LDTILECFG and
// chapter "AMX instruction set reference").
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace amx_emulation {

struct Tile {
  int rows, row_bytes;  // 0 where the tile is not configured
  alignas(64) unsigned char data[16][64];
};

struct TileFile {
  bool configured;
  Tile tiles[8];
};

static thread_local TileFile tile_file;

static inline void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "emulated AMX: %s\n", what);
  abort();
}

static inline void release() { memset(&tile_file, 0, sizeof tile_file); }

static inline void load_configuration(const void* from) {
  unsigned char bytes[64];
  memcpy(bytes, from, sizeof bytes);
  release();
  if (bytes[0] == 0) return;
  require(bytes[0] == 1, "the palette is not 1");
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0, "start row and reserved bytes are to be 0");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    require(i < 8 || (rows == 0 && row_bytes == 0), "there are 8 tiles");
    require(rows <= 16 && row_bytes <= 64, "a tile has at most 16 rows of 64 bytes");
    require((rows == 0) == (row_bytes == 0), "a tile has rows and columns, or neither");
    if (i < 8) tile_file.tiles[i] = {rows, row_bytes, {}};
  }
  tile_file.configured = true;
}

static inline Tile& tile(int number) {
  require(tile_file.configured, "tiles are used without a configuration");
  require(number >= 0 && number < 8, "there are 8 tiles");
  require(tile_file.tiles[number].rows > 0, "the tile is not configured");
  return tile_file.tiles[number];
}

static inline void zero(int number) {
  Tile& to = tile(number);
  memset(to.data, 0, sizeof to.data);
}

static inline void load(int number, const void* base, int64_t stride) {
  zero(number);
  Tile& to = tile(number);
  for (int row = 0; row < to.rows; ++row)
    memcpy(to.data[row], static_cast<const char*>(base) + row * stride, static_cast<size_t>(to.row_bytes));
}

static inline void store(int number, void* base, int64_t stride) {
  const Tile& from = tile(number);
  for (int row = 0; row < from.rows; ++row)
    memcpy(static_cast<char*>(base) + row * stride, from.data[row], static_cast<size_t>(from.row_bytes));
}

static inline void check_shapes(int sum, int left, int right) {
  require(sum != left && sum != right && left != right, "a product needs three different tiles");
  const Tile &s = tile(sum), &a = tile(left), &b = tile(right);
  require(s.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, "rows are not whole words");
  require(s.rows == a.rows && s.row_bytes == b.row_bytes && a.row_bytes / 4 == b.rows, "shapes do not fit");
}

// Subnormal numbers count as zeros, whatever the thread's control register says.
static inline float flush(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

// One half of a word of two bfloat16: 0 the lower, 1 the upper.
static inline float bfloat16_of(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  float value;
  memcpy(&value, &bits, sizeof bits);
  return flush(value);
}

static inline int32_t byte_of(uint32_t word, int byte) { return static_cast<int8_t>(word >> (8 * byte)); }

static inline uint32_t word_at(const unsigned char* row, int column) {
  uint32_t word;
  memcpy(&word, row + 4 * column, sizeof word);
  return word;
}

// Even and odd products are summed apart, then added to the result.
static inline void dot_bfloat16(int sum, int left, int right) {
  check_shapes(sum, left, right);
  Tile& s = tile(sum);
  const Tile &a = tile(left), &b = tile(right);
  for (int row = 0; row < s.rows; ++row) {
    float parts[2][16] = {}, result[16];
    for (int k = 0; k < b.rows; ++k)
      for (int half = 0; half < 2; ++half) {
        const float value = bfloat16_of(word_at(a.data[row], k), half);
        for (int column = 0; column < 16; ++column)
          parts[half][column] =
              flush(__builtin_fmaf(value, bfloat16_of(word_at(b.data[k], column), half), parts[half][column]));
      }
    memcpy(result, s.data[row], sizeof result);
    for (int column = 0; column < 16; ++column)
      result[column] = flush(flush(result[column]) + flush(parts[0][column] + parts[1][column]));
    memcpy(s.data[row], result, static_cast<size_t>(s.row_bytes));
  }
}

// Sums wrap around.
static inline void dot_int8(int sum, int left, int right) {
  check_shapes(sum, left, right);
  Tile& s = tile(sum);
  const Tile &a = tile(left), &b = tile(right);
  for (int row = 0; row < s.rows; ++row) {
    uint32_t result[16];
    memcpy(result, s.data[row], sizeof result);
    for (int k = 0; k < b.rows; ++k)
      for (int byte = 0; byte < 4; ++byte)
        for (int column = 0; column < 16; ++column)
          result[column] +=
              static_cast<uint32_t>(byte_of(word_at(a.data[row], k), byte) * byte_of(word_at(b.data[k], column), byte));
    memcpy(s.data[row], result, static_cast<size_t>(s.row_bytes));
  }
}

}  // namespace amx_emulation

#if defined(ICEFORMER_EMULATE_AMX)
// Macros, because the compiler's header declares functions of some of these names, and macros of the others.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(from) ::amx_emulation::load_configuration(from)
#define _tile_release() ::amx_emulation::release()
#define _tile_zero(tile) ::amx_emulation::zero(tile)
#define _tile_loadd(tile, base, stride) ::amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) ::amx_emulation::store(tile, base, stride)
#define _tile_dpbf16ps(sum, left, right) ::amx_emulation::dot_bfloat16(sum, left, right)
#define _tile_dpbssd(sum, left, right) ::amx_emulation::dot_int8(sum, left, right)
#endif
