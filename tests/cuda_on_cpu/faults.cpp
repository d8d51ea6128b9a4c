// Kernels with a fault each, to see that the emulation sees it. All reverse n floats, or should.
#include "cuda/common.cuh"
#include "cuda/mma.cuh"

namespace {

using portlm::cuda::shared_memory;

enum Fault {
  none, no_barrier, divided_barrier, ended_thread, behind_memory, unwritten_memory, unwritten_array, part_of_a_warp, misaligned, copied,
  late_copy, misaligned_copy
};

__global__ void reverse(float* x, unsigned n, int fault) {
  float* const memory = shared_memory();
  __shared__ float first;
  const unsigned i = threadIdx.x;
  if (fault >= copied) {  // the same by copies of four floats each, which are waited for, or not
    using portlm::cuda::bfloat16;
    const unsigned from = fault == misaligned_copy ? 1 : 0;
    if (i % 4 == 0)
      portlm::cuda::copy_async(reinterpret_cast<bfloat16*>(memory + i), reinterpret_cast<const bfloat16*>(x + i + from), true);
    portlm::cuda::commit_copies();
    fault == late_copy ? portlm::cuda::wait_for_copies<1>() : portlm::cuda::wait_for_copies<0>();
  } else if (fault != unwritten_memory || i != 1) {
    memory[fault == behind_memory ? i + 1 : i] = x[i];
  }
  if (fault != unwritten_array && i == 0) first = x[0];
  if (fault == ended_thread && i == 0) return;
  if (fault == divided_barrier && i % 2)
    __syncthreads();
  else if (fault != no_barrier)
    __syncthreads();
  if (fault == part_of_a_warp) x[i] = portlm::cuda::warp_sum(x[i]);
  if (fault == misaligned) {
    float pair[2];
    portlm::cuda::load(x + 1, pair);
  }
  x[i] = memory[n - 1 - i];
  if (i == n - 1) x[i] = first;
}

// c (16, 8) += a (16, 16) b (16, 8), float32 that bfloat16 holds, by one warp. Matrices reach it by the loads of kernels.
__global__ void multiply(const float* a, const float* b, float* c) {
  using portlm::cuda::bfloat16, portlm::cuda::from_float;
  bfloat16* const left = reinterpret_cast<bfloat16*>(shared_memory());
  bfloat16* const right = left + 16 * 16;
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 16 * 16; i += 32) left[i] = from_float<bfloat16>(a[i]);
  for (unsigned i = lane; i < 16 * 8; i += 32) right[i] = from_float<bfloat16>(b[i]);
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  portlm::cuda::load_matrices(of_a, left + lane % 16 * 16 + lane / 16 * 8);
  portlm::cuda::load_matrices_transposed(of_b, right + lane % 16 * 8);  // two matrices, twice
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) sums[i] = c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2];
  portlm::cuda::multiply_add(sums, of_a, of_b[0], of_b[1]);
  for (unsigned i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

}  // namespace

// Returns nullptr or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_reverse(float* x, unsigned n, int fault) {
  static std::string message;
  try {
    portlm::cuda::launch(reverse, 1, n, n * sizeof(float), 0, x, n, fault);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_multiply(const float* a, const float* b, float* c) {
  static std::string message;
  try {
    portlm::cuda::launch(multiply, 1, 32, (16 * 16 + 16 * 8) * 2, 0, a, b, c);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
