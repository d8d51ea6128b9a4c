// What the kernels that TVM writes use of CUDA beyond csrc/cuda (tests/cuda_on_cpu/cuda_runtime.h), and how one is called by name.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <exception>
#include <string>
#include <tuple>

#include "emulator.h"

inline unsigned __activemask() { return cuda_on_cpu::lanes(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_on_cpu::exchange_value(mask, value, static_cast<unsigned>(from), file, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const unsigned from = cuda_on_cpu::lane() + by;  // beyond the last lane it is the thread's own
  return cuda_on_cpu::exchange_value(mask, value, from < 32 ? from : cuda_on_cpu::lane(), file, line);
}

#define FAKE_CUDA_VECTORS(name, type, bytes)                                                                 \
  struct __attribute__((aligned(2 * bytes))) name##2 { type x, y; };                                         \
  struct name##3 { type x, y, z; };                                                                          \
  struct __attribute__((aligned(bytes < 8 ? 4 * bytes : 16))) name##4 { type x, y, z, w; };                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                           \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FAKE_CUDA_VECTORS(float, float, 4)
FAKE_CUDA_VECTORS(int, int, 4)
FAKE_CUDA_VECTORS(longlong, int64_t, 8)
#undef FAKE_CUDA_VECTORS

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename A, typename B>
auto min(A a, B b) { return a < b ? a : b; }
template <typename A, typename B>
auto max(A a, B b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

namespace fake_cuda {

// Runs a kernel, whose parameters are where a launch puts them; returns nullptr or what went wrong. The order of threads and
// blocks is that of FAKE_CUDA_ORDER.
template <typename... Parameters, size_t... I>
const char* launch(void (*kernel)(Parameters...), std::index_sequence<I...>, const unsigned* grid, const unsigned* block, unsigned shared,
                   void** where) {
  static std::string message;
  const char* const order = std::getenv("FAKE_CUDA_ORDER");
  cuda_on_cpu::choose_order(order ? static_cast<unsigned>(std::atoi(order)) : 0);
  try {
    const std::tuple<Parameters...> parameters(*static_cast<Parameters*>(where[I])...);
    cuda_on_cpu::run({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, [&] { std::apply(kernel, parameters); });
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), const unsigned* grid, const unsigned* block, unsigned shared, void** where) {
  return launch(kernel, std::index_sequence_for<Parameters...>(), grid, block, shared, where);
}

}  // namespace fake_cuda

#define alignas(n) __attribute__((aligned(n)))  // __shared__ is thread_local there, behind which alignas may not stand
