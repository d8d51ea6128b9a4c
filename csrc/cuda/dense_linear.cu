// y = activation(x W^T + bias) for a W of float32, bfloat16 or float16 and a few rows of x: csrc/cuda/few_rows.cuh on numbers
// as they lie there. W of 16 bits is half the bytes that a product of float32 would read.
#include "cuda/few_rows.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

// V numbers at a time: 16 bytes of them, or 1 where rows do not begin at multiples of that.
template <typename T, int V>
struct DenseWeights {
  static constexpr int kChunk = V;
  static constexpr int kStep = V < 4 ? V : 4;
  static constexpr bool kScaled = false;
  using Raw = Pack<T, V>;

  const T* weight;  // (N, K)
  int64_t K;

  __device__ Raw load(int64_t n, int64_t chunk) const { return *reinterpret_cast<const Raw*>(weight + n * K + chunk * V); }

  template <int S>
  static __device__ void decode(const Raw& raw, float (&w)[kStep]) {
#pragma unroll
    for (int i = 0; i < kStep; ++i) w[i] = to_float(raw.v[S * kStep + i]);
  }

  static __host__ __device__ constexpr float unit(int) { return 1.0f; }
};

template <typename T>
void launch_dense(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t N, int64_t K,
                  int activation, bool is_bfloat16, uintptr_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto* const w = static_cast<const T*>(weight);
  if (K % V == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0)
    launch_few_rows(DenseWeights<T, V>{w, K}, x, bias, y, rows, N, K, activation, is_bfloat16, stream);
  else
    launch_few_rows(DenseWeights<T, 1>{w, K}, x, bias, y, rows, N, K, activation, is_bfloat16, stream);
}

}  // namespace

void dense_linear(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t N, int64_t K,
                  int weight_type, int activation, bool is_bfloat16, uintptr_t stream) {
  const auto run = weight_type == 0 ? launch_dense<float> : weight_type == 1 ? launch_dense<bfloat16> : launch_dense<__half>;
  run(x, weight, bias, y, rows, N, K, activation, is_bfloat16, stream);
}

}  // namespace portlm::cuda
