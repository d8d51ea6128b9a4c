// The part of linear_cross_entropy that is no matrix product: from the logits of a chunk of rows, each row's loss and,
// in place of the logits, its gradient. Two passes over a row: one finds the maximum and the sum of exponentials
// together (Milakov and Gimelshein 2018), one writes the gradient.
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

// A sum of exponentials, sum e^(x - max), that more terms can be added to.
struct Softmax {
  float max = -INFINITY;
  float sum = 0.0f;

  // Without the test, -inf - -inf would turn a row's empty start into NaN.
  __device__ void rescale(float top) {
    if (top > max) {
      sum *= expf(max - top);
      max = top;
    }
  }
  __device__ void merge(float other_max, float other_sum) {
    rescale(other_max);
    sum += other_max == -INFINITY ? other_sum : other_sum * expf(other_max - max);
  }
};

__device__ inline Softmax warp_merge(Softmax s) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const float max = __shfl_xor_sync(0xffffffffu, s.max, offset), sum = __shfl_xor_sync(0xffffffffu, s.sum, offset);
    s.merge(max, sum);
  }
  return s;
}

__device__ inline Softmax block_merge(Softmax s) {
  __shared__ float maxima[32], sums[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  s = warp_merge(s);
  __syncthreads();  // the previous row's values have been read
  if (lane == 0) {
    maxima[warp] = s.max;
    sums[warp] = s.sum;
  }
  __syncthreads();
  s.max = lane < warps ? maxima[lane] : -INFINITY;
  s.sum = lane < warps ? sums[lane] : 0.0f;
  return warp_merge(s);
}

template <typename T, int V>
__global__ void cross_entropy_rows(T* logits, const int64_t* targets, float* losses, const float* scale, int64_t rows,
                                   int64_t vocabulary, int64_t ignore_index, bool gradients) {
  const int64_t first = int64_t{threadIdx.x} * V, turn = int64_t{blockDim.x} * V;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    T* row = logits + r * vocabulary;
    const int64_t target = targets[r];
    if (target == ignore_index) {
      const float zero[V] = {};
      for (int64_t i = first; gradients && i < vocabulary; i += turn) store(row + i, zero);
      if (threadIdx.x == 0) losses[r] = 0.0f;
      continue;
    }
    Softmax s;
    for (int64_t i = first; i < vocabulary; i += turn) {
      float v[V];
      load(row + i, v);
      float top = v[0];
#pragma unroll
      for (int k = 1; k < V; ++k) top = fmaxf(top, v[k]);
      s.rescale(top);
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (v[k] != -INFINITY) s.sum += expf(v[k] - s.max);  // NaN passes the test, and makes the loss NaN
    }
    s = block_merge(s);
    const bool valid = target >= 0 && target < vocabulary;
    if (threadIdx.x == 0) losses[r] = valid ? logf(s.sum) + s.max - to_float(row[target]) : NAN;
    if (!gradients) continue;
    __syncthreads();  // the target's logit has been read, and may be overwritten
    const float weight = *scale, inverse = weight / s.sum;
    for (int64_t i = first; i < vocabulary; i += turn) {
      float v[V];
      load(row + i, v);
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = expf(v[k] - s.max) * inverse - (i + k == target ? weight : 0.0f);
      store(row + i, v);
    }
  }
}

}  // namespace

void cross_entropy(void* logits, const int64_t* targets, float* losses, const float* scale, int64_t rows,
                   int64_t vocabulary, int64_t ignore_index, bool gradients, bool is_bfloat16, uintptr_t stream) {
  if (rows == 0 || vocabulary == 0) return;
  with_access(is_bfloat16, vocabulary, {logits}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    launch(cross_entropy_rows<T, V>, row_blocks(rows), row_threads(vocabulary, V), 0, stream, static_cast<T*>(logits),
           targets, losses, scale, rows, vocabulary, ignore_index, gradients);
  });
}

}  // namespace portlm::cuda
