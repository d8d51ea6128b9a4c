// y = activation(x W^T + bias) for a quantized W as pack_matrix leaves it.
//
// Activations become whole numbers of 15 bits per group, so that products and their sums are exact and what is lost
// against float32 is about 1e-5 of the largest output; or, for half the products, of 8 bits with the sign, which loses some 1e-3.
// Every element of y is computed by one thread with the same
// operations whatever else is computed beside it: results are the same, bit for bit, for any number of threads, and a
// row's for any number of rows.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/packed_rounding.h"
#include "cpu/packed_tiles.h"
#include "cpu/parallel.h"
#if defined(PORTLM_ISA_AVX512_AMX)
#include "cpu/packed_amx.h"
#endif

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;  // cycles below which a second thread costs more than it brings
constexpr int64_t kRowsAtOnce = 512;  // enough that reading the matrix again does not matter
constexpr int64_t kPanelBytes = 1 << 18;  // of activations that stay in L2 while tiles pass

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Linear {
  PackedMatrix m;
  const float* x;
  const uint8_t* packed;
  const float* bias;
  float* y;
  int64_t rows;
  int activation;
};

// Writes row r of a panel of `rows` rows. A single one is a case of its own: its words lie side by side.
template <typename D, bool kSingle>
void fill_row(const PackedMatrix& m, const float* x, uint32_t* panel, int64_t rows, int64_t r) {
  constexpr int64_t kWords = D::kWords;
  const int64_t group = m.group, R = kSingle ? 1 : rows;
  const int32_t zero = m.has_zeros ? -1 : D::kOffset - (1 << (D::kBits - 1));  // -1: the kernel multiplies by the zeros
  if (kSingle) r = 0;
  constexpr int64_t kAtOnce = 8;  // groups whose largest are sought together: each takes many steps, one after the other
  float largest[kAtOnce];
  WholeGroup whole;
  for (int64_t g = 0; g < m.groups; ++g, x += group) {
    if (g % kAtOnce == 0)
      for (int64_t i = 0; i < min(kAtOnce, m.groups - g); ++i) largest[i] = largest_of(x + i * group, group);
    take_group<D::kWidth>(x, group, largest[g % kAtOnce], whole);
    for (int64_t i = 0; i < group; i += 16, panel += 4 * kWords * R) {
      if (kSingle) {
        D::arrange(whole.x + i, panel);
        continue;
      }
      uint32_t words[4 * kWords];
      D::arrange(whole.x + i, words);
      for (int64_t unit = 0; unit < 4; ++unit)
        std::memcpy(panel + kWords * (unit * R + r), words + kWords * unit, 4 * kWords);
    }
    panel[r] = static_cast<uint32_t>(whole.total * zero);
    std::memcpy(panel + R + r, &whole.scale, 4);
    panel += 2 * R;
  }
}

template <typename D>
void fill_panel(const Linear& p, int64_t row, int64_t rows, uint32_t* words) {
  const auto fill = rows == 1 ? fill_row<D, true> : fill_row<D, false>;
  for (int64_t r = 0; r < rows; ++r) fill(p.m, p.x + (row + r) * p.m.K, words, rows, r);
}

template <typename Function>
void apply(float* sums, int64_t rows, Function function) {
  for (int64_t i = 0; i < rows * kTileHeight; i += Vec::N) function(Vec::load(sums + i)).store(sums + i);
}

// Out of line, for it is long and most layers have none.
__attribute__((noinline)) void activate(float* sums, int64_t rows, int activation) {
  switch (activation) {
    case 1: return apply(sums, rows, [](Vec v) { return GeluExact::value(v); });
    case 2: return apply(sums, rows, [](Vec v) { return GeluTanh::value(v); });
    case 3: return apply(sums, rows, [](Vec v) { return v = max(Vec(0.0f), v), v * v; });  // NaN stays NaN
    case 4: return apply(sums, rows, [](Vec v) { return max(Vec(0.0f), v); });
    default: return;
  }
}

// Adds the bias to the sums of one tile (rows, 16), applies the activation and writes rows [row, row + rows) of y.
inline void finish(const Linear& p, float* sums, int64_t tile, int64_t row, int64_t rows) {
  const int64_t column = tile * kTileHeight, columns = min(kTileHeight, p.m.N - column);
  if (p.bias)
    for_lanes(columns, [&](int64_t j, auto lanes) {
      const Vec bias = load(p.bias + column + j, lanes);
      for (int64_t r = 0; r < rows; ++r) (Vec::load(sums + r * kTileHeight + j) + bias).store(sums + r * kTileHeight + j);
    });
  if (p.activation) activate(sums, rows, p.activation);
  for (int64_t r = 0; r < rows; ++r)
    for_lanes(columns, [&](int64_t j, auto lanes) {
      store(Vec::load(sums + r * kTileHeight + j), p.y + (row + r) * p.m.N + column + j, lanes);
    });
}

// Tiles [begin, end), T at once: each of T parts is a stream of its own, read from end to end. What is left takes fewer.
template <typename D, int R, int T = kTilesAtOnce<R>>
void multiply_slab(const Linear& p, const uint32_t* panel, int64_t row, int64_t begin, int64_t end) {
  const int64_t part = (end - begin) / T;
  TileSums sums[T];
  for (int64_t i = 0; i < part; ++i) {
    const uint8_t* tiles[T];
    for (int t = 0; t < T; ++t) tiles[t] = p.packed + (begin + t * part + i) * p.m.tile_bytes;
    multiply_tiles<D, R, T>(p.m, panel, tiles, sums);
    for (int t = 0; t < T; ++t) finish(p, sums[t].v, begin + t * part + i, row, R);
  }
  if constexpr (T > 1)
    if (begin + T * part < end) multiply_slab<D, R, T / 2>(p, panel, row, begin + T * part, end);
}

using Slab = void (*)(const Linear& p, const uint32_t* panel, int64_t row, int64_t begin, int64_t end);

template <typename D, int R = kPanelRows>
Slab slab_of(int64_t rows) {
  if constexpr (R == 1)
    return multiply_slab<D, 1>;
  else
    return rows == R ? multiply_slab<D, R> : slab_of<D, R - 1>(rows);
}

// Rows of x as panels of whole numbers, which are as equal in height as can be: `row` is the first of them in x and y.
struct Panels {
  const uint32_t* words;
  int64_t row, rows, count;

  int64_t start(int64_t panel) const { return rows * panel / count; }
};

// Panels [first, last) times tiles [begin, end). Of several panels, each tile meets all before the next one is read.
template <typename D>
void multiply_panels(const Linear& p, const Panels& x, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const int64_t per_row = words_per_row<D>(p.m), step = last - first == 1 ? end - begin : 1;
  for (int64_t tile = begin; tile < end; tile += step)
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t r = x.start(panel), rows = x.start(panel + 1) - r;
      slab_of<D>(rows)(p, x.words + r * per_row, x.row + r, tile, tile + step);
    }
}

// Up to kPanelRows rows: a pass over the matrix, of which each thread takes a part.
template <typename D>
void multiply_few(const Linear& p) {
  const int64_t tile_cycles = p.m.K * (p.rows + 1) / 2 + 1;  // with one byte somewhat less
  parallel_for(p.m.tiles, kGrain / tile_cycles + 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;  // each thread makes the whole numbers for itself: that is cheaper than to wait for them
    uint32_t* const words = reinterpret_cast<uint32_t*>(scratch.floats(p.rows * words_per_row<D>(p.m)));
    fill_panel<D>(p, 0, p.rows, words);
    multiply_panels<D>(p, {words, 0, p.rows, 1}, 0, 1, begin, end);
  });
}

// Many rows, kRowsAtOnce of them at a time: first all of them as whole numbers, then parts of y.
template <typename D>
void multiply_many(const Linear& p) {
  thread_local Scratch scratch;
  const int64_t per_row = words_per_row<D>(p.m), tiles = p.m.tiles;
  const int64_t in_cache = kPanelBytes / (4 * kPanelRows * per_row + 1) + 1;
  for (int64_t row = 0; row < p.rows; row += kRowsAtOnce) {
    const int64_t rows = min(kRowsAtOnce, p.rows - row), count = ceil_div(rows, kPanelRows);
    uint32_t* const words = reinterpret_cast<uint32_t*>(scratch.floats(rows * per_row));
    const Panels x{words, row, rows, count};
    parallel_for(count, kGrain / (2 * kPanelRows * p.m.K + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        fill_panel<D>(p, row + x.start(i), x.start(i + 1) - x.start(i), words + x.start(i) * per_row);
    });
    // Threads share the tiles, so that each reads its own part of the matrix, and rows only where there are too few.
    const int64_t threads = threads_for(tiles * rows * p.m.K, kGrain);
    const int64_t columns = min(threads, tiles), parts = columns * min(threads / columns, count);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part % columns, j = part / columns, heights = parts / columns;
        const int64_t last = count * (j + 1) / heights;
        for (int64_t first = count * j / heights; first < last; first += in_cache)
          multiply_panels<D>(p, x, first, min(last, first + in_cache), tiles * i / columns, tiles * (i + 1) / columns);
      }
    });
  }
}

#if defined(PORTLM_ISA_AVX512_AMX)

constexpr int64_t kChunkBytes = 36 << 10;  // of a block and of some tiles that stay in L1 while they are multiplied
constexpr int64_t kBlocksBytes = 1 << 20;  // of blocks that stay in L2 while tiles pass
constexpr int64_t kTilesTogether = 2;

std::atomic<uint64_t> in_tiles{0};  // calls of multiply_in_tiles, for tests: fewer rows take another path of the same kernel

// Blocks [first, last) of the activations at a, which begin with row `row`, times tiles [begin, end).
template <typename T, int bits>
void multiply_part(const Linear& p, const uint8_t* a, int64_t row, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const PackedMatrix& m = p.m;
  const auto multiply = bits == 8 && m.has_zeros ? multiply_blocks<T, bits == 8> : multiply_blocks<T, false>;
  const int64_t block_bytes = m.groups * T::kBytesA, in_cache = kBlocksBytes / (block_bytes + 1) + 1;
  const int64_t chunks = m.groups * (T::kBytesA + kTilesTogether * T::kBytesB) / kChunkBytes + 1;
  const int64_t chunk = ceil_div(m.groups, chunks);
  thread_local Scratch weights, floats;
  uint8_t* const b = reinterpret_cast<uint8_t*>(weights.floats(kTilesTogether * chunk * T::kBytesB / 4));
  float* const sums = floats.floats(in_cache * kTilesTogether * kBlockSums);
  for (; first < last; first += in_cache) {
    const int64_t blocks = min(in_cache, last - first);
    for (int64_t tile = begin; tile < end; tile += kTilesTogether) {
      const int64_t tiles = min(kTilesTogether, end - tile);
      for (int64_t g = 0; g < m.groups; g += chunk) {
        const int64_t groups = min(chunk, m.groups - g);
        for (int64_t t = 0; t < tiles; ++t)
          unpack_tile<T, bits>(m, p.packed + (tile + t) * m.tile_bytes + g * m.group_bytes, groups, b + t * groups * T::kBytesB);
        multiply({a + first * block_bytes + g * T::kBytesA, block_bytes, blocks, b, tiles, groups, sums, g == 0});
      }
      for (int64_t i = 0; i < blocks; ++i)
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t r = row + (first + i) * kBlockRows;
          finish(p, sums + (i * tiles + t) * kBlockSums, tile + t, r, min(kBlockRows, p.rows - r));
        }
    }
  }
}

// As multiply_many.
template <typename T, int bits>
void multiply_in_tiles(const Linear& p) {
  in_tiles.fetch_add(1, std::memory_order_relaxed);
  thread_local Scratch scratch;
  const int64_t tiles = p.m.tiles, block_bytes = p.m.groups * T::kBytesA;
  for (int64_t row = 0; row < p.rows; row += kRowsAtOnce) {
    const int64_t rows = min(kRowsAtOnce, p.rows - row), count = ceil_div(rows, kBlockRows);
    uint8_t* const a = reinterpret_cast<uint8_t*>(scratch.floats(count * block_bytes / 4));
    parallel_for(count, kGrain / (kBlockRows * p.m.K) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        uint8_t* const block = a + i * block_bytes;
        const int64_t first = i * kBlockRows, height = min(kBlockRows, rows - first);
        if (height < kBlockRows) std::memset(block, 0, static_cast<size_t>(block_bytes));
        for (int64_t r = 0; r < height; ++r)
          fill_block_row<T>(p.x + (row + first + r) * p.m.K, p.m.groups, block, r);
      }
    });
    const int64_t threads = threads_for(tiles * rows * p.m.K / 4, kGrain);
    const int64_t columns = min(threads, tiles), parts = columns * min(threads / columns, count);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part % columns, j = part / columns, heights = parts / columns;
        multiply_part<T, bits>(p, a, row, count * j / heights, count * (j + 1) / heights, tiles * i / columns,
                               tiles * (i + 1) / columns);
      }
    });
  }
}

template <typename D>
void multiply(const Linear& p) {
  constexpr int bits = D::kBits;
  constexpr Numbers kNumbers = D::kWidth == 1 ? Numbers::kBytes : Numbers::kHalves;
  if (p.rows <= kPanelRows) return multiply_few<D>(p);
  // 32 * 15 * 16319 is less than 2^24. Of more columns, products with bfloat16 cost more than sums of their own.
  if (p.m.group == 32) return multiply_in_tiles<GroupTiles<32, D::kWidth == 2 && bits == 4 ? Numbers::kFloats : kNumbers>, bits>(p);
  if (p.m.group == 64) return multiply_in_tiles<GroupTiles<64, kNumbers>, bits>(p);
  multiply_in_tiles<GroupTiles<128, kNumbers>, bits>(p);
}

#else

template <typename D>
void multiply(const Linear& p) {
  p.rows <= kPanelRows ? multiply_few<D>(p) : multiply_many<D>(p);
}

#endif

// Activations of so many bytes.
template <int width>
void linear(const float* x, const uint8_t* packed, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
            int64_t group, int64_t bits, int has_zeros, int activation) {
  if (rows <= 0 || N <= 0) return;
  const Linear p{PackedMatrix(N, K, group, bits, has_zeros != 0), x, packed, bias, y, rows, activation};
  bits == 4 ? multiply<Dots<4, width>>(p) : multiply<Dots<8, width>>(p);
}

}  // namespace

#if defined(PORTLM_ISA_AVX512_AMX)
uint64_t products_in_tiles() { return in_tiles.load(std::memory_order_relaxed); }
#endif

void packed_linear(const float* x, const uint8_t* packed, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
                   int64_t group, int64_t bits, int has_zeros, int activation) {
  linear<2>(x, packed, bias, y, rows, N, K, group, bits, has_zeros, activation);
}

void packed_linear_a8(const float* x, const uint8_t* packed, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
                      int64_t group, int64_t bits, int has_zeros, int activation) {
  linear<1>(x, packed, bias, y, rows, N, K, group, bits, has_zeros, activation);
}

}  // namespace portlm::PORTLM_ISA
