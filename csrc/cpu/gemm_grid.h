// How a matrix product is cut into parts for threads.
#pragma once

#include <cstdint>

namespace portlm::PORTLM_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range share(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

// Rough number of cycles: `rate` products per cycle, and bringing in and writing the matrices.
inline int64_t product_cycles(int64_t M, int64_t N, int64_t K, int64_t rate) {
  return M * N * K / rate + (M * K + N * K + M * N) / 4;
}

// Cuts C into as many parts as there are threads: rows[i] x columns[j].
struct Grid {
  int64_t rows, columns;
};

inline Grid best_grid(int64_t M, int64_t N, int64_t K, int64_t tile_columns, int64_t rate, int64_t threads) {
  const int64_t column_tiles = ceil_div(N, tile_columns);
  Grid best{1, 1};
  int64_t best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= threads && rows <= M; ++rows) {
    const int64_t columns = threads / rows < column_tiles ? threads / rows : column_tiles;
    const int64_t part = product_cycles(ceil_div(M, rows), ceil_div(column_tiles, columns) * tile_columns, K, rate);
    if (part <= best_cost) best_cost = part, best = {rows, columns};  // more rows if equal: other kernels split rows too
  }
  return best;
}

}  // namespace portlm::PORTLM_ISA
