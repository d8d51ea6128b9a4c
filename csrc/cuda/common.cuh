// What the CUDA kernels share: error checks, 16-byte loads of float32 and bfloat16, and sums over a warp or block.
//
// Arithmetic is float32 whatever the storage type is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#define CUDA_CHECK(call) ::portlm::cuda::check((call), #call, __FILE__, __LINE__)

namespace portlm::cuda {

inline void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  const char* slash = std::strrchr(file, '/');
  throw std::runtime_error(std::string(call) + " failed in " + (slash ? slash + 1 : file) + ":" + std::to_string(line) +
                           ": " + cudaGetErrorString(status));
}

constexpr size_t kSharedBytes = 48 << 10;      // what every device grants a block without asking,
constexpr size_t kMostSharedBytes = 99 << 10;  // and what all of compute capability 8.0 and newer do if asked

// Starts a kernel and reports what prevented it. grid must not be 0: callers return early when there is no work. A plain
// call and no <<<>>>, so that any compiler of C++ takes the kernels: tests/cuda_on_cpu runs them where there is no GPU.
// A block gets up to kMostSharedBytes of shared memory.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  if (shared_bytes > kSharedBytes)  // has to be asked for; no work of a stream, so a graph may be under way
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// --- storage types ------------------------------------------------------------------------------------------

using bfloat16 = __nv_bfloat16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 2)
    return __float2bfloat16(x);
  else
    return x;
}

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// V consecutive elements at p, which is aligned to all of them.
template <int V, typename T>
__device__ inline void load(const T* p, float (&x)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int k = 0; k < V; ++k) x[k] = to_float(pack.v[k]);
}

template <int V, typename T>
__device__ inline void store(T* p, const float (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int k = 0; k < V; ++k) pack.v[k] = from_float<T>(x[k]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// V elements as they are.
template <int V, typename T>
__device__ inline void copy(const T* from, T* to) {
  *reinterpret_cast<Pack<T, V>*>(to) = *reinterpret_cast<const Pack<T, V>*>(from);
}

// A storage type, and how many of its elements one access moves.
template <typename Element, int Width>
struct Access {
  using T = Element;
  static constexpr int V = Width;
};

// Whether every array and every row of n elements, each of so many bytes, begins at a multiple of 16 bytes. Rows of several
// lengths and distances, which are joined by |, do so together.
inline bool begins_at_16(int64_t n, int64_t bytes, std::initializer_list<const void*> arrays) {
  bool aligned = n * bytes % 16 == 0;
  for (const void* p : arrays) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;  // nullptr is aligned
  return aligned;
}

// Calls body(Access) with 16-byte accesses if every array and every row of n elements allows them, else single ones.
template <typename Body>
void with_float_access(int64_t n, std::initializer_list<const void*> arrays, Body body) {
  begins_at_16(n, 4, arrays) ? body(Access<float, 4>{}) : body(Access<float, 1>{});
}
template <typename Body>
void with_access(bool is_bfloat16, int64_t n, std::initializer_list<const void*> arrays, Body body) {
  if (!is_bfloat16) return with_float_access(n, arrays, body);
  begins_at_16(n, 2, arrays) ? body(Access<bfloat16, 8>{}) : body(Access<bfloat16, 1>{});
}

// --- rows side by side in a block ---------------------------------------------------------------------------

constexpr unsigned kTileThreads = 256;

// A block for rows of `width` accesses: x counts accesses of a row, y rows. Narrow rows share a block.
inline dim3 row_tile(int64_t width) {
  unsigned x = 1;
  while (x < width && x < kTileThreads) x *= 2;
  return dim3(x, kTileThreads / x);
}

// Blocks for n things of which each block takes `each` at a time, in turns if there are very many.
inline unsigned blocks_for(int64_t n, int64_t each) {
  const int64_t blocks = (n + each - 1) / each, most = int64_t{1} << 20;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// --- one block per row --------------------------------------------------------------------------------------

constexpr unsigned kMostRowThreads = 512;

// Threads that share a row of n elements: one access each if they suffice, in whole warps.
inline unsigned row_threads(int64_t n, int V) {
  const int64_t accesses = (n + V - 1) / V, warps = (accesses + 31) / 32;
  return static_cast<unsigned>(warps < kMostRowThreads / 32 ? warps * 32 : kMostRowThreads);
}

inline unsigned row_blocks(int64_t rows) { return static_cast<unsigned>(rows < (1 << 20) ? rows : 1 << 20); }

// The block's dynamic shared memory.
__device__ inline float* shared_memory() {
  extern __shared__ __align__(32) float memory[];
  return memory;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Replaces each x[k] by its sum over the block, in every thread. All threads of the block must call it, whole warps.
template <int K>
__device__ inline void block_sum(float (&x)[K]) {
  __shared__ float partial[K][32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(x[k]);
  if (warps == 1) return;
  __syncthreads();  // the previous call's sums have been read
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (lane == 0) partial[k][warp] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(lane < warps ? partial[k][lane] : 0.0f);
}

// Adds up what `blocks` blocks left in partial (blocks, K, n), for out k = blockIdx.y, in an order that depends on
// nothing but `blocks`. 32 columns per block, 32 threads on each.
template <typename T>
__global__ void sum_partials(const float* partial, int64_t blocks, int64_t n, T* out0, T* out1) {
  __shared__ float tile[32][33];
  const int64_t column = int64_t{blockIdx.x} * 32 + threadIdx.x, stride = gridDim.y * n;
  float total = 0.0f;
  if (column < n)
    for (int64_t b = threadIdx.y; b < blocks; b += 32) total += partial[b * stride + blockIdx.y * n + column];
  tile[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  // Transposed, so that each warp sums one column.
  const float sum = warp_sum(tile[threadIdx.x][threadIdx.y]);
  const int64_t mine = int64_t{blockIdx.x} * 32 + threadIdx.y;
  if (threadIdx.x == 0 && mine < n) (blockIdx.y ? out1 : out0)[mine] = from_float<T>(sum);
}

template <typename T>
void launch_sum_partials(const float* partial, int64_t blocks, int64_t n, T* out0, T* out1, uintptr_t stream) {
  const dim3 grid(static_cast<unsigned>((n + 31) / 32), out1 ? 2 : 1);
  launch(sum_partials<T>, grid, dim3(32, 32), 0, stream, partial, blocks, n, out0, out1);
}

}  // namespace portlm::cuda
