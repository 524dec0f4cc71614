// Products of a few vectors with rows of memory that are read once, as they lie: those of a vector of rows at a time, so
// that their sums are summed across together.
#pragma once

#include "common/pack.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// Rows that are widened to floats as they are read.
template <class Stored_>
struct WideRows {
  using Stored = Stored_;
  using Product = FloatProduct;
  static constexpr int64_t kPerWord = 1;

  static ICEFORMER_INLINE Words words(const Stored* from) { return (Words)widen(from); }
};

// Rows whose products are in registers at once; as many such steps make a vector of products.
constexpr int kSteps = ICEFORMER_LANES == 4 && ICEFORMER_REGISTERS == 32 ? 1 : 4, kStepRows = kLanes / kSteps;

// Lane i of products[q] = the product of rows[i], of `width` elements, with vector q, packed words `stride` apart and
// padded with zeros to whole vectors.
template <class Memory, int Q>
ICEFORMER_INLINE void multiply_rows(const typename Memory::Stored* const* rows, int64_t width, const uint32_t* vectors,
                                    int64_t stride, Floats (&products)[Q]) {
  using Stored = typename Memory::Stored;
  using Product = typename Memory::Product;
  constexpr int64_t kVector = kLanes * Memory::kPerWord;
  const int64_t whole = width / kVector * kVector;
  Floats steps[Q][kSteps];
  for (int step = 0; step < kSteps; ++step) {
    Floats sums[kStepRows][Q];
    for (int i = 0; i < kStepRows; ++i)
      for (int q = 0; q < Q; ++q) sums[i][q] = Floats{};
    const uint32_t* words = vectors;
    for (int64_t d = 0; d < whole; d += kVector, words += kLanes) {
      Words lanes[Q];
      for (int q = 0; q < Q; ++q) lanes[q] = load<Words>(words + q * stride);
      for (int i = 0; i < kStepRows; ++i) {
        const auto row = (typename Product::Broadcast)Memory::words(rows[step + i * kSteps] + d);
        for (int q = 0; q < Q; ++q) sums[i][q] = Product::add(sums[i][q], row, lanes[q]);
      }
    }
    if (whole < width) {
      for (int i = 0; i < kStepRows; ++i) {
        Stored padded[kVector] = {};
        memcpy(padded, rows[step + i * kSteps] + whole, sizeof(Stored) * (width - whole));
        const auto row = (typename Product::Broadcast)Memory::words(padded);
        for (int q = 0; q < Q; ++q) sums[i][q] = Product::add(sums[i][q], row, load<Words>(words + q * stride));
      }
    }
    for (int q = 0; q < Q; ++q) {
      Floats of_query[kStepRows];
      for (int i = 0; i < kStepRows; ++i) of_query[i] = sums[i][q];
      steps[q][step] = add_across<kStepRows>(of_query);
    }
  }
  for (int q = 0; q < Q; ++q) products[q] = add_across<kSteps>(steps[q]);
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
