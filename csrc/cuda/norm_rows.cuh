// Normalisation of rows with an optional residual add in front, forward and backward: y = xhat weight + bias for
// xhat = (h - mean) rstd. Rows that are not Centered have no mean and no bias.
//
// Memory bound: one block per row, 16-byte accesses. The row waits in shared memory between the passes over it; rows too long
// for that are read again, from the caches.
#pragma once

#include "cuda/common.cuh"

namespace portlm::cuda {

constexpr size_t kNormBytes = kSharedBytes - 1024;  // block_sum needs a little of it

template <bool Centered, typename T, int V>
__global__ void norm_forward(const T* x, const T* residual, const T* weight, const T* bias, float eps, T* y, T* h, float* mean,
                             float* rstd, int64_t rows, int64_t C, bool staged) {
  float* const stage = shared_memory();
  const int64_t first = int64_t{threadIdx.x} * V, turn = int64_t{blockDim.x} * V;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const T* row = x + r * C;
    float total[1] = {0.0f};
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
      for (int k = 0; k < V; ++k) total[0] += Centered ? v[k] : v[k] * v[k];
      if (staged) store(stage + i, v);  // each thread reads back only what it wrote itself
    }
    block_sum(total);
    if (residual) row = h + r * C;
    float m = 0.0f;
    if constexpr (Centered) {
      m = total[0] / static_cast<float>(C);
      total[0] = 0.0f;
      for (int64_t i = first; i < C; i += turn) {
        float v[V];
        staged ? load(stage + i, v) : load(row + i, v);
#pragma unroll
        for (int k = 0; k < V; ++k) total[0] += (v[k] - m) * (v[k] - m);
      }
      block_sum(total);
    }
    const float scale = 1.0f / sqrtf(total[0] / static_cast<float>(C) + eps);
    for (int64_t i = first; i < C; i += turn) {
      float v[V], w[V], b[V] = {};
      staged ? load(stage + i, v) : load(row + i, v);
      load(weight + i, w);
      if constexpr (Centered) load(bias + i, b);
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = (v[k] - m) * scale * w[k] + b[k];
      store(y + r * C + i, v);
    }
    if (threadIdx.x != 0) continue;
    if constexpr (Centered) mean[r] = m;
    rstd[r] = scale;
  }
}

// With a = dy * weight: dx = rstd (a - mean(a) - xhat mean(a xhat)), without mean(a) if not Centered. Each block adds its rows'
// gradients of weight and bias up, in shared memory if they fit, and leaves them in partial (blocks, 1 + Centered, C).
template <bool Centered, typename T, int V>
__global__ void norm_backward(const T* dy, const T* dh_in, const T* h, const T* weight, const float* mean, const float* rstd,
                              T* dx, float* partial, int64_t rows, int64_t C, bool staged) {
  constexpr int kSums = 1 + Centered;
  float* const mine = partial + int64_t{blockIdx.x} * kSums * C;
  float* const gradients = staged ? shared_memory() : mine;  // of weight, and behind it of bias
  const int64_t first = int64_t{threadIdx.x} * V, turn = int64_t{blockDim.x} * V;
  const auto for_gradients = [=](auto body) {
    for (int64_t i = first; i < C; i += turn)
#pragma unroll
      for (int s = 0; s < kSums; ++s) body(s * C + i);
  };
  for_gradients([=](int64_t i) {
    const float zero[V] = {};
    store(gradients + i, zero);
  });
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const float m = Centered ? mean[r] : 0.0f, scale = rstd[r];
    float sums[kSums] = {};
    for (int64_t i = first; i < C; i += turn) {
      float g[V], v[V], w[V], sum[V];
      load(dy + r * C + i, g);
      load(h + r * C + i, v);
      load(weight + i, w);
      load(gradients + i, sum);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float gx = g[k] * ((v[k] - m) * scale);
        sum[k] += gx;
        sums[0] += gx * w[k];
      }
      store(gradients + i, sum);
      if constexpr (Centered) {
        load(gradients + C + i, sum);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          sum[k] += g[k];
          sums[1] += g[k] * w[k];
        }
        store(gradients + C + i, sum);
      }
    }
    block_sum(sums);
    const float pull = sums[0] / static_cast<float>(C), shift = Centered ? sums[kSums - 1] / static_cast<float>(C) : 0.0f;
    for (int64_t i = first; i < C; i += turn) {
      float g[V], v[V], w[V];
      load(dy + r * C + i, g);
      load(h + r * C + i, v);
      load(weight + i, w);
#pragma unroll
      for (int k = 0; k < V; ++k) g[k] = (g[k] * w[k] - shift - (v[k] - m) * scale * pull) * scale;
      if (dh_in) {
        load(dh_in + r * C + i, v);
#pragma unroll
        for (int k = 0; k < V; ++k) g[k] += v[k];
      }
      store(dx + r * C + i, g);
    }
  }
  if (!staged) return;
  for_gradients([=](int64_t i) {
    float sum[V];
    load(gradients + i, sum);
    store(mine + i, sum);
  });
}

// bias and mean may be nullptr if not Centered.
template <bool Centered>
void normalise(const void* x, const void* residual, const void* weight, const void* bias, float eps, void* y, void* h,
               float* mean, float* rstd, int64_t rows, int64_t C, bool is_bfloat16, uintptr_t stream) {
  if (rows == 0 || C == 0) return;
  with_access(is_bfloat16, C, {x, residual, weight, bias, y, h}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const size_t row = sizeof(float) * static_cast<size_t>(C);
    const bool staged = row <= kNormBytes;
    launch(norm_forward<Centered, T, V>, row_blocks(rows), row_threads(C, V), staged ? row : 0, stream,
           static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight), static_cast<const T*>(bias),
           eps, static_cast<T*>(y), static_cast<T*>(h), mean, rstd, rows, C, staged);
  });
}

// dbias and mean may be nullptr if not Centered.
template <bool Centered>
void differentiate_norm(const void* dy, const void* dh_in, const void* h, const void* weight, const float* mean,
                        const float* rstd, void* dx, void* dweight, void* dbias, float* partial, int64_t blocks, int64_t rows,
                        int64_t C, bool is_bfloat16, uintptr_t stream) {
  if (C == 0 || blocks == 0) return;
  with_access(is_bfloat16, C, {dy, dh_in, h, weight, dx, partial}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const size_t sums = (1 + Centered) * sizeof(float) * static_cast<size_t>(C);
    const bool staged = sums <= kNormBytes;
    launch(norm_backward<Centered, T, V>, static_cast<unsigned>(blocks), row_threads(C, V), staged ? sums : 0, stream,
           static_cast<const T*>(dy), static_cast<const T*>(dh_in), static_cast<const T*>(h), static_cast<const T*>(weight),
           mean, rstd, static_cast<T*>(dx), partial, rows, C, staged);
    launch_sum_partials(partial, blocks, C, static_cast<T*>(dweight), static_cast<T*>(dbias), stream);
  });
}

}  // namespace portlm::cuda
