// SwiGLU gate, y = silu(gate) * up, forward and backward. Memory bound: each array is read or written once.
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

constexpr unsigned kThreads = 256;

template <typename T, int V>
__global__ void forward(const T* gate, const T* up, T* y, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (i >= n) return;  // n is a multiple of V
  float g[V], u[V];
  load(gate + i, g);
  load(up + i, u);
#pragma unroll
  for (int k = 0; k < V; ++k) g[k] = g[k] / (1.0f + expf(-g[k])) * u[k];
  store(y + i, g);
}

template <typename T, int V>
__global__ void backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (i >= n) return;
  float d[V], g[V], u[V];
  load(dy + i, d);
  load(gate + i, g);
  load(up + i, u);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    // silu'(g) = s (1 + g (1 - s)) for s = 1 / (1 + e), where 1 - s = e s does not cancel
    const float e = expf(-g[k]), s = 1.0f / (1.0f + e), rest = fminf(e, 3e38f) * s;
    const float through = d[k] * s;
    u[k] *= through * (1.0f + g[k] * rest);
    g[k] *= through;
  }
  store(dgate + i, u);
  store(dup + i, g);
}

inline unsigned blocks_for(int64_t n, int V) {
  const int64_t blocks = (n / V + kThreads - 1) / kThreads;
  if (blocks >= int64_t{1} << 31) throw std::runtime_error("swiglu: more elements than one launch can address");
  return static_cast<unsigned>(blocks);
}

}  // namespace

void swiglu_fwd(const void* gate, const void* up, void* y, int64_t n, bool is_bfloat16, uintptr_t stream) {
  if (n == 0) return;  // launching zero blocks is an error
  with_access(is_bfloat16, n, {gate, up, y}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    launch(forward<T, V>, blocks_for(n, V), kThreads, 0, stream, static_cast<const T*>(gate), static_cast<const T*>(up),
           static_cast<T*>(y), n);
  });
}

void swiglu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t n, bool is_bfloat16,
                uintptr_t stream) {
  if (n == 0) return;
  with_access(is_bfloat16, n, {dy, gate, up, dgate, dup}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    launch(backward<T, V>, blocks_for(n, V), kThreads, 0, stream, static_cast<const T*>(dy), static_cast<const T*>(gate),
           static_cast<const T*>(up), static_cast<T*>(dgate), static_cast<T*>(dup), n);
  });
}

}  // namespace portlm::cuda
