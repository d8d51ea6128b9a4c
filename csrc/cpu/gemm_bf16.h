// Products of matrices that are rounded to bfloat16 on the way in, added up in float32. bf16_tiles.h says what they are.
#pragma once

#include <cstdint>

#include "cpu/bf16_tiles.h"
#include "cpu/gemm.h"

namespace portlm::PORTLM_ISA {

// Called as PartDone is (gemm.h), with the part itself: `part` is C's element (i0, j0), whose rows lie ld floats apart. What it
// writes there stays.
using Bf16Done = void (*)(void* context, float* part, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

// C (M, N) = A (M, K) B (K, N) + bias (N, or nullptr), or C += the same if accumulate. rounded_a (M, K), unless nullptr,
// receives A as it was used; A then is floats, and not transposed.
struct Bf16Product {
  Bf16Operand A, B;
  const float* bias;
  float* C;
  int64_t M, N, K, ldc;
  bool accumulate;
  uint16_t* rounded_a = nullptr;
  const char* packed_b = nullptr;  // what pack_bf16 made of B
};

// Bytes of B (K, N) as packed panels, a multiple of 64.
int64_t packed_bytes_bf16(int64_t K, int64_t N);

// Packs B (K, N) on all threads, for several products with it. `packed` is aligned to 64 bytes.
void pack_bf16(const Bf16Operand& B, int64_t K, int64_t N, char* packed);

// Runs on all threads, or on the calling one alone if that already is one of several at work. Same bits on any number of
// them. Up to K = bf16_tiles().depth C may be nullptr where all that is wanted of it is what `done` makes of its parts, which
// then never leave the cache.
void multiply_bf16(const Bf16Product& product, Bf16Done done = nullptr, void* context = nullptr);

// out[j] = sum over the rows i of x (rows, N), ld elements apart, of x[i][j]; or += that.
void sum_rows_bf16(const uint16_t* x, int64_t ld, float* out, int64_t rows, int64_t N, bool accumulate = false);

// The best tiles that this processor has.
const Bf16Tiles& bf16_tiles();

// While it lives, its thread may run these tiles; never two at a time on a thread.
class HeldBf16Tiles {
 public:
  explicit HeldBf16Tiles(const Bf16Tiles& tiles) : tiles_(tiles) { tiles_.hold(); }
  ~HeldBf16Tiles() { tiles_.release(); }
  HeldBf16Tiles(const HeldBf16Tiles&) = delete;
  HeldBf16Tiles& operator=(const HeldBf16Tiles&) = delete;

 private:
  const Bf16Tiles& tiles_;
};

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
