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
constexpr int kSteps = 4, kStepRows = kLanes / kSteps;

template <class Memory, int Q>
ICEFORMER_INLINE void add_products(const typename Memory::Stored* row, const uint32_t* words, int64_t stride,
                                   Floats (&sums)[Q][kStepRows], int i) {
  using Product = typename Memory::Product;
  const auto some = (typename Product::Broadcast)Memory::words(row);
  for (int q = 0; q < Q; ++q) sums[q][i] = Product::add(sums[q][i], some, load<Words>(words + q * stride));
}

// Lane i of products[q] = the product of rows[i], of `width` elements, with vector q, packed words `stride` apart and
// padded with zeros to whole vectors.
template <class Memory, int Q>
ICEFORMER_INLINE void multiply_rows(const typename Memory::Stored* const* rows, int64_t width, const uint32_t* vectors,
                                    int64_t stride, Floats (&products)[Q]) {
  constexpr int64_t kVector = kLanes * Memory::kPerWord;
  Floats steps[Q][kSteps];
  for (int step = 0; step < kSteps; ++step) {
    Floats sums[Q][kStepRows] = {};
    const uint32_t* words = vectors;
    int64_t d = 0;
    for (; d + kVector <= width; d += kVector, words += kLanes)
      for (int i = 0; i < kStepRows; ++i)
        add_products<Memory, Q>(rows[step + i * kSteps] + d, words, stride, sums, i);
    for (int i = 0; d < width && i < kStepRows; ++i) {
      typename Memory::Stored padded[kVector] = {};
      memcpy(padded, rows[step + i * kSteps] + d, sizeof(padded[0]) * (width - d));
      add_products<Memory, Q>(padded, words, stride, sums, i);
    }
    for (int q = 0; q < Q; ++q) steps[q][step] = add_across<kStepRows>(sums[q]);
  }
  for (int q = 0; q < Q; ++q) products[q] = add_across<kSteps>(steps[q]);
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
