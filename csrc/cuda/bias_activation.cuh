// An activation of x + bias between two matrix products, forward and backward. Memory bound.
//
// A thread keeps to its columns and walks down the rows, so it reads its biases once, and adds their gradient up in
// registers. Form::value(x) is the activation, Form::slope(x, value) its derivative, which also gives the value.
#pragma once

#include "cuda/common.cuh"

namespace portlm::cuda {

constexpr unsigned kActivationThreads = 128;
constexpr int64_t kActivationBlocks = 4096;  // that share the rows at most: enough to fill any device

// x[k] plus the bias of its column.
template <int V, typename T>
__device__ inline void load_biased(const T* x, const float (&bias)[V], float (&v)[V]) {
  load(x, v);
#pragma unroll
  for (int k = 0; k < V; ++k) v[k] += bias[k];
}

template <typename Form, typename T, int V>
__global__ void activation_forward(const T* x, const T* bias, T* y, int64_t rows, int64_t F) {
  const int64_t column = (int64_t{blockIdx.y} * kActivationThreads + threadIdx.x) * V;
  if (column >= F) return;
  float b[V] = {};
  if (bias) load(bias + column, b);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    float v[V];
    load_biased(x + r * F + column, b, v);
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = Form::value(v[k]);
    store(y + r * F + column, v);
  }
}

// value, partial (gridDim.x, F), or both may be nullptr.
template <typename Form, typename T, int V>
__global__ void activation_backward(const T* dy, const T* x, const T* bias, T* dx, T* value, float* partial, int64_t rows,
                                    int64_t F) {
  const int64_t column = (int64_t{blockIdx.y} * kActivationThreads + threadIdx.x) * V;
  if (column >= F) return;
  float b[V] = {}, sum[V] = {};
  if (bias) load(bias + column, b);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    float v[V], d[V], of[V];
    load_biased(x + r * F + column, b, v);
    load(dy + r * F + column, d);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      d[k] *= Form::slope(v[k], of[k]);
      sum[k] += d[k];
    }
    store(dx + r * F + column, d);
    if (value) store(value + r * F + column, of);
  }
  if (partial) store(partial + blockIdx.x * F + column, sum);
}

inline unsigned activation_tiles(int64_t F, int V) {
  const int64_t columns = int64_t{kActivationThreads} * V, tiles = (F + columns - 1) / columns;
  if (tiles > 65535) throw std::runtime_error("activation: rows are too wide");
  return static_cast<unsigned>(tiles);
}

template <typename Form>
void activate(const void* x, const void* bias, void* y, int64_t rows, int64_t F, bool is_bfloat16, uintptr_t stream) {
  if (rows == 0 || F == 0) return;
  with_access(is_bfloat16, F, {x, bias, y}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const dim3 grid(static_cast<unsigned>(rows < kActivationBlocks ? rows : kActivationBlocks), activation_tiles(F, V));
    launch(activation_forward<Form, T, V>, grid, kActivationThreads, 0, stream, static_cast<const T*>(x),
           static_cast<const T*>(bias), static_cast<T*>(y), rows, F);
  });
}

// `blocks` blocks share the rows; with dbias, partial (blocks, F) is where they leave their part of it.
template <typename Form>
void differentiate(const void* dy, const void* x, const void* bias, void* dx, void* value, void* dbias, float* partial,
                   int64_t blocks, int64_t rows, int64_t F, bool is_bfloat16, uintptr_t stream) {
  if (blocks == 0 || F == 0) return;
  with_access(is_bfloat16, F, {dy, x, bias, dx, value, partial}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    float* const sums = dbias ? partial : nullptr;
    launch(activation_backward<Form, T, V>, dim3(static_cast<unsigned>(blocks), activation_tiles(F, V)), kActivationThreads, 0,
           stream, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(dx),
           static_cast<T*>(value), sums, rows, F);
    if (dbias) launch_sum_partials(partial, blocks, F, static_cast<T*>(dbias), static_cast<T*>(nullptr), stream);
  });
}

}  // namespace portlm::cuda
