// Rows of a table by token id, and the gradient of that table. Memory bound.
//
// The gradient adds up rows of equal ids, which the caller has sorted, in chunks of their order: a token that is half of a
// text burdens no block more than others do, and the order of additions depends on the ids alone.
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

constexpr int kBatch = 4;             // rows of a chunk that are on their way at once
constexpr unsigned kColumns = 128;    // threads that share a row of a chunk
constexpr unsigned kSlices = 8;       // threads that share a column where chunks are joined
constexpr int64_t kMostTiles = 65535; // of columns

template <typename T, int V>
__global__ void forward(const int64_t* ids, const T* weight, T* y, unsigned long long* bad, int64_t n, int64_t vocabulary,
                        int64_t C) {
  for (int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; r < n; r += int64_t{gridDim.x} * blockDim.y) {
    const int64_t id = ids[r];
    const bool known = id >= 0 && id < vocabulary;
    if (!known && threadIdx.x == 0) atomicMin(bad, static_cast<unsigned long long>(r));
    for (int64_t i = int64_t{threadIdx.x} * V; i < C; i += int64_t{blockDim.x} * V) {
      float nothing[V];
#pragma unroll
      for (int k = 0; k < V; ++k) nothing[k] = NAN;
      known ? copy<V>(weight + id * C + i, y + r * C + i) : store(y + r * C + i, nothing);
    }
  }
}

// Rows of equal ids that lie side by side in a chunk. What began before the chunk is added up in partial (chunks, 2, C) at
// (chunk, 0), what begins in it and goes on behind it at (chunk, 1); all others are whole.
template <typename T, int V>
__global__ void sum_chunks(const int64_t* sorted, const int64_t* order, const T* dy, T* dweight, float* partial, int64_t n,
                           int64_t length, int64_t vocabulary, int64_t C) {
  const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (column >= C) return;
  for (int64_t c = blockIdx.x; c * length < n; c += gridDim.x) {
    const int64_t begin = c * length, end = begin + length < n ? begin + length : n;
    int64_t id = sorted[begin];
    bool begins = begin == 0 || sorted[begin - 1] != id;
    float* const parts = partial + 2 * c * C + column;
    float sum[V] = {};
    const auto finish = [&](bool ends) {
      if (!begins || !ends)
        store(parts + (begins ? C : 0), sum);
      else if (id >= 0 && id < vocabulary)
        store(dweight + id * C + column, sum);
    };
    for (int64_t i = begin; i < end; i += kBatch) {
      float rows[kBatch][V];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (i + b < end) load(dy + order[i + b] * C + column, rows[b]);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (i + b >= end) break;
        if (sorted[i + b] != id) {
          finish(true);
          id = sorted[i + b];
          begins = true;
#pragma unroll
          for (int k = 0; k < V; ++k) sum[k] = 0.0f;
        }
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += rows[b][k];
      }
    }
    finish(end == n || sorted[end] != id);
  }
}

// What begins in chunk blockIdx.x and goes on behind it, in blocks of (32, kSlices) threads.
template <typename T, int V>
__global__ void join_chunks(const int64_t* sorted, T* dweight, const float* partial, int64_t n, int64_t length,
                            int64_t vocabulary, int64_t C) {
  __shared__ float slices[kSlices][V][32];
  const int64_t column = (int64_t{blockIdx.y} * 32 + threadIdx.x) * V, chunks = (n + length - 1) / length;
  for (int64_t c = blockIdx.x; c + 1 < chunks; c += gridDim.x) {
    const int64_t begin = c * length, end = begin + length, id = sorted[end];
    if (sorted[end - 1] != id || (begin > 0 && sorted[begin - 1] == id)) continue;
    int64_t last = c + 1, above = chunks;  // chunk `last` begins with the id, chunk `above` does not
    while (above - last > 1) {
      const int64_t middle = (last + above) / 2;
      (sorted[middle * length] == id ? last : above) = middle;
    }
    float sum[V] = {};
    for (int64_t part = c + threadIdx.y; part <= last && column < C; part += kSlices) {
      float v[V];
      load(partial + (2 * part + (part == c)) * C + column, v);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += v[k];
    }
    __syncthreads();  // the last sums have been read
#pragma unroll
    for (int k = 0; k < V; ++k) slices[threadIdx.y][k][threadIdx.x] = sum[k];
    __syncthreads();
    if (threadIdx.y != 0 || column >= C || id < 0 || id >= vocabulary) continue;
    for (unsigned s = 1; s < kSlices; ++s)
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += slices[s][k][threadIdx.x];
    store(dweight + id * C + column, sum);
  }
}

}  // namespace

void embedding_fwd(const int64_t* ids, const void* weight, void* y, int64_t* bad, int64_t n, int64_t V, int64_t C,
                   bool is_bfloat16, uintptr_t stream) {
  if (n == 0) return;
  with_access(is_bfloat16, C, {weight, y}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int W = decltype(access)::V;
    const dim3 block = row_tile((C + W - 1) / W);
    launch(forward<T, W>, blocks_for(n, block.y), block, 0, stream, ids, static_cast<const T*>(weight), static_cast<T*>(y),
           reinterpret_cast<unsigned long long*>(bad), n, V, C);
  });
}

void embedding_bwd(const int64_t* sorted, const int64_t* order, const void* dy, void* dweight, float* partial, int64_t n,
                   int64_t length, int64_t V, int64_t C, bool is_bfloat16, uintptr_t stream) {
  if (n == 0 || C == 0) return;
  with_access(is_bfloat16, C, {dy, dweight, partial}, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int W = decltype(access)::V;
    const auto tiles = [&](int64_t columns) { return static_cast<unsigned>((C + columns * W - 1) / (columns * W)); };
    if (tiles(32) > kMostTiles) throw std::runtime_error("embedding: rows are too wide");
    const unsigned chunks = blocks_for(n, length);
    launch(sum_chunks<T, W>, dim3(chunks, tiles(kColumns)), kColumns, 0, stream, sorted, order, static_cast<const T*>(dy),
           static_cast<T*>(dweight), partial, n, length, V, C);
    launch(join_chunks<T, W>, dim3(chunks, tiles(32)), dim3(32, kSlices), 0, stream, sorted, static_cast<T*>(dweight),
           static_cast<const float*>(partial), n, length, V, C);
  });
}

}  // namespace portlm::cuda
