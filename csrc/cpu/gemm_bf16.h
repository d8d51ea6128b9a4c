// Products of matrices that are rounded to bfloat16 on the way in, added up in float32. bf16_tiles.h says what they are.
#pragma once

#include <cstdint>

#include "cpu/bf16_tiles.h"
#include "cpu/gemm.h"

namespace portlm::PORTLM_ISA {

// C (M, N) = A (M, K) B (K, N) + bias (N, or nullptr), or C += the same if accumulate. rounded_a (M, K), unless nullptr,
// receives A as it was used; A then is not transposed.
struct Bf16Product {
  Bf16Operand A, B;
  const float* bias;
  float* C;
  int64_t M, N, K, ldc;
  bool accumulate;
  uint16_t* rounded_a = nullptr;
};

// Runs on all threads, or on the calling one alone if that already is one of several at work. Same bits on any number of
// them. `done` is called as multiply() calls it.
void multiply_bf16(const Bf16Product& product, PartDone done = nullptr, void* context = nullptr);

// The best tiles that this processor has.
const Bf16Tiles& bf16_tiles();

// to[i] = from[i] rounded, on the calling thread.
inline void round_to_bf16(const float* from, uint16_t* to, int64_t count) { bf16_tiles().round(from, to, count); }

// to[i] = from[i].
inline void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
}

inline Bf16Operand rows_of(const float* data, int64_t ld) { return {data, ld, false, false}; }
inline Bf16Operand rows_of(const uint16_t* data, int64_t ld) { return {data, ld, false, true}; }
inline Bf16Operand turned(const float* data, int64_t ld) { return {data, ld, true, false}; }
inline Bf16Operand turned(const uint16_t* data, int64_t ld) { return {data, ld, true, true}; }

}  // namespace portlm::PORTLM_ISA
