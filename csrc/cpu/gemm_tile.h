// The register tile that matrix products are made of, and the panels it reads.
//
// A tile computes up to kTileRows x kTileCols elements of C = A B. B comes as a packed panel: kTileCols columns of
// k = 0, 1, ... side by side, so that it is read in order whatever B looks like in memory. A is read where it lies:
// one broadcast per row and k serves two fused multiply-adds, and copying A first was measured to be slower.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

// As many accumulators as leave registers for two vectors of B and one element of A: 14 x 2 of 32 with AVX-512,
// 6 x 2 of 16 with AVX2, 10 x 2 of 32 with NEON.
#if defined(PORTLM_ISA_AVX512)
constexpr int64_t kTileRows = 14;
#elif defined(PORTLM_ISA_AVX2)
constexpr int64_t kTileRows = 6;
#elif defined(PORTLM_ISA_NEON)
constexpr int64_t kTileRows = 10;
#else
constexpr int64_t kTileRows = 4;
#endif
constexpr int64_t kTileCols = 2 * Vec::N;

// Where a tile puts its sums: C = sums + bias (or nullptr), or C += sums + bias.
struct TileTarget {
  float* C;
  int64_t ldc;
  int64_t columns;  // how many of the tile's columns exist, 1 .. kTileCols
  const float* bias;
  bool accumulate;
};

// One tile of R rows and K products per element. A's element (r, k) is at A[r * lda + k], or at A[k * lda + r] if
// kTransposed.
template <int R, bool kTransposed>
void tile(int64_t K, const float* A, int64_t lda, const float* panel, const TileTarget& to) {
  if (to.accumulate)  // C is read only after the loop: ask for it now
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(to.C + r * to.ldc, 1);
      __builtin_prefetch(to.C + r * to.ldc + Vec::N, 1);
    }
  Vec c[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = Vec(0.0f);
  for (int64_t k = 0; k < K; ++k) {
    const Vec b0 = Vec::load(panel + k * kTileCols), b1 = Vec::load(panel + k * kTileCols + Vec::N);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec a(kTransposed ? A[k * lda + r] : A[r * lda + k]);
      c[r][0] = fma(a, b0, c[r][0]);
      c[r][1] = fma(a, b1, c[r][1]);
    }
  }
  const auto finish = [&](auto lanes0, auto lanes1) {
    if (to.bias) {
      const Vec b0 = load(to.bias, lanes0), b1 = load(to.bias + Vec::N, lanes1);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][0] += b0, c[r][1] += b1;
    }
    if (to.accumulate) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        c[r][0] = load(to.C + r * to.ldc, lanes0) + c[r][0];
        c[r][1] = load(to.C + r * to.ldc + Vec::N, lanes1) + c[r][1];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(c[r][0], to.C + r * to.ldc, lanes0);
      store(c[r][1], to.C + r * to.ldc + Vec::N, lanes1);
    }
  };
  if (to.columns == kTileCols)
    finish(Whole{}, Whole{});
  else if (to.columns > Vec::N)
    finish(Whole{}, First{to.columns - Vec::N});
  else
    finish(First{to.columns}, First{0});
}

using Tile = void (*)(int64_t K, const float* A, int64_t lda, const float* panel, const TileTarget& to);

// tile<rows, kTransposed>, for 1 <= rows <= kTileRows.
template <bool kTransposed, int R = kTileRows>
inline Tile tile_of(int64_t rows) {
  if constexpr (R == 1)
    return tile<1, kTransposed>;
  else
    return rows == R ? tile<R, kTransposed> : tile_of<kTransposed, R - 1>(rows);
}

// Turns the N x N block at `from` (N = Vec::N) around: to[c * to_ld + r] = from[r * ld + c].
inline void transpose_block(const float* from, int64_t ld, float* to, int64_t to_ld) {
#if defined(PORTLM_ISA_AVX512)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * ld);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  // now 128-bit lane l of a[4g + c] holds column 4l + c of rows 4g .. 4g + 3
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 x = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), y = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xDD);
    const __m512 z = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88), w = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_ps(to + c * to_ld, _mm512_shuffle_f32x4(x, z, 0x88));
    _mm512_storeu_ps(to + (4 + c) * to_ld, _mm512_shuffle_f32x4(y, w, 0x88));
    _mm512_storeu_ps(to + (8 + c) * to_ld, _mm512_shuffle_f32x4(x, z, 0xDD));
    _mm512_storeu_ps(to + (12 + c) * to_ld, _mm512_shuffle_f32x4(y, w, 0xDD));
  }
#elif defined(PORTLM_ISA_AVX2)
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * ld);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * to_ld, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(to + (4 + c) * to_ld, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
#elif defined(PORTLM_ISA_NEON)
  const float32x4x2_t p = vtrnq_f32(vld1q_f32(from), vld1q_f32(from + ld));
  const float32x4x2_t q = vtrnq_f32(vld1q_f32(from + 2 * ld), vld1q_f32(from + 3 * ld));
  vst1q_f32(to, vcombine_f32(vget_low_f32(p.val[0]), vget_low_f32(q.val[0])));
  vst1q_f32(to + to_ld, vcombine_f32(vget_low_f32(p.val[1]), vget_low_f32(q.val[1])));
  vst1q_f32(to + 2 * to_ld, vcombine_f32(vget_high_f32(p.val[0]), vget_high_f32(q.val[0])));
  vst1q_f32(to + 3 * to_ld, vcombine_f32(vget_high_f32(p.val[1]), vget_high_f32(q.val[1])));
#else
  (void)ld, (void)to_ld;
  *to = *from;
#endif
}

// Packs K rows of B, `columns` <= kTileCols floats each and ld apart, into a panel of K * kTileCols floats. Columns that
// do not exist are filled with zeros.
inline void pack_panel(const float* B, int64_t ld, int64_t K, int64_t columns, float* panel) {
  const auto pack = [=](auto lanes0, auto lanes1) {
    const float* from = B;
    float* to = panel;
    for (int64_t k = 0; k < K; ++k, from += ld, to += kTileCols) {
      __builtin_prefetch(from + kTileCols, 0, 2);  // of the next panel
      __builtin_prefetch(from + kTileCols + Vec::N, 0, 2);
      load(from, lanes0).store(to);
      load(from + Vec::N, lanes1).store(to + Vec::N);
    }
  };
  if (columns == kTileCols)
    pack(Whole{}, Whole{});
  else if (columns > Vec::N)
    pack(Whole{}, First{columns - Vec::N});
  else
    pack(First{columns}, First{0});
}

// The same for a B that lies transposed in memory: its element (k, j) is at B[j * ld + k].
inline void pack_panel_transposed(const float* B, int64_t ld, int64_t K, int64_t columns, float* panel) {
  constexpr int64_t N = Vec::N;
  float block[N * N];
  for (int64_t k = 0; k < K; k += N, panel += N * kTileCols) {
    const int64_t depth = K - k < N ? K - k : N;
    for (int64_t j = 0; j < kTileCols; j += N) {
      const int64_t width = columns - j < 0 ? 0 : columns - j < N ? columns - j : N;
      for (int64_t c = 0; c < N; ++c) __builtin_prefetch(B + (kTileCols + j + c) * ld + k, 0, 2);  // of the next panel
      if (depth == N && width == N) {
        transpose_block(B + j * ld + k, ld, panel + j, kTileCols);
        continue;
      }
      for (int64_t c = 0; c < width; ++c) load(B + (j + c) * ld + k, First{depth}).store(block + c * N);
      for (int64_t c = width; c < N; ++c) Vec(0.0f).store(block + c * N);
      if (depth == N) {
        transpose_block(block, N, panel + j, kTileCols);
        continue;
      }
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t c = 0; c < N; ++c) panel[d * kTileCols + j + c] = block[c * N + d];
    }
  }
}

}  // namespace portlm::PORTLM_ISA
