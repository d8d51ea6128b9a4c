// What a row of logits says of a token: how probable it is, and which is the most probable one; see csrc/cpu/token_scores.cpp.
//
// One block per row, which reads it twice: for its largest logit, and for the sum of exponentials, in float64.
#include "cuda/kernels.h"
#include "cuda/logits.cuh"

namespace portlm::cuda {
namespace {

constexpr unsigned kThreads = 512;

// The sum of x over the block, in an order that depends on nothing, in thread 0.
__device__ inline double block_total(double x) {
  __shared__ double partial[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // the previous row's sums have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  for (unsigned w = 0; threadIdx.x == 0 && w < kThreads / 32; ++w) total += partial[w];
  return total;
}

template <int V>
__global__ void score(const float* logits, int64_t rows, int64_t n, int64_t first, const int64_t* targets, double* parts) {
  const int64_t begin = int64_t{threadIdx.x} * V, turn = int64_t{kThreads} * V;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const float* const row = logits + r * n;
    uint64_t found = kNoCandidate;
    for (int64_t i = begin; i < n; i += turn) {
      float x[V];
      load(row + i, x);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const uint64_t other = candidate(x[k], i + k);
        found = other > found ? other : found;
      }
    }
    const Largest top = largest_of(block_largest(found));
    double* const part = parts + 4 * r;
    if (threadIdx.x == 0) {
      part[0] = top.value;
      part[1] = static_cast<double>(top.id < 0 ? -1 : first + top.id);
    }
    if (!targets) continue;
    double sum = 0.0;
    for (int64_t i = begin; top.id >= 0 && i < n; i += turn) {
      float x[V];
      load(row + i, x);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const double difference = static_cast<double>(x[k]) - top.value;
        sum += scaled_exp(difference > -700.0 ? difference : -700.0, 0);  // nothing beside 1 below
      }
    }
    sum = block_total(sum);
    if (threadIdx.x != 0) continue;
    const int64_t target = targets[r] - first;
    part[2] = sum;
    part[3] = target >= 0 && target < n ? row[target] : -INFINITY;
  }
}

}  // namespace

void score_logits(const float* logits, int64_t rows, int64_t n, int64_t first, const int64_t* targets, double* parts,
                  uintptr_t stream) {
  if (rows == 0) return;
  if (n >> 32) throw std::runtime_error("score_logits: more logits in a row than ids are counted");
  with_float_access(n, {logits}, [&](auto access) {
    constexpr int V = decltype(access)::V;
    launch(score<V>, row_blocks(rows), kThreads, 0, stream, logits, rows, n, first, targets, parts);
  });
}

}  // namespace portlm::cuda
