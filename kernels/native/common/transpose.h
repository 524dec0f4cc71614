// Rows of words, W of them, as columns: in place, in W registers, which hold kLanes rows in the order of memory.
#pragma once

#include "common/simd.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Where `transpose_words` leaves each word: register i has word `of(i)` of all rows. A step exchanges a bit of the
// register's number for the top bit of the lane's.
template <int W>
struct WordOrder {
  static constexpr int bits(int64_t value) { return value > 1 ? 1 + bits(value / 2) : 0; }
  static constexpr int kSteps = bits(kLanes), kRegisterBits = bits(W);
  static constexpr int exchanged(int step) { return kRegisterBits - 1 - step % kRegisterBits; }

  static constexpr int of(int index) {
    // Bits of the position in memory, of which the lowest are the word's: -1 for those that are the row's.
    int lane[kSteps] = {}, row[kRegisterBits] = {};
    for (int bit = 0; bit < kSteps; ++bit) lane[bit] = bit < kRegisterBits ? bit : -1;
    for (int bit = 0; bit < kRegisterBits; ++bit) row[bit] = kSteps + bit < kRegisterBits ? kSteps + bit : -1;
    for (int step = 0; step < kSteps; ++step) {
      const int top = lane[kSteps - 1], place = exchanged(step);
      for (int bit = kSteps - 1; bit > 0; --bit) lane[bit] = lane[bit - 1];
      lane[0] = row[place];
      row[place] = top;
    }
    int word = 0;
    for (int bit = 0; bit < kRegisterBits; ++bit) word |= index >> bit & 1 ? 1 << row[bit] : 0;
    return word;
  }
};

template <int W, int Step = 0>
ICEFORMER_INLINE void transpose_words(Words (&registers)[W]) {
  if constexpr (Step < WordOrder<W>::kSteps) {
    constexpr int kBit = 1 << WordOrder<W>::exchanged(Step);
    for (int i = 0; i < W; ++i) {
      if (i & kBit) continue;
      const Words low = interleave_low(registers[i], registers[i | kBit]);
      registers[i | kBit] = interleave_high(registers[i], registers[i | kBit]);
      registers[i] = low;
    }
    transpose_words<W, Step + 1>(registers);
  }
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
