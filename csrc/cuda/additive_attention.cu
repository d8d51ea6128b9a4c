// Additive attention (Bahdanau et al. 2015): the score of a query and a key is a weighted sum over tanh of their sum.
//
// The tanh bounds it, and backward computes it again where it is needed, once for each of queries, keys and v, rather than
// keep B T S A of them. Float32; each sum in an order that depends on the sizes alone.
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

constexpr unsigned kThreads = 128;
constexpr unsigned kWarps = kThreads / 32;
constexpr int kSlices = 8;  // threads that share a column of dv

struct Sizes {
  int64_t B, T, S, A, C;
};

// Whether the mask (B, S), or nullptr, hides a key.
__device__ inline bool hidden(const Sizes& n, const int64_t* mask, int64_t b, int64_t s) { return mask && mask[b * n.S + s] == 0; }

// The sum of term(i) for i < n, in every thread of the warp.
template <typename Term>
__device__ inline float warp_total(int64_t n, Term term) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) sum += term(i);
  return warp_sum(sum);
}

// The largest x of the block, NaN left out, in every thread.
__device__ inline float block_max(float x) {
  __shared__ float largest[kWarps];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();  // the previous row's values have been read
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (unsigned w = 0; w < kWarps; ++w) x = fmaxf(x, largest[w]);
  return x;
}

// One block per query.
__global__ void forward(const float* query, const float* keys, const float* values, const float* v, const int64_t* mask,
                        float* context, float* weights, Sizes n) {
  for (int64_t row = blockIdx.x; row < n.B * n.T; row += gridDim.x) {
    const int64_t b = row / n.T;
    const float* const q = query + row * n.A;
    float* const w = weights + row * n.S;
    for (int64_t s = threadIdx.x / 32; s < n.S; s += kWarps) {
      const float* const k = keys + (b * n.S + s) * n.A;
      const float score = warp_total(n.A, [=](int64_t i) { return v[i] * tanhf(q[i] + k[i]); });
      if (threadIdx.x % 32 == 0) w[s] = score;
    }
    __syncthreads();
    float largest = -INFINITY, total[1] = {0.0f};
    for (int64_t s = threadIdx.x; s < n.S; s += kThreads)
      if (!hidden(n, mask, b, s)) largest = fmaxf(largest, w[s]);
    largest = block_max(largest);
    for (int64_t s = threadIdx.x; s < n.S; s += kThreads) {
      w[s] = hidden(n, mask, b, s) ? 0.0f : expf(w[s] - largest);  // NaN makes the total NaN, and with it the row
      total[0] += w[s];
    }
    block_sum(total);
    for (int64_t s = threadIdx.x; s < n.S; s += kThreads)
      if (!hidden(n, mask, b, s)) w[s] /= total[0];
    __syncthreads();
    for (int64_t c = threadIdx.x; c < n.C; c += kThreads) {
      float sum = 0.0f;
      for (int64_t s = 0; s < n.S; ++s)
        if (!hidden(n, mask, b, s)) sum = fmaf(w[s], values[(b * n.S + s) * n.C + c], sum);
      context[row * n.C + c] = sum;
    }
  }
}

// One block per query: the gradients of its scores, and its own.
__global__ void backward_queries(const float* dcontext, const float* dweights, const float* query, const float* keys,
                                 const float* values, const float* v, const int64_t* mask, const float* weights,
                                 float* dscores, float* dquery, Sizes n) {
  for (int64_t row = blockIdx.x; row < n.B * n.T; row += gridDim.x) {
    const int64_t b = row / n.T;
    const float* const w = weights + row * n.S;
    float* const d = dscores + row * n.S;
    for (int64_t s = threadIdx.x / 32; s < n.S; s += kWarps) {
      const float* const value = values + (b * n.S + s) * n.C;
      const float upstream =
          dcontext ? warp_total(n.C, [=](int64_t i) { return dcontext[row * n.C + i] * value[i]; }) : 0.0f;
      if (threadIdx.x % 32 == 0) d[s] = upstream + (dweights ? dweights[row * n.S + s] : 0.0f);
    }
    __syncthreads();
    float mean[1] = {0.0f};
    for (int64_t s = threadIdx.x; s < n.S; s += kThreads) mean[0] += w[s] * d[s];
    block_sum(mean);
    for (int64_t s = threadIdx.x; s < n.S; s += kThreads) d[s] = w[s] * (d[s] - mean[0]);
    __syncthreads();
    for (int64_t a = threadIdx.x; a < n.A; a += kThreads) {
      const float q = query[row * n.A + a];
      float sum = 0.0f;
      for (int64_t s = 0; s < n.S; ++s) {
        if (hidden(n, mask, b, s)) continue;
        const float h = tanhf(q + keys[(b * n.S + s) * n.A + a]);
        sum = fmaf(d[s], 1.0f - h * h, sum);
      }
      dquery[row * n.A + a] = sum * v[a];
    }
  }
}

// One block per key: its gradient, and that of its value.
__global__ void backward_keys(const float* dcontext, const float* query, const float* keys, const float* v,
                              const int64_t* mask, const float* weights, const float* dscores, float* dkeys, float* dvalues,
                              Sizes n) {
  for (int64_t at = blockIdx.x; at < n.B * n.S; at += gridDim.x) {
    const int64_t b = at / n.S, s = at % n.S, queries = hidden(n, mask, b, s) ? 0 : n.T;
    for (int64_t a = threadIdx.x; a < n.A; a += kThreads) {
      const float k = keys[at * n.A + a];
      float sum = 0.0f;
      for (int64_t t = 0; t < queries; ++t) {
        const float h = tanhf(query[(b * n.T + t) * n.A + a] + k);
        sum = fmaf(dscores[(b * n.T + t) * n.S + s], 1.0f - h * h, sum);
      }
      dkeys[at * n.A + a] = sum * v[a];
    }
    for (int64_t c = threadIdx.x; c < n.C; c += kThreads) {
      float sum = 0.0f;
      for (int64_t t = 0; dcontext && t < queries; ++t)
        sum = fmaf(weights[(b * n.T + t) * n.S + s], dcontext[(b * n.T + t) * n.C + c], sum);
      dvalues[at * n.C + c] = sum;
    }
  }
}

// Block (x, y) of (32, kSlices) threads: 32 columns of v's gradient for row y of the batch; each slice adds up every
// kSlices-th score.
__global__ void backward_v(const float* query, const float* keys, const int64_t* mask, const float* dscores, float* dv,
                           Sizes n) {
  __shared__ float slices[kSlices][32];
  const int64_t a = int64_t{blockIdx.x} * 32 + threadIdx.x;
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.y; a < n.A && i < n.T * n.S; i += kSlices) {
      const int64_t t = i / n.S, s = i % n.S;
      if (hidden(n, mask, b, s)) continue;
      const float h = tanhf(query[(b * n.T + t) * n.A + a] + keys[(b * n.S + s) * n.A + a]);
      sum = fmaf(dscores[(b * n.T + t) * n.S + s], h, sum);
    }
    __syncthreads();  // the last row's sums have been read
    slices[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && a < n.A) {
      for (int i = 1; i < kSlices; ++i) sum += slices[i][threadIdx.x];
      dv[b * n.A + a] = sum;
    }
  }
}

}  // namespace

void additive_attention_fwd(const float* query, const float* keys, const float* values, const float* v, const int64_t* mask,
                            float* context, float* weights, int64_t B, int64_t T, int64_t S, int64_t A, int64_t C,
                            uintptr_t stream) {
  if (B * T == 0) return;
  launch(forward, row_blocks(B * T), kThreads, 0, stream, query, keys, values, v, mask, context, weights, Sizes{B, T, S, A, C});
}

void additive_attention_bwd(const float* dcontext, const float* dweights, const float* query, const float* keys,
                            const float* values, const float* v, const int64_t* mask, const float* weights, float* dscores,
                            float* dquery, float* dkeys, float* dvalues, float* dv, int64_t B, int64_t T, int64_t S, int64_t A,
                            int64_t C, uintptr_t stream) {
  const Sizes n{B, T, S, A, C};
  if (B * T > 0)
    launch(backward_queries, row_blocks(B * T), kThreads, 0, stream, dcontext, dweights, query, keys, values, v, mask,
           weights, dscores, dquery, n);
  if (B * S > 0)
    launch(backward_keys, row_blocks(B * S), kThreads, 0, stream, dcontext, query, keys, v, mask, weights, dscores, dkeys,
           dvalues, n);
  if (B * A > 0) {
    const dim3 grid(static_cast<unsigned>((A + 31) / 32), static_cast<unsigned>(B < 65535 ? B : 65535));
    launch(backward_v, grid, dim3(32, kSlices), 0, stream, query, keys, mask, dscores, dv, n);
  }
}

}  // namespace portlm::cuda
