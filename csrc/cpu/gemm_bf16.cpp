// Products of matrices that are rounded to bfloat16 on the way in.
//
// As in gemm.cpp, B is packed block by block, and C is made tile by tile; here A is packed as well, a strip of a tile's rows
// at a time, because it has to be rounded. Both cost a few hundredths of the product where each side has some hundred rows.
#include "cpu/gemm_bf16.h"

#include "cpu/amx.h"
#include "cpu/gemm_grid.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace portlm {

#ifdef PORTLM_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Bf16Tiles own_bf16_tiles;
}
#endif
#ifdef PORTLM_HAVE_AVX512_AMX
namespace avx512_amx {
extern const Bf16Tiles own_bf16_tiles;
}
#endif

namespace PORTLM_ISA {

extern const Bf16Tiles own_bf16_tiles;

namespace {

constexpr int64_t kBlock = 1 << 19;  // bytes of a packed block of B: half of a 1 MB L2
constexpr int64_t kKept = 1 << 22;   // bytes of packed rows of A at a time
constexpr int64_t kGrain = 1 << 13;  // cycles below which a second thread costs more than it brings

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// The processor's own instructions that may be used, if it has them, as in Bf16Tiles::native.
int64_t g_native = 2;

int64_t element(const Bf16Operand& x) { return x.half ? 2 : 4; }

// The part of an operand from element (row, column) on.
Bf16Operand from(const Bf16Operand& x, int64_t row, int64_t column) {
  const int64_t offset = x.transposed ? column * x.ld + row : row * x.ld + column;
  return {static_cast<const char*>(x.data) + offset * element(x), x.ld, x.transposed, x.half};
}

// Rows of memory that are needed soon, and are asked for little by little: memory takes some requests at a time, and whoever
// makes more of them waits.
class Ahead {
 public:
  Ahead() = default;
  // Rows of `columns` elements each; to be asked for in so many times.
  Ahead(const Bf16Operand& x, int64_t rows, int64_t columns, int64_t times)
      : at_(static_cast<const char*>(x.data)), step_(x.ld * element(x)), lines_(ceil_div(columns * element(x), 64)), rows_(rows),
        each_(ceil_div(rows * lines_, times)) {}
  void ask() {
    for (int64_t n = each_; n > 0 && rows_ > 0; --n) {
      __builtin_prefetch(at_ + 64 * line_, 0, 2);
      if (++line_ < lines_) continue;
      line_ = 0, at_ += step_, --rows_;
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t step_ = 0, lines_ = 0, rows_ = 0, each_ = 0, line_ = 0;
};

// Rows of strip s: they are shared out evenly, in steps of a tile, since a last tile of one row would waste registers.
Range strip_rows(Range rows, int64_t step, int64_t s, int64_t strips) {
  const Range r = share(ceil_div(rows.size(), step), s, strips);
  return {rows.begin + r.begin * step, min(rows.begin + r.end * step, rows.end)};
}

// The packed rows of one part of A: `strips` of them, of products [k, k + depth).
struct Strips {
  char* memory;
  int64_t size;  // bytes of a strip
  Range rows;
  int64_t strips;
  int64_t step;  // Bf16Tiles::row_step
  Range of(int64_t s) const { return strip_rows(rows, step, s, strips); }
  Range of(int64_t s0, int64_t s1) const { return {of(s0).begin, of(s1 - 1).end}; }
};

constexpr int64_t kRun = 64;  // rows of memory that are packed for one strip or panel, and then for the next

// Packs strips [s0, s1) into the places [at, at + s1 - s0). What `hand_out` says: A's rounded rows are wanted, too.
void pack_strips(const Bf16Product& p, const Bf16Tiles& tiles, const Strips& a, int64_t s0, int64_t s1, int64_t at, int64_t k,
                 int64_t depth, bool hand_out) {
  const int64_t run = p.A.transposed ? kRun : depth;  // one strip is narrower than a cache line
  for (int64_t d = 0; d < depth; d += run)
    for (int64_t s = s0; s < s1; ++s) {
      const Range r = a.of(s);
      Bf16Operand A = from(p.A, r.begin, k + d);
      if (hand_out) {
        uint16_t* const to = p.rounded_a + r.begin * p.K + k;
        for (int64_t i = 0; i < r.size(); ++i)
          tiles.round(static_cast<const float*>(from(A, i, 0).data), to + i * p.K, depth);
        A = rows_of(to, p.K);
      }
      tiles.pack_strip(A, r.size(), min(run, depth - d), a.memory + (at + s - s0) * a.size + d * tiles.transposed_step);
    }
}

// What of A strips [s0, s1) are made from, if there are such strips.
Ahead ahead(const Bf16Product& p, const Strips& a, int64_t s0, int64_t s1, int64_t k, int64_t depth, int64_t times) {
  if (s0 >= s1) return {};
  const Range r = a.of(s0, s1);
  const Bf16Operand A = from(p.A, r.begin, k);
  return p.A.transposed ? Ahead(A, depth, r.size(), times) : Ahead(A, r.size(), depth, times);
}

// Products that are added up before they join C.
int64_t depth_step(const Bf16Tiles& tiles, int64_t K) {
  const int64_t blocks = K > tiles.depth ? ceil_div(K, tiles.depth) : 1;
  return ceil_div(ceil_div(K, blocks), 32) * 32;
}

// Packs columns [j0, j1) of B, of products [k, k + depth).
void pack_panels(const Bf16Operand& B, const Bf16Tiles& tiles, int64_t j0, int64_t j1, int64_t k, int64_t depth, char* packed,
                 int64_t size) {
  const int64_t run = B.transposed ? depth : kRun;
  for (int64_t d = 0; d < depth; d += run)
    for (int64_t j = j0; j < j1; j += tiles.columns)
      tiles.pack_panel(from(B, k + d, j), min(tiles.columns, j1 - j), min(run, depth - d),
                       packed + (j - j0) / tiles.columns * size + d * tiles.panel_step);
}

void multiply_part(const Bf16Product& p, const Bf16Tiles& tiles, Range rows, Range columns, Bf16Done done, void* context) {
  thread_local Scratch scratch;
  const int64_t step = depth_step(tiles, p.K);
  const int64_t panel_size = tiles.panel_bytes(step), strip_size = tiles.strip_bytes(step, p.A.transposed);
  const int64_t panels = min(ceil_div(columns.size(), tiles.columns), max(kBlock / max(panel_size, 1), 1));
  const int64_t wide = panels * tiles.columns;
  // Where B has several blocks, the rows of A that meet all of them are packed once, so many that B's packing, which
  // is done again for each such lot, does not matter. Else a strip or a few (of which 8 are three cache lines of floats).
  const bool keep = columns.size() > wide;
  const int64_t group = p.A.transposed ? 8 : 1;
  const int64_t lot = keep ? min(rows.size(), max(kKept / max(strip_size, 1), 64) * tiles.rows) : rows.size();
  const int64_t places = keep ? ceil_div(lot, tiles.rows) : group;
  const int64_t part_size = p.C ? 0 : 4 * tiles.rows * wide;
  char* const packed = reinterpret_cast<char*>(scratch.floats((panels * panel_size + places * strip_size + part_size) / 4));
  float* const part = reinterpret_cast<float*>(packed + panels * panel_size + places * strip_size);
  const HeldBf16Tiles held(tiles);
  for (int64_t i0 = rows.begin; i0 < rows.end; i0 += lot) {
    const Range some{i0, min(i0 + lot, rows.end)};
    const Strips a{packed + panels * panel_size, strip_size, some, ceil_div(some.size(), tiles.rows), tiles.row_step};
    Ahead next;
    int64_t k = 0;
    do {
      const int64_t depth = min(step, p.K - k);
      const bool first = k == 0, last = k + depth == p.K;
      for (int64_t j0 = columns.begin; j0 < columns.end; j0 += wide) {
        const int64_t j1 = min(j0 + wide, columns.end);
        const char* block = packed;
        if (p.packed_b)
          block = p.packed_b + (k / max(step, 1) * ceil_div(p.N, tiles.columns) + j0 / tiles.columns) * panel_size;
        else
          pack_panels(p.B, tiles, j0, j1, k, depth, packed, panel_size);
        for (int64_t s = 0; s < a.strips; ++s) {
          // every part of the rows rounds for itself, and the one with the first columns hands it out
          if (s % group == 0 && (!keep || j0 == columns.begin)) {
            const int64_t end = min(s + group, a.strips);
            pack_strips(p, tiles, a, s, end, keep ? s : 0, k, depth, p.rounded_a && columns.begin == 0);
            next = ahead(p, a, end, min(end + group, a.strips), k, depth, (end - s) * ceil_div(j1 - j0, tiles.columns));
          }
          const Range r = a.of(s);
          const char* const strip = a.memory + (keep ? s : s % group) * strip_size;
          float* const C = p.C ? p.C + r.begin * p.ldc + j0 : part;
          const int64_t ldc = p.C ? p.ldc : wide;
          for (int64_t j = j0; j < j1; j += tiles.columns) {
            next.ask();
            tiles.tile(r.size(), depth, strip, p.A.transposed, block + (j - j0) / tiles.columns * panel_size,
                       {C + j - j0, ldc, min(tiles.columns, j1 - j), first && p.bias ? p.bias + j : nullptr,
                        p.accumulate || !first});
          }
          if (last && done) done(context, C, ldc, r.begin, r.end, j0, j1);
        }
      }
      k += depth;
    } while (k < p.K);
  }
}

}  // namespace

const Bf16Tiles& bf16_tiles() {
#if defined(PORTLM_HAVE_AVX512_AMX) && defined(PORTLM_ISA_AVX512)
  if (g_native >= 2 && amx_in_use()) return avx512_amx::own_bf16_tiles;
#endif
#if defined(PORTLM_HAVE_AVX512_BF16) && defined(PORTLM_ISA_AVX512)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  if (g_native >= 1 && has) return avx512_bf16::own_bf16_tiles;
#endif
  return own_bf16_tiles;
}

int64_t packed_bytes_bf16(int64_t K, int64_t N) {
  const Bf16Tiles& tiles = bf16_tiles();
  const int64_t step = depth_step(tiles, K);
  return ceil_div(ceil_div(K, max(step, 1)) * ceil_div(N, tiles.columns) * tiles.panel_bytes(step), 64) * 64;
}

void pack_bf16(const Bf16Operand& B, int64_t K, int64_t N, char* packed) {
  const Bf16Tiles& tiles = bf16_tiles();
  const int64_t step = depth_step(tiles, K), size = tiles.panel_bytes(step), panels = ceil_div(N, tiles.columns);
  for (int64_t k = 0; k < K; k += step)
    parallel_for(panels, kGrain / (step + 1) + 1, [&](int64_t begin, int64_t end) {
      pack_panels(B, tiles, begin * tiles.columns, min(N, end * tiles.columns), k, min(step, K - k),
                  packed + (k / step * panels + begin) * size, size);
    });
}

void multiply_bf16(const Bf16Product& p, Bf16Done done, void* context) {
  if (p.M <= 0 || p.N <= 0) return;
  const Bf16Tiles& tiles = bf16_tiles();
  const int64_t threads = threads_for(product_cycles(p.M, p.N, p.K, tiles.rate), kGrain);
  const Grid grid = best_grid(p.M, p.N, p.K, tiles.columns, tiles.rate, threads);
  const int64_t column_tiles = ceil_div(p.N, tiles.columns);
  parallel_for(grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range c = share(column_tiles, part / grid.rows, grid.columns);
      multiply_part(p, tiles, share(p.M, part % grid.rows, grid.rows),
                    {c.begin * tiles.columns, min(p.N, c.end * tiles.columns)}, done, context);
    }
  });
}

void sum_rows_bf16(const uint16_t* x, int64_t ld, float* out, int64_t rows, int64_t N, bool accumulate) {
  constexpr int64_t kRows = 32;      // that are added up before they join the total, to keep rounding errors low
  constexpr int64_t kColumns = 128;  // at a time
  parallel_for(ceil_div(N, kColumns), 4 * kGrain / (rows * kColumns / 16 + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t j = begin * kColumns; j < min(N, end * kColumns); j += kColumns) {
      const int64_t count = min(kColumns, N - j);
      float total[kColumns] = {}, sums[kColumns], row[kColumns];
      for (int64_t i0 = 0; i0 < rows; i0 += kRows) {
        for (int64_t c = 0; c < kColumns; ++c) sums[c] = 0.0f;
        for (int64_t i = i0; i < min(i0 + kRows, rows); ++i) {
          widen(x + i * ld + j, row, count);
          for (int64_t c = 0; c < count; ++c) sums[c] += row[c];
        }
        for (int64_t c = 0; c < count; ++c) total[c] += sums[c];
      }
      for (int64_t c = 0; c < count; ++c) out[j + c] = accumulate ? out[j + c] + total[c] : total[c];
    }
  });
}

void gemm_bf16(const void* A, const void* B, const float* bias, float* C, int64_t M, int64_t N, int64_t K, int64_t lda,
               int64_t ldb, int64_t ldc, int transpose_a, int transpose_b, int half_a, int half_b, int accumulate) {
  multiply_bf16({{A, lda, transpose_a != 0, half_a != 0}, {B, ldb, transpose_b != 0, half_b != 0}, bias, C, M, N, K, ldc,
                 accumulate != 0});
}

void round_bf16(const float* x, uint16_t* y, int64_t n) {
  const Bf16Tiles& tiles = bf16_tiles();
  parallel_for(n, kElementwiseGrain, [&](int64_t begin, int64_t end) { tiles.round(x + begin, y + begin, end - begin); });
}

int64_t native_bf16(int64_t most) {
  g_native = most;
  return bf16_tiles().native;
}

}  // namespace PORTLM_ISA
}  // namespace portlm
