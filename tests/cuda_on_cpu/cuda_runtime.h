// What csrc/cuda uses of CUDA, on a CPU: found instead of NVIDIA's header of this name, so that the kernels are compiled as
// they are. A block's threads are fibers of one thread (emulator.cpp), which change places at barriers alone.
//
// For tests, and strict where a device lets faults pass: all threads of a block, or of a warp, have to meet in one line.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local  // and nothing else is: so all of it lies together, and is made NaN before each block
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kMostSharedBytes = 99 << 10;

// Of the kernels that asked.
inline std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

// Runs `thread` for each thread of each block. Throws std::runtime_error where a device would hang or break its promises.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Waits for all threads of the block.
void block_barrier(const char* file, int line);

// Waits for all threads of the warp, and returns the value of the one in `lane`.
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, const char* file, int line);

// What each lane of the warp gave, until the thread exchanges something again.
struct WarpValues {
  const char* first;
  size_t stride;
  template <typename T>
  const T& at(int lane) const {
    return *reinterpret_cast<const T*>(first + static_cast<size_t>(lane) * stride);
  }
};
WarpValues exchange_bytes(const void* value, size_t bytes, const char* file, int line);

// Copies of a thread that arrive when it waits for them, or at once where threads run backwards: 16 bytes each, of which the
// first `bytes` come from somewhere and the others are zeros; the end of a group of them; and the wait for all groups but the
// last `under`.
void copy_later(void* to, const void* from, size_t bytes);
void end_copies();
void finish_copies(size_t under);

unsigned lane();

// The lanes of the warp that have a thread, all but in the last warp of some blocks.
unsigned lanes();

template <typename T>
T exchange_value(unsigned mask, T value, unsigned lane, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, lane, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::block_barrier(file, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned other, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_on_cpu::exchange_value(mask, value, cuda_on_cpu::lane() ^ other, file, line);
}

// The one thread that runs is alone.
inline unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  if (value < before) *at = value;
  return before;
}

// Arithmetic that a device does not contract, or does less exactly. The compiler is told not to contract anything.
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 wide;
  return static_cast<unsigned long long>(wide{a} * b >> 64);
}

// Four of the eight bytes of x and y, by the lowest four halves of bytes of `selector`.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned found = 0;
  for (unsigned i = 0; i < 4; ++i) found |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return found;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::exchange(0xffffffffu, 0, 0, file, line);
}

// How much shared memory a kernel may ask for: what every device grants, until it is told otherwise.
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > cuda_on_cpu::kMostSharedBytes) return cudaErrorInvalidValue;
  cuda_on_cpu::shared_limits()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

// A launch that has ended when it returns, with the limits of a device.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (config->numAttrs) return cudaErrorInvalidValue;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u)
    return cudaErrorInvalidConfiguration;
  if (!threads || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  const auto asked = cuda_on_cpu::shared_limits().find(reinterpret_cast<const void*>(kernel));
  const size_t limit = asked == cuda_on_cpu::shared_limits().end() ? 48 << 10 : asked->second;
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidConfiguration;
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  cuda_on_cpu::run(grid, block, config->dynamicSmemBytes, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}

using std::isfinite;
using std::max;
using std::min;
