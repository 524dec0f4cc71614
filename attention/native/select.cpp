// The k largest of n floats without a sort: a radix search for the k-th largest, then one pass that collects.

#include <string.h>

#include "problem.h"

namespace iceformer {
namespace {

// Unsigned integers in the order of the floats.
inline uint32_t ordered(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace

void select_largest(const float* values, int64_t size, int64_t count, int32_t* indices, int32_t* buckets) {
  // Digits of 11, 11 and 10 bits from the top; `prefix` is what is known of the k-th largest.
  constexpr int kShift[] = {21, 10, 0};
  constexpr int kBits[] = {11, 11, 10};
  uint32_t prefix = 0, known = 0;
  int64_t wanted = count;  // how many of those that share the prefix are to be taken
  for (int digit = 0; digit < 3; ++digit) {
    const uint32_t mask = (1u << kBits[digit]) - 1;
    memset(buckets, 0, sizeof(int32_t) << kBits[digit]);
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t bits = ordered(values[i]);
      buckets[(bits >> kShift[digit]) & mask] += (bits & known) == prefix;
    }
    uint32_t bucket = mask;
    while (bucket > 0 && buckets[bucket] < wanted) wanted -= buckets[bucket--];
    prefix |= bucket << kShift[digit];
    known |= mask << kShift[digit];
  }
  for (int64_t i = 0; i < size && count > 0; ++i) {
    const uint32_t bits = ordered(values[i]);
    const bool equal = bits == prefix && wanted > 0;
    if (bits > prefix || equal) {
      *indices++ = static_cast<int32_t>(i);
      --count;
    }
    wanted -= equal;
  }
}

}  // namespace iceformer
