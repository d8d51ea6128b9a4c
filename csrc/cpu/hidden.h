// What perceptrons share: how many rows go through their hidden layer at a time, and GELU over a run of it.
#pragma once

#include <cstdint>

#include "cpu/gelu.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

// Rows of a chunk, so that what lies between the products stays small: 2^21 numbers of the hidden layer (rows, F), but
// enough rows that packing the weights again does not matter.
inline int64_t chunk_rows(int64_t F) {
  constexpr int64_t kNumbers = 1 << 21, kLeast = 512;
  return kNumbers / (F + 1) > kLeast ? kNumbers / (F + 1) : kLeast;
}

// value[j] = gelu(pre[j]); value may be pre.
template <typename Form>
inline void gelu_run(const float* pre, float* value, int64_t n) {
  for_lanes(n, [=](int64_t j, auto lanes) { store(Form::value(load(pre + j, lanes)), value + j, lanes); });
}

// The same, and grad[j], which is the gradient of value[j], becomes that of pre[j].
template <typename Form>
inline void gelu_run_bwd(const float* pre, float* value, float* grad, int64_t n) {
  for_lanes(n, [=](int64_t j, auto lanes) {
    Vec v;
    const Vec slope = Form::slope(load(pre + j, lanes), v);
    store(load(grad + j, lanes) * slope, grad + j, lanes);
    store(v, value + j, lanes);
  });
}

}  // namespace portlm::PORTLM_ISA
