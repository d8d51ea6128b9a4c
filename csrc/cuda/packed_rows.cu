// Rows of a quantized matrix, some or all, as float32 or bfloat16. Memory bound: a thread reads four bytes and writes what
// they mean.
#include "cuda/kernels.h"
#include "cuda/packed.cuh"

namespace portlm::cuda {
namespace {

constexpr int64_t kThreads = 256;

template <int Bits, typename T>
__global__ void rows_of(PackedMatrix m, const int64_t* ids, T* y, int64_t n, int64_t V) {
  constexpr int kNumbers = 32 / Bits;  // of a thread
  const int64_t words = m.K / kNumbers, turn = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n * words; i += turn) {
    const int64_t word = i % words, g = word * kNumbers / m.group, id = ids ? ids[i / words] : i / words;
    float w[kNumbers];
    if (id < 0 || id >= V) {
#pragma unroll
      for (int k = 0; k < kNumbers; ++k) w[k] = __uint_as_float(0x7fc00000u);  // NaN
    } else {
      const uint32_t numbers = *reinterpret_cast<const uint32_t*>(m.q + (id * m.K + word * kNumbers) * Bits / 8);
      const float scale = __half2float(m.scales[id * m.groups + g]);
      int zero = 1 << (Bits - 1);
      if (m.zeros) {
        const uint8_t* const row = m.zeros + id * ((m.groups * Bits + 7) / 8);
        zero = Bits == 8 ? row[g] : row[g / 2] >> g % 2 * 4 & 15;
      }
#pragma unroll
      for (int k = 0; k < kNumbers; ++k)
        w[k] = scale * static_cast<float>(static_cast<int>(numbers >> Bits * k & ((1u << Bits) - 1)) - zero);
    }
    store(y + i * kNumbers, w);
  }
}

template <int Bits, typename T>
void launch_rows_of(const PackedMatrix& m, const int64_t* ids, T* y, int64_t n, int64_t V, uintptr_t stream) {
  const int64_t words = n * m.K * Bits / 32;
  if (words > 0) launch(rows_of<Bits, T>, row_blocks((words + kThreads - 1) / kThreads), kThreads, 0, stream, m, ids, y, n, V);
}

}  // namespace

void packed_rows(const int64_t* ids, const uint8_t* q, const uint16_t* scales, const uint8_t* zeros, void* y, int64_t n,
                 int64_t V, int64_t K, int64_t group, int64_t bits, bool is_bfloat16, uintptr_t stream) {
  const PackedMatrix m{q, scales, zeros, K, group};
  if (is_bfloat16) {
    auto* const to = static_cast<bfloat16*>(y);
    bits == 4 ? launch_rows_of<4>(m, ids, to, n, V, stream) : launch_rows_of<8>(m, ids, to, n, V, stream);
  } else {
    auto* const to = static_cast<float*>(y);
    bits == 4 ? launch_rows_of<4>(m, ids, to, n, V, stream) : launch_rows_of<8>(m, ids, to, n, V, stream);
  }
}

}  // namespace portlm::cuda
