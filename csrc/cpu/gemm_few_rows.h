// Products with few rows, as one token at a time makes them: bound by the one pass over B in memory.
#pragma once

#include "cpu/gemm.h"

namespace portlm::PORTLM_ISA {

// Up to this many rows these were measured to be faster than packing B.
constexpr int64_t kFewRowsDot = 24;
constexpr int64_t kFewRowsStream = 6;

// C[i * c_row + j * c_column] = sum over k of A[i * lda + k] B[j * ldb + k], + bias[i * bias_row + j * bias_column]
// unless bias is nullptr; or += the same.
struct Dots {
  const float* A;
  const float* B;
  const float* bias;
  float* C;
  int64_t M, K, lda, ldb, c_row, c_column, bias_row, bias_column;
  bool accumulate;
};

// Columns [j0, j1), by dot products: both matrices are read along their rows. Any M; best for small M.
void multiply_dots(const Dots& dots, int64_t j0, int64_t j1);

// Columns [j0, j1) for B (K, N) and M <= kFewRowsStream: rows of B, scaled by elements of A, are added to rows of C.
void multiply_stream(const Product& product, int64_t j0, int64_t j1);

}  // namespace portlm::PORTLM_ISA
