// Small functions of integers.
#pragma once

#include <stdint.h>

#include "common/inline.h"

namespace iceformer {
namespace ICEFORMER_ISA {

ICEFORMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ICEFORMER_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
ICEFORMER_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
ICEFORMER_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
