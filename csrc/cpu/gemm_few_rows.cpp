#include "cpu/gemm_few_rows.h"

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of A that share the four rows of B in registers: 6 x 4 accumulators of 32 registers, 3 x 4 of 16.
#if defined(PORTLM_ISA_AVX512) || defined(PORTLM_ISA_NEON)
constexpr int64_t kDotRows = 6;
#elif defined(PORTLM_ISA_AVX2)
constexpr int64_t kDotRows = 3;
#else
constexpr int64_t kDotRows = 2;
#endif
constexpr int64_t kDotColumns = 4;
constexpr int64_t kDotBlock = 32 * Vec::N;  // products per sum before it joins the total, to keep rounding errors low

// The sums over the lanes of four vectors.
inline void sum_lanes(const Vec (&s)[4], float* out) {
#if defined(PORTLM_ISA_AVX512)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0].v, s[1].v), _mm512_unpackhi_ps(s[0].v, s[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2].v, s[3].v), _mm512_unpackhi_ps(s[2].v, s[3].v));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(PORTLM_ISA_AVX2)
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(s[0].v, s[1].v), _mm256_unpackhi_ps(s[0].v, s[1].v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(s[2].v, s[3].v), _mm256_unpackhi_ps(s[2].v, s[3].v));
  const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#elif defined(PORTLM_ISA_NEON)
  sums(s).store(out);
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(s[i]);
#endif
}

template <int R>
void dot_tile(const Dots& p, int64_t i, int64_t j, int64_t columns) {
  const float* const A = p.A + i * p.lda;
  const float* b[kDotColumns];  // columns that do not exist repeat the last one
  for (int64_t c = 0; c < kDotColumns; ++c) b[c] = p.B + (j + min(c, columns - 1)) * p.ldb;
  const int64_t ahead = i == 0 ? kDotColumns * p.ldb : 0;  // the rows of B that come next are asked for once
  Vec total[R][kDotColumns];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kDotColumns; ++c) total[r][c] = Vec(0.0f);
  for (int64_t k0 = 0; k0 < p.K; k0 += kDotBlock) {
    Vec s[R][kDotColumns];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kDotColumns; ++c) s[r][c] = Vec(0.0f);
    for_lanes(min(kDotBlock, p.K - k0), [&](int64_t j, auto lanes) {
      const int64_t k = k0 + j;
      for (int c = 0; c < kDotColumns; ++c) __builtin_prefetch(b[c] + k + ahead);
      const Vec b0 = load(b[0] + k, lanes), b1 = load(b[1] + k, lanes), b2 = load(b[2] + k, lanes), b3 = load(b[3] + k, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec a = load(A + r * p.lda + k, lanes);
        s[r][0] = fma(a, b0, s[r][0]);
        s[r][1] = fma(a, b1, s[r][1]);
        s[r][2] = fma(a, b2, s[r][2]);
        s[r][3] = fma(a, b3, s[r][3]);
      }
    });
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kDotColumns; ++c) total[r][c] += s[r][c];
  }
  for (int r = 0; r < R; ++r) {
    float sums[kDotColumns];
    sum_lanes(total[r], sums);
    for (int64_t c = 0; c < columns; ++c) {
      float& out = p.C[(i + r) * p.c_row + (j + c) * p.c_column];
      const float y = p.bias ? sums[c] + p.bias[(i + r) * p.bias_row + (j + c) * p.bias_column] : sums[c];
      out = p.accumulate ? out + y : y;
    }
  }
}

template <int R = kDotRows>
void dot_tile_of(int64_t rows, const Dots& p, int64_t i, int64_t j, int64_t columns) {
  if constexpr (R > 1)
    if (rows < R) return dot_tile_of<R - 1>(rows, p, i, j, columns);
  dot_tile<R>(p, i, j, columns);
}

// y[i][j] += sum of a[i][k + d] B[k + d][j] over d < D for R rows of C; with first, y = bias or 0 before.
template <int R, int D>
inline void add_rows(const Product& p, int64_t k, int64_t j0, int64_t j1, bool first) {
  Vec a[R][D > 0 ? D : 1];
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) a[r][d] = Vec(p.transpose_a ? p.A[(k + d) * p.lda + r] : p.A[r * p.lda + k + d]);
  const float* const B = p.B + k * p.ldb + j0;
  float* const C = p.C + j0;
  for_lanes(j1 - j0, [&](int64_t j, auto lanes) {
    Vec y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) y[r] = Vec(0.0f);
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      const Vec b = load(B + d * p.ldb + j, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) y[r] = fma(a[r][d], b, y[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {  // added last: an error per D products, not one per product
      if (first && p.bias) y[r] += load(p.bias + j0 + j, lanes);
      if (!first || p.accumulate) y[r] = load(C + r * p.ldc + j, lanes) + y[r];
      store(y[r], C + r * p.ldc + j, lanes);
    }
  });
}

template <int R, int D>
void stream_rows(const Product& p, int64_t j0, int64_t j1) {
  constexpr int64_t kChunk = 1024;  // columns: R rows of C stay in L1, and each row of B is read in runs of 4 KB
  for (int64_t j = j0; j < j1; j += kChunk) {
    const int64_t end = min(j + kChunk, j1);
    int64_t k = 0;
    for (; k + D <= p.K; k += D) add_rows<R, D>(p, k, j, end, k == 0);
    if constexpr (D > 1)
      for (; k < p.K; ++k) add_rows<R, 1>(p, k, j, end, k == 0);
    if (p.K == 0) add_rows<R, 0>(p, 0, j, end, true);
  }
}

}  // namespace

void multiply_dots(const Dots& p, int64_t j0, int64_t j1) {
  for (int64_t j = j0; j < j1; j += kDotColumns)
    for (int64_t i = 0; i < p.M; i += kDotRows)
      dot_tile_of(min(kDotRows, p.M - i), p, i, j, min(kDotColumns, j1 - j));
}

void multiply_stream(const Product& p, int64_t j0, int64_t j1) {
  // as many rows of B at once as their R D factors leave registers for
  switch (p.M) {
    case 1: return stream_rows<1, 8>(p, j0, j1);
    case 2: return stream_rows<2, 8>(p, j0, j1);
    case 3: return stream_rows<3, 4>(p, j0, j1);
    case 4: return stream_rows<4, 4>(p, j0, j1);
    case 5: return stream_rows<5, 4>(p, j0, j1);
    default: return stream_rows<6, 3>(p, j0, j1);
  }
}

}  // namespace portlm::PORTLM_ISA
