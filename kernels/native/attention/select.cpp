// The k largest of n floats without a sort: a radix search for the k-th largest, then one pass that collects. And k
// itself, where a sum over the largest decides it.

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

// Digits of 11, 11 and 10 bits from the top.
constexpr int kShift[] = {21, 10, 0};
constexpr int kBits[] = {11, 11, 10};

}  // namespace

void select_largest(const float* values, int64_t size, int64_t count, int32_t* indices, int32_t* scratch) {
  // After the first digit, few values still have the k-th largest's digits: they are set apart, and only they are looked
  // at again. `wanted` is how many of them are to be taken.
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

int64_t count_reaching(const float* values, const float* weights, int64_t size, double target, int32_t* scratch) {
  double* const sums = reinterpret_cast<double*>(scratch);
  int32_t* const buckets = scratch + 2 * kSelectBuckets;
  target -= kSumSlack;
  uint32_t prefix = 0;  // the digits found so far, of the value at which the sum reaches the target
  double sum = 0;
  int64_t count = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const uint32_t mask = (1u << kBits[digit]) - 1;
    memset(buckets, 0, sizeof(int32_t) << kBits[digit]);
    memset(sums, 0, sizeof(double) << kBits[digit]);
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t bits = ordered(values[i]);
      if (digit > 0 && bits >> kShift[digit - 1] != prefix) continue;
      ++buckets[(bits >> kShift[digit]) & mask];
      sums[(bits >> kShift[digit]) & mask] += weights[i];
    }
    uint32_t bucket = mask;
    for (; bucket > 0 && sum + sums[bucket] < target; --bucket) {
      sum += sums[bucket];
      count += buckets[bucket];
    }
    prefix = prefix << kBits[digit] | bucket;
  }
  for (int64_t i = 0; i < size && sum < target; ++i) {
    if (ordered(values[i]) != prefix) continue;
    sum += weights[i];
    ++count;
  }
  return count;
}

}  // namespace iceformer
