// Numbers rounded to bfloat16 in pairs (k, k + 1), as VDPBF16PS and the tile registers take them: loads, panels, rounding with
// the conversions of AVX512_BF16. Only files that are compiled for it include this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/bf16_tiles.h"
#include "cpu/gemm_tile.h"
#include "cpu/watched.h"

namespace portlm::PORTLM_ISA {

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline int64_t pairs(int64_t K) { return (K + 1) / 2; }

inline __mmask16 first16(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1u); }
inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xFFFFFFFFu : n <= 0 ? 0u : (1u << n) - 1u; }

// A row of which a mask chooses the first elements.
template <typename T>
inline const T* chosen(const T* row, __mmask16 columns) {
  return watched(row, __builtin_popcount(columns));
}

// 32 elements from p[0], of which `n` exist, as bfloat16.
inline __m512i load32(const float* p, int64_t n) {
  watched(p, n < 32 ? n : 32);
  const __m512 lo = _mm512_maskz_loadu_ps(first16(n), p), hi = _mm512_maskz_loadu_ps(first16(n - 16), p + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo));
}
inline __m512i load32(const uint16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), watched(p, n < 32 ? n : 32)); }

// 16 columns of two rows as 16 pairs.
inline __m512i pair16(const float* row, const float* next, __mmask16 columns, __mmask16 next_columns) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512 lo = _mm512_maskz_loadu_ps(columns, chosen(row, columns));
  const __m512 hi = _mm512_maskz_loadu_ps(next_columns, chosen(next, next_columns));
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
}
inline __m512i pair16(const uint16_t* row, const uint16_t* next, __mmask16 columns, __mmask16 next_columns) {
  const __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, chosen(row, columns)));
  const __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next_columns, chosen(next, next_columns)));
  return _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
}
// Columns [0, count) of B (K, .) as a panel [pair][kColumns]; zeros up to its width and, K odd, for the missing product. What
// lies between the last pair and a multiple of 16 is zeros if `transposed`.
template <int64_t kColumns, typename T>
inline void pack_pairs(const T* B, int64_t ld, bool transposed, int64_t count, int64_t K, uint32_t* panel) {
  if (!transposed) {
    for (int64_t k = 0; k < K; k += 2, B += 2 * ld, panel += kColumns) {
      const bool whole = k + 1 < K;
      for (int64_t j = 0; j < kColumns; j += 16) {
        const __mmask16 columns = first16(count - j);
        const T* const row = columns ? B + j : B;
        _mm512_storeu_si512(panel + j, pair16(row, whole ? row + ld : row, columns, whole ? columns : 0));
      }
    }
    return;
  }
  alignas(64) float block[16 * 16];  // pairs, moved as if they were floats
  for (int64_t k = 0; k < K; k += 32, panel += 16 * kColumns)
    for (int64_t j = 0; j < kColumns; j += 16) {
      for (int64_t c = 0; c < 16; ++c) {
        const bool exists = j + c < count;
        const __m512i pair = exists ? load32(B + (j + c) * ld + k, K - k) : _mm512_setzero_si512();
        _mm512_store_si512(block + 16 * c, pair);
      }
      transpose_block(block, 16, reinterpret_cast<float*>(panel + j), kColumns);
    }
}

inline void round_pairs(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) {
    watched(to + i, count - i < 32 ? count - i : 32);
    _mm512_mask_storeu_epi16(to + i, first32(count - i), load32(from + i, count - i));
  }
}

}  // namespace portlm::PORTLM_ISA
