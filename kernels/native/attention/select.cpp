// The k largest of n floats without a sort: a radix search for the k-th largest, then one pass that collects.

#include <string.h>

#include "attention/problem.h"

namespace iceformer {
namespace {

// Unsigned integers in the order of the floats.
inline uint32_t ordered(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace

void select_largest(const float* values, int64_t size, int64_t count, int32_t* indices, int32_t* scratch) {
  // Digits of 11, 11 and 10 bits from the top. After the first, few values still have the k-th largest's digits: they
  // are set apart, and only they are looked at again. `wanted` is how many of them are to be taken.
  constexpr int kShift[] = {21, 10, 0};
  constexpr int kBits[] = {11, 11, 10};
  int32_t* const buckets = scratch;
  uint32_t* const left = reinterpret_cast<uint32_t*>(scratch + kSelectBuckets);
  for (int64_t i = 0; i < size; ++i) left[i] = ordered(values[i]);
  uint32_t threshold = 0;
  int64_t wanted = count, remaining = size;
  for (int digit = 0; digit < 3; ++digit) {
    const uint32_t mask = (1u << kBits[digit]) - 1;
    memset(buckets, 0, sizeof(int32_t) << kBits[digit]);
    for (int64_t i = 0; i < remaining; ++i) ++buckets[(left[i] >> kShift[digit]) & mask];
    uint32_t bucket = mask;
    while (bucket > 0 && buckets[bucket] < wanted) wanted -= buckets[bucket--];
    threshold |= bucket << kShift[digit];
    int64_t kept = 0;
    for (int64_t i = 0; i < remaining; ++i) {
      left[kept] = left[i];
      kept += ((left[i] >> kShift[digit]) & mask) == bucket;
    }
    remaining = kept;
  }
  for (int64_t i = 0; i < size && count > 0; ++i) {
    const uint32_t bits = ordered(values[i]);
    const bool equal = bits == threshold && wanted > 0;
    if (bits > threshold || equal) {
      *indices++ = static_cast<int32_t>(i);
      --count;
    }
    wanted -= equal;
  }
}

}  // namespace iceformer
