// AdamW (Loshchilov and Hutter 2019) over all tensors of a model: the gradient norm, then clip and update in one pass.
//
// Memory bound. Tensors are cut into chunks of at most kChunk elements, one block each, so that hundreds of small
// tensors cost no more launches than one large one. Sums of squares are float64, in an order fixed by the chunks.
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

constexpr unsigned kThreads = 256;

// One block's share: elements [first, last) of tensor `index`.
struct Chunk {
  int64_t index, first, last;
  // chunks is (count, 2): tensor and first element.
  __device__ Chunk(const int64_t* chunks, const int64_t* sizes, int64_t length) {
    index = chunks[2 * int64_t{blockIdx.x}];
    first = chunks[2 * int64_t{blockIdx.x} + 1];
    last = first + length < sizes[index] ? first + length : sizes[index];
  }
};

template <typename T>
__device__ inline T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Sum over the block, valid in thread 0.
__device__ inline double block_sum_double(double x) {
  __shared__ double partial[32];
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
  return total;
}

__global__ void squares(const int64_t* table, const int64_t* chunks, int64_t count, int64_t length, double* partial) {
  const int64_t* sizes = table + 4 * count;
  const Chunk chunk(chunks, sizes, length);
  const float* grad = pointer<const float>(table[count + chunk.index]);
  double total = 0.0;
  for (int64_t i = chunk.first + threadIdx.x; i < chunk.last; i += kThreads) {
    const double g = grad[i];
    total += g * g;
  }
  total = block_sum_double(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void norm_of(const double* partial, int64_t n, double* norm) {
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) total += partial[i];
  total = block_sum_double(total);
  if (threadIdx.x == 0) *norm = sqrt(total);
}

struct Coefficients {
  float keep_mean, beta_square, keep_square, eps, decay, rate, root_correction;
};

__device__ inline void update(float& p, float g, float& m, float& v, const Coefficients& c) {
  m += (g - m) * c.keep_mean;
  v = v * c.beta_square + g * g * c.keep_square;
  p = p * c.decay - c.rate * (m / (sqrtf(v) * c.root_correction + c.eps));
}

__global__ void step(const int64_t* table, const int64_t* chunks, const float* coefficients, int64_t count, int64_t length,
                     double max_norm, const double* norm) {
  const double size = *norm;
  if (!isfinite(size)) return;  // nothing is written
  const float clip = static_cast<float>(fmin(1.0, max_norm / (size + 1e-6)));
  const int64_t* sizes = table + 4 * count;
  const Chunk chunk(chunks, sizes, length);
  float* param = pointer<float>(table[chunk.index]);
  const float* grad = pointer<const float>(table[count + chunk.index]);
  float* mean = pointer<float>(table[2 * count + chunk.index]);
  float* square = pointer<float>(table[3 * count + chunk.index]);
  const float* c = coefficients + 7 * chunk.index;
  const Coefficients k{c[0], c[1], c[2], c[3], c[4], c[5], c[6]};
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
                              reinterpret_cast<uintptr_t>(mean) | reinterpret_cast<uintptr_t>(square);
  int64_t i = chunk.first + threadIdx.x;
  if (addresses % 16 == 0) {  // chunks begin at multiples of 4
    const int64_t whole = chunk.first + (chunk.last - chunk.first) / 4 * 4;
    for (int64_t j = chunk.first + 4 * int64_t{threadIdx.x}; j < whole; j += 4 * kThreads) {
      float p[4], g[4], m[4], v[4];
      load(param + j, p);
      load(grad + j, g);
      load(mean + j, m);
      load(square + j, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) update(p[e], g[e] * clip, m[e], v[e], k);
      store(param + j, p);
      store(mean + j, m);
      store(square + j, v);
    }
    i = whole + threadIdx.x;
  }
  for (; i < chunk.last; i += kThreads) update(param[i], grad[i] * clip, mean[i], square[i], k);
}

}  // namespace

void adamw_step(const int64_t* table, int64_t count, const int64_t* chunks, int64_t chunk_count, int64_t chunk_length,
                const float* coefficients, double max_norm, double* partial, double* norm, uintptr_t stream) {
  if (chunk_count == 0) return;
  const auto blocks = static_cast<unsigned>(chunk_count);
  launch(squares, blocks, kThreads, 0, stream, table, chunks, count, chunk_length, partial);
  launch(norm_of, 1, kThreads, 0, stream, partial, chunk_count, norm);
  launch(step, blocks, kThreads, 0, stream, table, chunks, coefficients, count, chunk_length, max_norm, norm);
}

}  // namespace portlm::cuda
