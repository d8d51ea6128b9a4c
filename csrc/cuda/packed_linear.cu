// y = activation(x W^T + bias) for a quantized W and a few rows of x: csrc/cuda/few_rows.cuh on the numbers of packed.cuh.
#include "cuda/few_rows.cuh"
#include "cuda/kernels.h"
#include "cuda/packed.cuh"

namespace portlm::cuda {

void packed_linear(const void* x, const uint8_t* q, const uint16_t* scales, const uint8_t* zeros, const void* bias, void* y,
                   int64_t rows, int64_t N, int64_t K, int64_t group, int64_t bits, int activation, bool is_bfloat16,
                   uintptr_t stream) {
  const PackedMatrix m{q, scales, zeros, K, group};
  if (bits == 4)
    launch_few_rows(PackedWeights<4>{m}, x, bias, y, rows, N, K, activation, is_bfloat16, stream);
  else
    launch_few_rows(PackedWeights<8>{m}, x, bias, y, rows, N, K, activation, is_bfloat16, stream);
}

}  // namespace portlm::cuda
