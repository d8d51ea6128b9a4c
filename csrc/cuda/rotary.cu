// Rotary position embedding (Su et al. 2021), halves convention: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
//
// Memory bound: x is read and y written once, 16 bytes at a time; a token's angles are read again for each head, from the
// caches.
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

// Where the heads are: x has them head_stride elements apart, y without gaps; tokens are x_stride and y_stride apart.
struct Heads {
  int64_t x_stride, head_stride, y_stride, tokens, period;
  unsigned H, D, half;  // half of the columns that are rotated; the others are copied
  float sign;           // of the angle
};

template <typename T, int V>
__global__ void rotate(const T* x, const T* cos, const T* sin, const int64_t* positions, T* y, Heads n) {
  const unsigned pairs = n.half / V, per_head = pairs + (n.D - 2 * n.half) / V, items = n.H * per_head;
  for (int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; t < n.tokens; t += int64_t{gridDim.x} * blockDim.y) {
    const int64_t row = positions ? positions[t] : static_cast<unsigned>(t) % static_cast<unsigned>(n.period);
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
      const unsigned head = item / per_head, place = item % per_head, column = place * V;
      const T* const from = x + t * n.x_stride + head * n.head_stride;
      T* const to = y + t * n.y_stride + int64_t{head} * n.D;
      if (place >= pairs) {
        copy<V>(from + n.half + column, to + n.half + column);
        continue;
      }
      float x1[V], x2[V], c[V], s[V];
      load(from + column, x1);
      load(from + n.half + column, x2);
      load(cos + row * n.half + column, c);
      load(sin + row * n.half + column, s);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float first = x1[k], angle = s[k] * n.sign;
        x1[k] = first * c[k] - x2[k] * angle;
        x2[k] = x2[k] * c[k] + first * angle;
      }
      store(to + column, x1);
      store(to + n.half + column, x2);
    }
  }
}

void rotate_heads(const void* x, const void* cos, const void* sin, const int64_t* positions, void* y, const Heads& n,
                  bool is_bfloat16, uintptr_t stream) {
  if (n.tokens == 0 || n.H == 0 || n.D == 0) return;
  if (n.tokens >> 31) throw std::runtime_error("rotary: more tokens than one launch counts");
  with_access(is_bfloat16, n.half | int64_t{n.D} | n.x_stride | n.head_stride | n.y_stride, {x, cos, sin, y}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const dim3 block = row_tile(int64_t{n.H} * (n.D - n.half) / V);
    launch(rotate<T, V>, blocks_for(n.tokens, block.y), block, 0, stream, static_cast<const T*>(x), static_cast<const T*>(cos),
           static_cast<const T*>(sin), positions, static_cast<T*>(y), n);
  });
}

}  // namespace

void rotary_fwd(const void* x, int64_t x_stride, int64_t head_stride, const void* cos, const void* sin,
                const int64_t* positions, void* y, int64_t tokens, int64_t period, int64_t H, int64_t D, int inverse,
                bool is_bfloat16, uintptr_t stream) {
  const auto heads = static_cast<unsigned>(H), width = static_cast<unsigned>(D);
  const Heads n{x_stride, head_stride, H * D, tokens, period, heads, width, width / 2, inverse ? -1.0f : 1.0f};
  rotate_heads(x, cos, sin, positions, y, n, is_bfloat16, stream);
}

void rotary_heads(const void* x, int64_t x_stride, int64_t head_stride, const void* cos, const void* sin,
                  const int64_t* positions, void* y, int64_t y_stride, int64_t tokens, int64_t H, int64_t D, int64_t R,
                  bool is_bfloat16, uintptr_t stream) {
  const auto heads = static_cast<unsigned>(H), width = static_cast<unsigned>(D), half = static_cast<unsigned>(R / 2);
  rotate_heads(x, cos, sin, positions, y, {x_stride, head_stride, y_stride, tokens, 1, heads, width, half, 1.0f}, is_bfloat16,
               stream);
}

}  // namespace portlm::cuda
