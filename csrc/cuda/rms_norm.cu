// Root-mean-square normalisation with an optional residual add in front; see layer_norm.cu for the plan.
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

template <typename T, int V>
__global__ void forward(const T* x, const T* residual, const T* weight, float eps, T* y, T* h, float* rstd, int64_t rows,
                        int64_t C, bool staged) {
  float* const stage = shared_memory();
  const int64_t first = int64_t{threadIdx.x} * V, turn = int64_t{blockDim.x} * V;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const T* row = x + r * C;
    float square[1] = {0.0f};
    for (int64_t i = first; i < C; i += turn) {
      float v[V];
      load(row + i, v);
      if (residual) {
        float add[V];
        load(residual + r * C + i, add);
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] = to_float(from_float<T>(v[k] + add[k]));  // as backward will read it
        store(h + r * C + i, v);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) square[0] += v[k] * v[k];
      if (staged) store(stage + i, v);  // each thread reads back only what it wrote itself
    }
    block_sum(square);
    const float scale = 1.0f / sqrtf(square[0] / static_cast<float>(C) + eps);
    if (residual) row = h + r * C;
    for (int64_t i = first; i < C; i += turn) {
      float v[V], w[V];
      staged ? load(stage + i, v) : load(row + i, v);
      load(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = v[k] * scale * w[k];
      store(y + r * C + i, v);
    }
    if (threadIdx.x == 0) rstd[r] = scale;
  }
}

// With xhat = h rstd and a = dy * weight: dx = rstd (a - xhat mean(a xhat)).
template <typename T, int V>
__global__ void backward(const T* dy, const T* dh_in, const T* h, const T* weight, const float* rstd, T* dx, float* partial,
                         int64_t rows, int64_t C, bool staged) {
  float* const mine = partial + int64_t{blockIdx.x} * C;
  float* const dweight = staged ? shared_memory() : mine;
  const int64_t first = int64_t{threadIdx.x} * V, turn = int64_t{blockDim.x} * V;
  for (int64_t i = first; i < C; i += turn) {
    const float zero[V] = {};
    store(dweight + i, zero);
  }
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const float scale = rstd[r];
    float sums[1] = {0.0f};
    for (int64_t i = first; i < C; i += turn) {
      float g[V], v[V], w[V], dw[V];
      load(dy + r * C + i, g);
      load(h + r * C + i, v);
      load(weight + i, w);
      load(dweight + i, dw);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float gx = g[k] * v[k] * scale;
        sums[0] += gx * w[k];
        dw[k] += gx;
      }
      store(dweight + i, dw);
    }
    block_sum(sums);
    const float pull = sums[0] / static_cast<float>(C);
    for (int64_t i = first; i < C; i += turn) {
      float g[V], v[V], w[V];
      load(dy + r * C + i, g);
      load(h + r * C + i, v);
      load(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) g[k] = (g[k] * w[k] - v[k] * scale * pull) * scale;
      if (dh_in) {
        load(dh_in + r * C + i, v);
#pragma unroll
        for (int k = 0; k < V; ++k) g[k] += v[k];
      }
      store(dx + r * C + i, g);
    }
  }
  if (!staged) return;
  for (int64_t i = first; i < C; i += turn) {
    float sum[V];
    load(dweight + i, sum);
    store(mine + i, sum);
  }
}

}  // namespace

void rms_norm_fwd(const void* x, const void* residual, const void* weight, float eps, void* y, void* h, float* rstd,
                  int64_t rows, int64_t C, bool is_bfloat16, uintptr_t stream) {
  if (rows == 0 || C == 0) return;
  with_access(is_bfloat16, C, {x, residual, weight, y, h}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const size_t row = sizeof(float) * static_cast<size_t>(C);
    const bool staged = row <= kSharedBytes - 1024;  // block_sum needs a little of it
    launch(forward<T, V>, row_blocks(rows), row_threads(C, V), staged ? row : 0, stream, static_cast<const T*>(x),
           static_cast<const T*>(residual), static_cast<const T*>(weight), eps, static_cast<T*>(y), static_cast<T*>(h), rstd,
           rows, C, staged);
  });
}

void rms_norm_bwd(const void* dy, const void* dh_in, const void* h, const void* weight, const float* rstd, void* dx,
                  void* dweight, float* partial, int64_t blocks, int64_t rows, int64_t C, bool is_bfloat16,
                  uintptr_t stream) {
  if (C == 0 || blocks == 0) return;
  with_access(is_bfloat16, C, {dy, dh_in, h, weight, dx, partial}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const size_t sums = sizeof(float) * static_cast<size_t>(C);
    const bool staged = sums <= kSharedBytes - 1024;
    launch(backward<T, V>, static_cast<unsigned>(blocks), row_threads(C, V), staged ? sums : 0, stream,
           static_cast<const T*>(dy), static_cast<const T*>(dh_in), static_cast<const T*>(h), static_cast<const T*>(weight),
           rstd, static_cast<T*>(dx), partial, rows, C, staged);
    launch_sum_partials(partial, blocks, C, static_cast<T*>(dweight), static_cast<T*>(nullptr), stream);
  });
}

}  // namespace portlm::cuda
