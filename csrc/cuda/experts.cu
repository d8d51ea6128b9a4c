// A mixture of experts around its matrix products: which experts a row goes through, rows by expert and back, and the gated
// hidden layer with the weight of its choice. A choice is a row and one of its k places, row k + place.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/logits.cuh"

namespace portlm::cuda {
namespace {

constexpr unsigned kWarps = 8;  // of a block, a row for each

__device__ inline uint64_t warp_largest(unsigned long long x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// The sum of e^(row[e] - largest) over all experts, in every thread of the warp.
template <typename T>
__device__ inline float exponentials(const T* row, float largest, int64_t E) {
  float sum = 0.0f;
  for (int64_t e = threadIdx.x % 32; e < E; e += 32) sum += expf(to_float(row[e]) - largest);
  return warp_sum(sum);
}

template <typename T>
__global__ void choose(const T* logits, int64_t* chosen, float* weights, int64_t rows, int64_t E, int64_t k, bool normalize) {
  const unsigned lane = threadIdx.x % 32;
  for (int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; r < rows; r += int64_t{gridDim.x} * kWarps) {
    const T* const row = logits + r * E;
    uint64_t before = 0;  // no two candidates are equal, so the next one is the largest below the last
    float largest = 0.0f, sum = 0.0f;
    for (int64_t place = 0; place < k; ++place) {
      uint64_t found = kNoCandidate;
      for (int64_t e = lane; e < E; e += 32) {
        const uint64_t other = candidate(to_float(row[e]), e);
        found = (place == 0 || other < before) && other > found ? other : found;
      }
      before = found = warp_largest(found);
      const int64_t e = 0xffffffffu - static_cast<uint32_t>(found);
      const float logit = to_float(row[e]);
      if (place == 0) largest = logit;
      const float weight = expf(logit - largest);
      sum += weight;
      if (lane != 0) continue;
      chosen[r * k + place] = e;
      weights[r * k + place] = weight;
    }
    if (!normalize) sum = exponentials(row, largest, E);
    for (int64_t place = 0; lane == 0 && place < k; ++place) weights[r * k + place] /= sum;
  }
}

// d[e] = w_e (dw_e - sum of dw w) for a softmax w over the chosen, or over all experts.
template <typename T>
__global__ void choose_backward(const T* logits, const int64_t* chosen, const float* weights, const float* dweights,
                                T* dlogits, int64_t rows, int64_t E, int64_t k, bool normalize) {
  const unsigned lane = threadIdx.x % 32;
  for (int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; r < rows; r += int64_t{gridDim.x} * kWarps) {
    const T* const row = logits + r * E;
    const int64_t* const places = chosen + r * k;
    const float *const w = weights + r * k, *const dw = dweights + r * k;
    float mean = 0.0f;
    for (int64_t j = 0; j < k; ++j) mean += dw[j] * w[j];
    const float largest = to_float(row[places[0]]), total = normalize ? 1.0f : exponentials(row, largest, E);
    for (int64_t e = lane; e < E; e += 32) {
      float d = normalize ? 0.0f : -mean * expf(to_float(row[e]) - largest) / total;
      for (int64_t j = 0; j < k; ++j)
        if (places[j] == e) d = w[j] * (dw[j] - mean);
      dlogits[r * E + e] = from_float<T>(d);
    }
  }
}

// to (n, C) = the rows of x that choices are of; place[choice] receives where its row is, unless place is nullptr.
template <typename T, int V>
__global__ void gather(const T* x, const int64_t* slot, T* to, int64_t* place, int64_t n, int64_t k, int64_t C) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; i < n; i += int64_t{gridDim.x} * blockDim.y) {
    const int64_t choice = slot[i], r = choice / k;
    if (place && threadIdx.x == 0) place[choice] = i;
    for (int64_t c = int64_t{threadIdx.x} * V; c < C; c += int64_t{blockDim.x} * V) copy<V>(x + r * C + c, to + i * C + c);
  }
}

// y (rows, C) = the sum of the rows of `from` where the k choices of each are, in the order of the choices.
template <typename T, int V>
__global__ void combine(const T* from, const int64_t* place, T* y, int64_t rows, int64_t k, int64_t C) {
  for (int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; r < rows; r += int64_t{gridDim.x} * blockDim.y)
    for (int64_t c = int64_t{threadIdx.x} * V; c < C; c += int64_t{blockDim.x} * V) {
      float sum[V] = {};
      for (int64_t j = 0; j < k; ++j) {
        float v[V];
        load(from + place[r * k + j] * C + c, v);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += v[e];
      }
      store(y + r * C + c, sum);
    }
}

// value = silu(gate) up times the weight of the row's choice, all (n, F).
template <typename T, int V>
__global__ void hidden(const T* gate, const T* up, const float* weights, const int64_t* slot, T* value, int64_t n, int64_t F) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; i < n; i += int64_t{gridDim.x} * blockDim.y) {
    const float weight = weights[slot[i]];
    for (int64_t f = int64_t{threadIdx.x} * V; f < F; f += int64_t{blockDim.x} * V) {
      float g[V], u[V];
      load(gate + i * F + f, g);
      load(up + i * F + f, u);
#pragma unroll
      for (int e = 0; e < V; ++e) g[e] = g[e] / (1.0f + expf(-g[e])) * u[e] * weight;
      store(value + i * F + f, g);
    }
  }
}

// One block per row. grad is the gradient of value, and becomes that of gate.
template <typename T, int V>
__global__ void hidden_backward(const T* gate, const T* up, const float* weights, const int64_t* slot, T* grad, T* dup,
                                T* value, float* dweights, int64_t n, int64_t F) {
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const int64_t choice = slot[i];
    const float weight = weights[choice];
    float total[1] = {0.0f};
    for (int64_t f = int64_t{threadIdx.x} * V; f < F; f += int64_t{blockDim.x} * V) {
      float d[V], g[V], u[V], of[V];
      load(grad + i * F + f, d);
      load(gate + i * F + f, g);
      load(up + i * F + f, u);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        // as in swiglu.cu
        const float x = expf(-g[e]), s = 1.0f / (1.0f + x), rest = fminf(x, 3e38f) * s, silu = g[e] * s;
        const float through = d[e] * weight;
        total[0] += d[e] * silu * u[e];
        of[e] = silu * u[e] * weight;
        d[e] = through * u[e] * s * (1.0f + g[e] * rest);
        g[e] = through * silu;
      }
      store(grad + i * F + f, d);
      store(dup + i * F + f, g);
      store(value + i * F + f, of);
    }
    block_sum(total);
    if (threadIdx.x == 0) dweights[choice] = total[0];
  }
}

template <typename Body>
void with_type(bool is_bfloat16, Body body) {
  is_bfloat16 ? body(bfloat16{}) : body(0.0f);
}

}  // namespace

void experts_choose(const void* logits, int64_t* chosen, float* weights, int64_t rows, int64_t E, int64_t k, int normalize,
                    bool is_bfloat16, uintptr_t stream) {
  if (rows == 0 || k == 0) return;
  with_type(is_bfloat16, [&](auto type) {
    using T = decltype(type);
    launch(choose<T>, blocks_for(rows, kWarps), kWarps * 32, 0, stream, static_cast<const T*>(logits), chosen, weights, rows, E,
           k, normalize != 0);
  });
}

void experts_choose_bwd(const void* logits, const int64_t* chosen, const float* weights, const float* dweights, void* dlogits,
                        int64_t rows, int64_t E, int64_t k, int normalize, bool is_bfloat16, uintptr_t stream) {
  if (rows == 0 || k == 0) return;
  with_type(is_bfloat16, [&](auto type) {
    using T = decltype(type);
    launch(choose_backward<T>, blocks_for(rows, kWarps), kWarps * 32, 0, stream, static_cast<const T*>(logits), chosen, weights,
           dweights, static_cast<T*>(dlogits), rows, E, k, normalize != 0);
  });
}

void experts_gather(const void* x, const int64_t* slot, void* to, int64_t* place, int64_t n, int64_t k, int64_t C,
                    bool is_bfloat16, uintptr_t stream) {
  if (n == 0) return;
  with_access(is_bfloat16, C, {x, to}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const dim3 block = row_tile(C / V);
    launch(gather<T, V>, blocks_for(n, block.y), block, 0, stream, static_cast<const T*>(x), slot, static_cast<T*>(to), place, n,
           k, C);
  });
}

void experts_combine(const void* from, const int64_t* place, void* y, int64_t rows, int64_t k, int64_t C, bool is_bfloat16,
                     uintptr_t stream) {
  if (rows == 0) return;
  with_access(is_bfloat16, C, {from, y}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const dim3 block = row_tile(C / V);
    launch(combine<T, V>, blocks_for(rows, block.y), block, 0, stream, static_cast<const T*>(from), place, static_cast<T*>(y),
           rows, k, C);
  });
}

void experts_hidden_fwd(const void* gate, const void* up, const float* weights, const int64_t* slot, void* value, int64_t n,
                        int64_t F, bool is_bfloat16, uintptr_t stream) {
  if (n == 0) return;
  with_access(is_bfloat16, F, {gate, up, value}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const dim3 block = row_tile(F / V);
    launch(hidden<T, V>, blocks_for(n, block.y), block, 0, stream, static_cast<const T*>(gate), static_cast<const T*>(up),
           weights, slot, static_cast<T*>(value), n, F);
  });
}

void experts_hidden_bwd(const void* gate, const void* up, const float* weights, const int64_t* slot, void* grad, void* dup,
                        void* value, float* dweights, int64_t n, int64_t F, bool is_bfloat16, uintptr_t stream) {
  if (n == 0) return;
  with_access(is_bfloat16, F, {gate, up, grad, dup, value}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    launch(hidden_backward<T, V>, row_blocks(n), row_threads(F > 0 ? F : 1, V), 0, stream, static_cast<const T*>(gate),
           static_cast<const T*>(up), weights, slot, static_cast<T*>(grad), static_cast<T*>(dup), static_cast<T*>(value),
           dweights, n, F);
  });
}

}  // namespace portlm::cuda
