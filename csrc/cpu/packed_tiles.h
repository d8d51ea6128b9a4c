// The register tile of packed_linear: rows of activations times tiles of 16 rows of the packed matrix.
#pragma once

#include <cstdint>

#include "cpu/dots.h"
#include "cpu/packed.h"

namespace portlm::PORTLM_ISA {

// Rows of activations that share weights while they are in a register, at most, and tiles that are computed at once, where
// few rows leave registers for more: a sum takes several cycles, and activations are loaded once for all tiles.
#if defined(PORTLM_ISA_AVX512) || defined(PORTLM_ISA_NEON)
constexpr int kPanelRows = 8;
template <int R>
constexpr int kTilesAtOnce = R == 1 ? 4 : R <= 4 ? 2 : 1;
#elif defined(PORTLM_ISA_AVX2)
constexpr int kPanelRows = 3;
template <int R>
constexpr int kTilesAtOnce = R == 1 ? 2 : 1;
#else
constexpr int kPanelRows = 2;
template <int R>
constexpr int kTilesAtOnce = 1;
#endif

// Up to kPanelRows rows of activations. Per group: D::kWords words for each row of each four columns (D::arrange), the
// number that each row's sums start with, and each row's scale.
template <typename D>
int64_t words_per_row(const PackedMatrix& m) {
  return m.groups * (D::kWords * m.group / 4 + 2);
}

// sums[r * kTileHeight + i] = row r of the panel times row i of the tile.
struct TileSums {
  alignas(64) float v[kPanelRows * kTileHeight];
};

// Bytes ahead of what is read that the second cache is asked for. Farther, or into the first cache, was measured to be slower.
constexpr int64_t kAhead = 1024;

// The rows of a panel times T tiles at once.
template <typename D, int R, int T>
void multiply_tiles(const PackedMatrix& m, const uint32_t* words, const uint8_t* const* tiles, TileSums* out) {
  constexpr int kUnits = 8 / D::kBits;  // of four columns, in a line
  constexpr int kLines = 8 / kUnits;   // in 32 columns
  constexpr int kParts = kTileHeight / Vec::N;
  const int64_t groups = m.groups, weight_bytes = m.weight_bytes, group_bytes = m.group_bytes;
  Vec y[T][kParts][R];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
    for (int p = 0; p < kParts; ++p)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) y[t][p][r] = Vec(0.0f);
  const uint8_t* block[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) block[t] = tiles[t];
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t* const starts = words + D::kWords * R * (m.group / 4);
    const float* const scales = reinterpret_cast<const float*>(starts + R);
    for (int p = 0; p < kParts; ++p) {
      typename D::Sum sum[T][R];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        if (m.has_zeros) {
          const Ints zero = bytes(block[t] + weight_bytes + 2 * kTileHeight + p * Vec::N) - Ints(D::kOffset);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[t][r].start(zero * Ints(static_cast<int32_t>(starts[r])));
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[t][r].start(Ints(static_cast<int32_t>(starts[r])));
        }
      }
      const uint32_t* x = words;
      for (int64_t at = 0; at < weight_bytes; at += kLines * kLineBytes) {
#pragma GCC unroll 8
        for (int line = 0; line < kLines; ++line) {
          typename D::Weights w[T][kUnits];
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const uint8_t* const from = block[t] + at + line * kLineBytes;
            D::unpack(from + 4 * Vec::N * p, w[t]);
            if (p == 0) __builtin_prefetch(from + kAhead, 0, 2);
          }
#pragma GCC unroll 2
          for (int u = 0; u < kUnits; ++u)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
              const typename D::Activations a = D::load(x + D::kWords * ((line * kUnits + u) * R + r));
#pragma GCC unroll 4
              for (int t = 0; t < T; ++t) sum[t][r].add(w[t][u], a, u);
            }
        }
        x += D::kWords * 8 * R;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[t][r].carry();
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const Vec scale = half(block[t] + weight_bytes + 2 * Vec::N * p);
        if (p == 0) __builtin_prefetch(block[t] + weight_bytes + kAhead, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          y[t][p][r] = fma(to_float(sum[t][r].total()) * scale, Vec(scales[r]), y[t][p][r]);
      }
    }
    words = starts + 2 * R;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) block[t] += group_bytes;
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < kParts; ++p) y[t][p][r].store(out[t].v + r * kTileHeight + p * Vec::N);
}

}  // namespace portlm::PORTLM_ISA
