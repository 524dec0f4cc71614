// Products of floats with weights that stay as they are in memory: a few rows multiply them as they are read, more rows
// convert a panel at a time, which stays in the cache. An int8 is exact in bfloat16, too, so that no precision is lost.
#pragma once

#include "common/arena.h"
#include "common/pack_tiles.h"
#include "common/rows.h"
#include "linear/few_panels.h"
#include "linear/integer_rows.h"
#include "linear/many_rows.h"

namespace iceformer {
namespace ICEFORMER_ISA {

// A task of at most kFewRows rows: adds some rows of the kernel at a time to the results, which stay in the cache,
// so that memory is read in the order in which it lies.
template <class Element, class Weight>
class FewRows {
 public:
  FewRows(const Linear& call, const LinearTask& task, Arena& arena) : call_(call), task_(task) {
    result_ = arena.take<float>(task.rows * stride());
  }

  void run() { run_rows<kFewRows>(); }

 private:
  static constexpr int kVectors = 4;
  // Vectors of a row that lie in four cache lines.
  template <int R>
  static constexpr int kRun = R == 1 ? kVectors * 4 / int{sizeof(Weight)} : kVectors;

  int64_t stride() const { return round_up(task_.columns, kLanes); }

  template <int R>
  void run_rows() {
    if constexpr (R > 0) {
      if (task_.rows < R) return run_rows<R - 1>();
      memset(result_, 0, sizeof(float) * R * stride());
      for (int64_t k = 0; k < task_.depth; ++k) add<R>(task_.first + k);
      for (int64_t row = 0; row < R; ++row) write(row);
    }
  }

  void write(int64_t row) {
    const float* from = result_ + row * stride();
    if (task_.part) {
      memcpy(task_.part + row * task_.columns, from, sizeof(float) * task_.columns);
      return;
    }
    memcpy(call_.output + (task_.row + row) * call_.out_features + task_.column, from, sizeof(float) * task_.columns);
  }

  // Adds a row of the kernel: rows are read in the very order of memory, which processors fetch ahead on their own.
  template <int R>
  void add(int64_t k) {
    const Element* input = static_cast<const Element*>(call_.input) + task_.row * call_.in_features + k;
    const Weight* kernel = static_cast<const Weight*>(call_.kernel) + k * call_.out_features + task_.column;
    float factor[R];
    for (int r = 0; r < R; ++r) factor[r] = to_float(input + r * call_.in_features);
    int64_t lane = 0;
    for (; lane + kRun<R> * kLanes <= task_.columns; lane += kRun<R> * kLanes)
      add_lanes<R, kRun<R>>(kernel, lane, kLanes, factor);
    for (; lane + kVectors * kLanes <= task_.columns; lane += kVectors * kLanes)
      add_lanes<R, kVectors>(kernel, lane, kLanes, factor);
    for (; lane < task_.columns; lane += kLanes) add_lanes<R, 1>(kernel, lane, task_.columns - lane, factor);
  }

  template <int R, int V>
  ICEFORMER_INLINE void add_lanes(const Weight* kernel, int64_t lane, int64_t count, const float (&factor)[R]) {
    for (int v = 0; v < V; ++v) {
      const Weight* from = kernel + lane + v * kLanes;
      const Floats weights = V == 1 ? widen(from, count) : widen(from);
      for (int r = 0; r < R; ++r) {
        float* to = result_ + r * stride() + lane + v * kLanes;
        store(to, load<Floats>(to) + factor[r] * weights);
      }
    }
  }

  const Linear& call_;
  const LinearTask& task_;
  float* result_;
};

// A task of at most kFewRows rows and a kernel [out_features, in_features]: products with its rows.
template <class Element, class Weight>
class FewDots {
 public:
  FewDots(const Linear& call, const LinearTask& task, Arena& arena)
      : call_(call), task_(task), stride_(round_up(call.in_features, kLanes)) {
    input_ = arena.take<float>(task.rows * stride_);
  }

  void run() { run_rows<kFewRows>(); }

 private:
  template <int R>
  void run_rows() {
    if constexpr (R > 0) {
      if (task_.rows < R) return run_rows<R - 1>();
      widen_input();
      const Weight* kernel = static_cast<const Weight*>(call_.kernel);
      for (int64_t column = 0; column < task_.columns; column += kLanes) {
        const int64_t count = smaller(task_.columns - column, kLanes);
        const Weight* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          rows[i] = kernel + (task_.column + column + smaller(i, count - 1)) * call_.in_features;
        Floats products[R];
        const uint32_t* vectors = reinterpret_cast<const uint32_t*>(input_);
        multiply_rows<WideRows<Weight>, R>(rows, call_.in_features, vectors, stride_, products);
        for (int r = 0; r < R; ++r) write(products[r], r, task_.column + column, count);
      }
    }
  }

  void widen_input() {
    const Element* from = static_cast<const Element*>(call_.input) + task_.row * call_.in_features;
    for (int64_t row = 0; row < task_.rows; ++row)
      for (int64_t i = 0; i < stride_; ++i)
        input_[row * stride_ + i] = i < call_.in_features ? to_float(from + row * call_.in_features + i) : 0.0f;
  }

  void write(Floats products, int64_t row, int64_t column, int64_t count) {
    float* to = call_.output + (task_.row + row) * call_.out_features + column;
    for (int64_t i = 0; i < count; ++i) to[i] = products[i];
  }

  const Linear& call_;
  const LinearTask& task_;
  int64_t stride_;
  float* input_;
};

// Does `visit(work)` with what runs a task.
template <class Element, class Weight, class Visit>
ICEFORMER_INLINE void visit_many_rows(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  constexpr bool kBfloat16 = sizeof(Element) == sizeof(Bfloat16Bits);
  if (call.rows <= kWideRows)
    visit(ManyRows<WideLinear, Element, Weight>(call, task, arena));
  else if constexpr (kBfloat16)
    visit(ManyRows<Bfloat16Linear, Element, Weight>(call, task, arena));
  else
    visit(ManyRows<FloatLinear, Element, Weight>(call, task, arena));
}

template <class Element, class Weight, class Visit>
ICEFORMER_INLINE void visit_floats(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  if (call.transposed)
    visit(FewDots<Element, Weight>(call, task, arena));
  else
    visit(FewRows<Element, Weight>(call, task, arena));
}

template <class Element, class Visit>
ICEFORMER_INLINE void visit_linear_of(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  const bool many = call.rows > kFewRows && !call.transposed;
  if (call.levels)
    return visit_integers(call, [&](auto format) { visit(IntegerRows<decltype(format)>(call, task, arena)); });
  if (call.weights == WeightType::kInt8)
    many ? visit_many_rows<Element, int8_t>(call, task, arena, visit) : visit(FewPanels<int8_t>(call, task));
  else if (call.weights == WeightType::kInt4)
    many ? visit_many_rows<Element, Int4Pair>(call, task, arena, visit) : visit(FewPanels<Int4Pair>(call, task));
  else if (call.weights == WeightType::kFloat32)
    visit_floats<Element, float>(call, task, arena, visit);
  else
    many ? visit_many_rows<Element, Bfloat16Bits>(call, task, arena, visit)
         : visit_floats<Element, Bfloat16Bits>(call, task, arena, visit);
}

template <class Visit>
ICEFORMER_INLINE void visit_linear(const Linear& call, const LinearTask& task, Arena& arena, const Visit& visit) {
  if (call.bfloat16)
    visit_linear_of<Bfloat16Bits>(call, task, arena, visit);
  else
    visit_linear_of<float>(call, task, arena, visit);
}

}  // namespace ICEFORMER_ISA
}  // namespace iceformer
