// Tiles of rows in shared memory, and their products, in float32: what attention runs on where tensor cores do not serve.
//
// A block is 8 x 16 threads, ty by tx. Of a product of R * 8 rows with C * 16 rows, thread (ty, tx) holds rows ty * R + i and
// columns tx + 16 j: the threads that share a row are half a warp. Of R * 8 rows of a result D wide it holds columns
// column_of(n).
#pragma once

#include "cuda/attention.cuh"

namespace portlm::cuda {

constexpr unsigned kAttentionThreads = 128;
constexpr int kAcross = 16, kDown = 8;

// Sizes of tiles for heads up to Width elements.
template <int Width, int RowsEach, int ColumnsEach>
struct Tiling {
  static constexpr int kWidth = Width, R = RowsEach, C = ColumnsEach, N = Width / kAcross;
  static constexpr int kRows = kDown * R, kColumns = kAcross * C;
  static constexpr int kStride = Width + 4;        // so that rows that are read together lie in different banks
  static constexpr int kScoreStride = kColumns + 4;
};

__device__ inline int tile_x() { return static_cast<int>(threadIdx.x) % kAcross; }
__device__ inline int tile_y() { return static_cast<int>(threadIdx.x) / kAcross; }
__device__ inline int column_of(int n) { return 4 * tile_x() + 64 * (n / 4) + n % 4; }

// Rows [0, present) of x, D wide, and zeros around them.
template <typename G, int Rows, typename T>
__device__ inline void load_tile(const T* x, int64_t row_stride, int present, int D, bool vectors, float* tile) {
  constexpr int kPieces = G::kWidth / 4;
  for (int i = static_cast<int>(threadIdx.x); i < Rows * kPieces; i += static_cast<int>(kAttentionThreads)) {
    const int row = i / kPieces, column = i % kPieces * 4;
    float values[4] = {};
    if (row < present && column < D) {
      const T* const from = x + row * row_stride + column;
      if (vectors) {
        load(from, values);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (column + e < D) values[e] = to_float(from[e]);
      }
    }
    store(tile + row * G::kStride + column, values);
  }
}

// s[i][j] = row ty * R + i of `rows` times row tx + 16 j of `columns`.
template <typename G>
__device__ inline void multiply_tiles(const float* rows, const float* columns, int D, float (&s)[G::R][G::C]) {
#pragma unroll
  for (int i = 0; i < G::R; ++i)
#pragma unroll
    for (int j = 0; j < G::C; ++j) s[i][j] = 0.0f;
  for (int d = 0; d < D; d += 4) {
    float x[G::R][4], y[G::C][4];
#pragma unroll
    for (int i = 0; i < G::R; ++i) load(rows + (tile_y() * G::R + i) * G::kStride + d, x[i]);
#pragma unroll
    for (int j = 0; j < G::C; ++j) load(columns + (tile_x() + kAcross * j) * G::kStride + d, y[j]);
#pragma unroll
    for (int i = 0; i < G::R; ++i)
#pragma unroll
      for (int j = 0; j < G::C; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j] = fmaf(x[i][e], y[j][e], s[i][j]);
  }
}

// Leaves this thread's scores where its half of the warp reads them.
template <typename G>
__device__ inline void keep_scores(const float (&s)[G::R][G::C], float* scores) {
#pragma unroll
  for (int i = 0; i < G::R; ++i)
#pragma unroll
    for (int j = 0; j < G::C; ++j) scores[(tile_y() * G::R + i) * G::kScoreStride + tile_x() + kAcross * j] = s[i][j];
}

// sum[i][n] += row ty * R + i of scores times column column_of(n) of the kColumns rows of x.
template <typename G>
__device__ inline void add_product(const float* scores, const float* x, float (&sum)[G::R][G::N]) {
  for (int k = 0; k < G::kColumns; k += 4) {
    float weights[G::R][4];
#pragma unroll
    for (int i = 0; i < G::R; ++i) load(scores + (tile_y() * G::R + i) * G::kScoreStride + k, weights[i]);
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int n = 0; n < G::N; n += 4) {
        float values[4];
        load(x + (k + e) * G::kStride + column_of(n), values);
#pragma unroll
        for (int i = 0; i < G::R; ++i)
#pragma unroll
          for (int m = 0; m < 4; ++m) sum[i][n + m] = fmaf(weights[i][e], values[m], sum[i][n + m]);
      }
  }
}

// Writes this thread's part of rows [0, present) of a result, times `factor`.
template <typename G, typename T>
__device__ inline void store_tile(const float (&sum)[G::R][G::N], float factor, T* y, int64_t row_stride, int present, int D,
                                  bool vectors) {
#pragma unroll
  for (int i = 0; i < G::R; ++i) {
    const int row = tile_y() * G::R + i;
    if (row >= present) break;
#pragma unroll
    for (int n = 0; n < G::N; n += 4) {
      T* const to = y + row * row_stride + column_of(n);
      float values[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) values[m] = sum[i][n + m] * factor;
      if (vectors && column_of(n) < D) {
        store(to, values);
      } else {
#pragma unroll
        for (int m = 0; m < 4; ++m)
          if (column_of(n) + m < D) to[m] = from_float<T>(values[m]);
      }
    }
  }
}

// Calls body(Tiling) with the one for heads D wide.
template <typename Body>
void with_tiling(int D, Body body) {
  if (D > kMostHeadWidth) throw std::runtime_error("attention: heads are wider than 256");
  if (D <= 64)
    body(Tiling<64, 4, 2>{});
  else if (D <= 128)
    body(Tiling<128, 4, 2>{});
  else
    body(Tiling<256, 2, 1>{});
}

}  // namespace portlm::cuda
