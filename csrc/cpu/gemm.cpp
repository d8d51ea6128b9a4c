// Single precision matrix products.
//
// Three ways, by shape. Many rows: B is packed block by block and multiplied tile by tile, compute bound (a tile row of
// 14 needs 9 bytes of the packed block per cycle, which comes from L2). Few rows: packing would cost more than the
// product, so B is streamed once from memory, row by row if it lies (K, N), by dot products if it lies (N, K).
#include "cpu/gemm.h"

#include "cpu/gemm_few_rows.h"
#include "cpu/gemm_grid.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {
namespace {

// The packed block of B has at most kDepth rows, so that the rows of A it meets (14 x 192) stay in L1 beside a panel,
// and kWidth columns, so that it takes less than half of a 1 MB L2. The sum over k is added up per kDepth products,
// which also keeps rounding errors lower than one long chain does.
constexpr int64_t kDepth = 192;
constexpr int64_t kWidth = 512;
constexpr int64_t kFewColumns = 4;  // up to this many (a value head has 1) a tile would mostly multiply zeros
constexpr int64_t kGrain = 1 << 13;  // cycles below which a second thread costs more than it brings

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kRate = 32;  // products per cycle

// Asks for `rows` x `columns` floats that are needed soon, lying ld floats apart.
void prefetch(const float* p, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(p + r * ld + c, 0, 2);
}

void multiply_part(const Product& p, Range rows, Range columns, PartDone done, void* context) {
  thread_local Scratch scratch;
  const int64_t depth_blocks = p.K > kDepth ? ceil_div(p.K, kDepth) : 1;
  const int64_t depth_step = ceil_div(ceil_div(p.K, depth_blocks), 16) * 16;
  float* const packed = scratch.floats(depth_step * min(kWidth, ceil_div(columns.size(), kTileCols) * kTileCols));
  const int64_t row_panels = ceil_div(rows.size(), kTileRows);
  const bool far = p.M * p.K + p.K * p.N > 1 << 18;  // more than 1 MB does not stay in L2
  for (int64_t j0 = columns.begin; j0 < columns.end; j0 += kWidth) {
    const int64_t j1 = min(j0 + kWidth, columns.end);
    int64_t k = 0;
    do {
      const int64_t depth = min(depth_step, p.K - k);
      const bool first = k == 0, last = k + depth == p.K;
      for (int64_t j = j0; j < j1; j += kTileCols) {
        float* panel = packed + (j - j0) * depth;
        if (p.transpose_b)
          pack_panel_transposed(p.B + j * p.ldb + k, p.ldb, depth, min(kTileCols, j1 - j), panel);
        else
          pack_panel(p.B + k * p.ldb + j, p.ldb, depth, min(kTileCols, j1 - j), panel);
      }
      for (int64_t panel = 0; panel < row_panels; ++panel) {
        const Range r = share(rows.size(), panel, row_panels);  // evenly: a last tile of one row would waste registers
        const int64_t i = rows.begin + r.begin;
        const Tile tile = p.transpose_a ? tile_of<true>(r.size()) : tile_of<false>(r.size());
        const float* A = p.transpose_a ? p.A + k * p.lda + i : p.A + i * p.lda + k;
        if (far && panel + 1 < row_panels) {
          if (p.transpose_a)
            prefetch(A + r.size(), p.lda, depth, kTileRows);
          else
            prefetch(A + r.size() * p.lda, p.lda, kTileRows, depth);
        }
        for (int64_t j = j0; j < j1; j += kTileCols) {
          tile(depth, A, p.lda, packed + (j - j0) * depth,
               {p.C + i * p.ldc + j, p.ldc, min(kTileCols, j1 - j), first && p.bias ? p.bias + j : nullptr,
                p.accumulate || !first});
        }
        if (last && done) done(context, i, i + r.size(), j0, j1);
      }
      k += depth;
    } while (k < p.K);
  }
}

}  // namespace

void multiply(const Product& p, PartDone done, void* context) {
  if (p.M <= 0 || p.N <= 0) return;
  const int threads = threads_for(product_cycles(p.M, p.N, p.K, kRate), kGrain);
  const int64_t column_tiles = ceil_div(p.N, kTileCols);
  // parts of columns for the ways without packing
  const auto for_columns = [&](int64_t n, auto body) {
    const int64_t tiles = ceil_div(n, kTileCols), parts = min(threads, tiles);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      body(share(tiles, begin, parts).begin * kTileCols, min(n, share(tiles, end - 1, parts).end * kTileCols));
    });
  };
  if (p.transpose_b && !p.transpose_a && p.M <= kFewRowsDot) {
    const Dots dots{p.A, p.B, p.bias, p.C, p.M, p.K, p.lda, p.ldb, p.ldc, 1, 0, 1, p.accumulate};
    for_columns(p.N, [&](int64_t j0, int64_t j1) {
      multiply_dots(dots, j0, j1);
      if (done) done(context, 0, p.M, j0, j1);
    });
    return;
  }
  if (p.transpose_b && !p.transpose_a && p.N <= kFewColumns) {  // as few rows of the transposed product
    const Dots dots{p.B, p.A, p.bias, p.C, p.N, p.K, p.ldb, p.lda, 1, p.ldc, 1, 0, p.accumulate};
    for_columns(p.M, [&](int64_t i0, int64_t i1) {
      multiply_dots(dots, i0, i1);
      if (done) done(context, i0, i1, 0, p.N);
    });
    return;
  }
  if (!p.transpose_b && p.M <= kFewRowsStream) {
    for_columns(p.N, [&](int64_t j0, int64_t j1) {
      multiply_stream(p, j0, j1);
      if (done) done(context, 0, p.M, j0, j1);
    });
    return;
  }
  const Grid grid = best_grid(p.M, p.N, p.K, kTileCols, kRate, threads);
  parallel_for(grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range c = share(column_tiles, part / grid.rows, grid.columns);
      multiply_part(p, share(p.M, part % grid.rows, grid.rows), {c.begin * kTileCols, min(p.N, c.end * kTileCols)}, done,
                    context);
    }
  });
}

void sum_rows(const float* x, int64_t ld, float* out, int64_t rows, int64_t N, bool accumulate) {
  constexpr int64_t kBlock = 32;            // rows that are added up before they join the total, to keep rounding errors low
  constexpr int64_t kColumns = 4 * Vec::N;  // at a time, so that memory is read in runs
  const int64_t groups = ceil_div(N, kColumns);
  parallel_for(groups, 4 * kGrain / (rows * kColumns / Vec::N + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t j = begin * kColumns; j < min(N, end * kColumns); j += kColumns) {
      const auto group = [=](auto... lanes) {
        constexpr int V = sizeof...(lanes);
        Vec total[V];
        for (Vec& t : total) t = Vec(0.0f);
        for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
          Vec s[V];
          for (Vec& v : s) v = Vec(0.0f);
          for (int64_t i = i0; i < min(i0 + kBlock, rows); ++i) {
            int v = 0;
            ((s[v] += load(x + i * ld + j + v * Vec::N, lanes), ++v), ...);
          }
          for (int v = 0; v < V; ++v) total[v] += s[v];
        }
        const auto finish = [=](Vec sum, float* to, auto lane) { store(accumulate ? load(to, lane) + sum : sum, to, lane); };
        int v = 0;
        ((finish(total[v], out + j + v * Vec::N, lanes), ++v), ...);
      };
      if (j + kColumns <= N) {
        group(Whole{}, Whole{}, Whole{}, Whole{});
      } else {
        const auto rest = [=](int64_t v) { return First{N - j < v * Vec::N ? 0 : min(Vec::N, N - j - v * Vec::N)}; };
        group(rest(0), rest(1), rest(2), rest(3));
      }
    }
  });
}

void gemm(const float* A, const float* B, const float* bias, float* C, int64_t M, int64_t N, int64_t K, int64_t lda,
          int64_t ldb, int64_t ldc, int transpose_a, int transpose_b, int accumulate) {
  multiply({A, B, bias, C, M, N, K, lda, ldb, ldc, transpose_a != 0, transpose_b != 0, accumulate != 0});
}

}  // namespace portlm::PORTLM_ISA
