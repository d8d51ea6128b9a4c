// Kernels with a fault each, to see that the emulation sees it. All reverse n floats, or should.
#include "cuda/common.cuh"

namespace {

using portlm::cuda::shared_memory;

enum Fault { none, no_barrier, divided_barrier, ended_thread, behind_memory, unwritten_memory, unwritten_array, part_of_a_warp, misaligned };

__global__ void reverse(float* x, unsigned n, int fault) {
  float* const memory = shared_memory();
  __shared__ float first;
  const unsigned i = threadIdx.x;
  if (fault != unwritten_memory || i != 1) memory[fault == behind_memory ? i + 1 : i] = x[i];
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
