// csrc/cuda/mma.cuh where there is no GPU: the lanes of a warp hold what they hold there, and a copy arrives when its
// thread waits for it, or at once.
#pragma once

#include <stdexcept>

#include "cuda/common.cuh"

// They are most of what the tests of tensor cores run: gcc's watch, which is kept on the kernels, makes them many times as slow.
#define CUDA_ON_CPU_QUICK __attribute__((no_sanitize("undefined"), optimize("O3")))

namespace portlm::cuda {

// What a lane gives to a product, and the two halves of one of its registers.
struct Operands {
  uint32_t a[4], b[2];
};
CUDA_ON_CPU_QUICK inline void widen(uint32_t pair, float* two) {
  const uint32_t bits[2] = {pair << 16, pair & 0xffff0000u};
  std::memcpy(two, bits, sizeof bits);
}

CUDA_ON_CPU_QUICK inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                           const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto warp = cuda_on_cpu::exchange_bytes(&mine, sizeof mine, file, line);
  const int g = static_cast<int>(cuda_on_cpu::lane()) / 4, t = static_cast<int>(cuda_on_cpu::lane()) % 4;
  float rows[2][16], columns[2][16];  // g and g + 8 of A, 2 t and 2 t + 1 of B
  for (int pair = 0; pair < 8; ++pair) {
    const Operands& of_row = warp.at<Operands>(4 * g + pair % 4);
    for (int i = 0; i < 2; ++i) {
      widen(of_row.a[i + pair / 4 * 2], rows[i] + 2 * pair);
      widen(warp.at<Operands>(4 * (2 * t + i) + pair % 4).b[pair / 4], columns[i] + 2 * pair);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) c[i] += rows[i / 2][k] * columns[i % 2][k];
}

CUDA_ON_CPU_QUICK inline void load_matrices_as(uint32_t (&r)[4], const bfloat16* row, bool transposed, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("a row of a matrix is not aligned to 16 bytes");
  const auto warp = cuda_on_cpu::exchange_bytes(&row, sizeof row, file, line);
  const int g = static_cast<int>(cuda_on_cpu::lane()) / 4, t = static_cast<int>(cuda_on_cpu::lane()) % 4;
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = 0;
    for (int half = 0; half < 2; ++half) {
      const int at_row = transposed ? 2 * t + half : g, at_column = transposed ? g : 2 * t + half;
      pair |= uint32_t{warp.at<const bfloat16*>(8 * i + at_row)[at_column].bits} << (16 * half);
    }
    r[i] = pair;
  }
}

inline void load_matrices(uint32_t (&r)[4], const bfloat16* row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  load_matrices_as(r, row, false, file, line);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const bfloat16* row, const char* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  load_matrices_as(r, row, true, file, line);
}

inline void copy_async(bfloat16* to, const bfloat16* from, bool present) { cuda_on_cpu::copy_later(to, from, present ? 16 : 0); }
inline void commit_copies() { cuda_on_cpu::end_copies(); }
template <int Under>
void wait_for_copies() {
  cuda_on_cpu::finish_copies(Under);
}

inline float power_of_two(float x) { return std::exp2(x); }
inline uint32_t pack_pair(float first, float second) {
  return from_float<bfloat16>(first).bits | uint32_t{from_float<bfloat16>(second).bits} << 16;
}

}  // namespace portlm::cuda
