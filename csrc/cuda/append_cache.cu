// A key/value cache with new positions behind its old ones. Memory bound: everything is read and written once.
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

// Head (b, k) of each turn of blockIdx.y; blockIdx.x and threads share its accesses.
template <typename T, int V>
__global__ void append(const T* past, const T* fresh, T* present, int64_t heads, int64_t K, int64_t P, int64_t T_, int64_t D) {
  const int64_t old = P * D / V, all = (P + T_) * D / V, width = D / V, turn = int64_t{gridDim.x} * blockDim.x;
  for (int64_t head = blockIdx.y; head < heads; head += gridDim.y) {
    const int64_t b = head / K, k = head % K;
    T* const to = present + head * (P + T_) * D;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all; i += turn) {
      if (i < old) {
        copy<V>(past + head * P * D + i * V, to + i * V);
        continue;
      }
      const auto at = static_cast<unsigned>(i - old), row = static_cast<unsigned>(width);
      const int64_t t = at / row, column = at % row;
      copy<V>(fresh + ((b * T_ + t) * K + k) * D + column * V, to + i * V);
    }
  }
}

}  // namespace

void append_cache(const void* past, const void* fresh, void* present, int64_t B, int64_t K, int64_t P, int64_t T, int64_t D,
                  bool is_bfloat16, uintptr_t stream) {
  if (B * K * (P + T) * D == 0) return;
  if (T * D >> 31) throw std::runtime_error("append_cache: more new elements of a head than one launch counts");
  with_access(is_bfloat16, D, {past, fresh, present}, [&](auto access) {
    using Element = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    const int64_t heads = B * K;
    const dim3 grid(blocks_for((P + T) * D / V, kTileThreads), static_cast<unsigned>(heads < 65535 ? heads : 65535));
    launch(append<Element, V>, grid, kTileThreads, 0, stream, static_cast<const Element*>(past),
           static_cast<const Element*>(fresh), static_cast<Element*>(present), heads, K, P, T, D);
  });
}

}  // namespace portlm::cuda
