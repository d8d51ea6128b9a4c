// Products of matrices that are rounded to bfloat16 on the way in.
//
// As in gemm.cpp, B is packed block by block, and C is made tile by tile; here A is packed as well, a strip of a tile's rows
// at a time, because it has to be rounded. Both cost a few hundredths of the product where each side has some hundred rows.
#include "cpu/gemm_bf16.h"

#include "cpu/gemm_grid.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace portlm {

#ifdef PORTLM_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Bf16Tiles own_bf16_tiles;
}
#endif

namespace PORTLM_ISA {

extern const Bf16Tiles own_bf16_tiles;

namespace {

// A block of B has at most kDepth rows and kWidth columns: half of a 1 MB L2 as bfloat16. The sum over k is added up per
// kDepth products, as in gemm.cpp.
constexpr int64_t kDepth = 512;
constexpr int64_t kWidth = 512;
constexpr int64_t kRate = 32;        // products per cycle, of a core that multiplies pairs
constexpr int64_t kGrain = 1 << 13;  // cycles below which a second thread costs more than it brings

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether the processor's own instruction may be used, if there is one.
bool g_native = true;

int64_t element(const Bf16Operand& x) { return x.half ? 2 : 4; }

// The part of an operand from element (row, column) on.
Bf16Operand from(const Bf16Operand& x, int64_t row, int64_t column) {
  const int64_t offset = x.transposed ? column * x.ld + row : row * x.ld + column;
  return {static_cast<const char*>(x.data) + offset * element(x), x.ld, x.transposed, x.half};
}

// Asks for `rows` x `columns` elements that are needed soon.
void prefetch(const Bf16Operand& x, int64_t rows, int64_t columns) {
  if (x.transposed) {
    const int64_t other = rows;
    rows = columns, columns = other;
  }
  const char* p = static_cast<const char*>(x.data);
  for (int64_t r = 0; r < rows; ++r, p += x.ld * element(x))
    for (int64_t byte = 0; byte < columns * element(x); byte += 64) __builtin_prefetch(p + byte, 0, 2);
}

// Rounds rows [i, i + count) of A (M, K), columns [k, k + depth), and returns where they are.
Bf16Operand round_rows(const Bf16Product& p, const Bf16Tiles& tiles, int64_t i, int64_t count, int64_t k, int64_t depth) {
  uint16_t* const to = p.rounded_a + i * p.K + k;
  for (int64_t r = 0; r < count; ++r)
    tiles.round(static_cast<const float*>(from(p.A, i + r, k).data), to + r * p.K, depth);
  return rows_of(to, p.K);
}

void multiply_part(const Bf16Product& p, const Bf16Tiles& tiles, Range rows, Range columns, PartDone done, void* context) {
  thread_local Scratch scratch;
  const int64_t depth_blocks = p.K > kDepth ? ceil_div(p.K, kDepth) : 1;
  const int64_t depth_step = ceil_div(ceil_div(p.K, depth_blocks), 32) * 32;
  const int64_t panel_size = tiles.panel_bytes(depth_step), strip_size = tiles.strip_bytes(depth_step);
  const int64_t panels = ceil_div(min(kWidth, columns.size()), tiles.columns);
  char* const packed = reinterpret_cast<char*>(scratch.floats((panels * panel_size + strip_size) / 4));
  char* const strip = packed + panels * panel_size;
  const int64_t strips = ceil_div(rows.size(), tiles.rows);
  const bool far = p.M * p.K + p.K * p.N > 1 << 18;
  const int64_t wide = panels * tiles.columns;
  for (int64_t j0 = columns.begin; j0 < columns.end; j0 += wide) {
    const int64_t j1 = min(j0 + wide, columns.end);
    int64_t k = 0;
    do {
      const int64_t depth = min(depth_step, p.K - k);
      const bool first = k == 0, last = k + depth == p.K;
      for (int64_t j = j0; j < j1; j += tiles.columns)
        tiles.pack_panel(from(p.B, k, j), min(tiles.columns, j1 - j), depth, packed + (j - j0) / tiles.columns * panel_size);
      for (int64_t s = 0; s < strips; ++s) {
        const Range r = share(rows.size(), s, strips);  // evenly: a last tile of one row would waste registers
        const int64_t i = rows.begin + r.begin;
        // every part of the rows rounds for itself, and the one with the first columns hands it out
        const bool hand_out = p.rounded_a && j0 == 0;
        const Bf16Operand A = hand_out ? round_rows(p, tiles, i, r.size(), k, depth) : from(p.A, i, k);
        tiles.pack_strip(A, r.size(), depth, strip);
        if (far && s + 1 < strips) prefetch(from(p.A, i + r.size(), k), tiles.rows, depth);
        for (int64_t j = j0; j < j1; j += tiles.columns)
          tiles.tile(r.size(), depth, strip, p.A.transposed, packed + (j - j0) / tiles.columns * panel_size,
                     {p.C + i * p.ldc + j, p.ldc, min(tiles.columns, j1 - j), first && p.bias ? p.bias + j : nullptr,
                      p.accumulate || !first});
        if (last && done) done(context, i, i + r.size(), j0, j1);
      }
      k += depth;
    } while (k < p.K);
  }
}

}  // namespace

const Bf16Tiles& bf16_tiles() {
#if defined(PORTLM_HAVE_AVX512_BF16) && defined(PORTLM_ISA_AVX512)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  if (has && g_native) return avx512_bf16::own_bf16_tiles;
#endif
  return own_bf16_tiles;
}

void multiply_bf16(const Bf16Product& p, PartDone done, void* context) {
  if (p.M <= 0 || p.N <= 0) return;
  const Bf16Tiles& tiles = bf16_tiles();
  const int64_t threads = threads_for(product_cycles(p.M, p.N, p.K, kRate), kGrain);
  const Grid grid = best_grid(p.M, p.N, p.K, tiles.columns, kRate, threads);
  const int64_t column_tiles = ceil_div(p.N, tiles.columns);
  parallel_for(grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range c = share(column_tiles, part / grid.rows, grid.columns);
      multiply_part(p, tiles, share(p.M, part % grid.rows, grid.rows),
                    {c.begin * tiles.columns, min(p.N, c.end * tiles.columns)}, done, context);
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

int64_t native_bf16(int64_t allow) {
  g_native = allow != 0;
  return bf16_tiles().native;
}

}  // namespace PORTLM_ISA
}  // namespace portlm
