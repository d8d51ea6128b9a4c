// y = activation(x W^T + bias) for a quantized W as pack_matrix leaves it.
//
// Activations become whole numbers of 15 bits per group, so that products and their sums are exact and what is lost
// against float32 is about 1e-5 of the largest output; or, for half the products, of 8 bits with the sign, which loses some 1e-3.
// Every element of y is computed by one thread with the same
// operations whatever else is computed beside it: results are the same, bit for bit, for any number of threads, and a
// row's for any number of rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/packed_tiles.h"
#include "cpu/parallel.h"

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

constexpr int64_t kMostColumns = 128;  // of a group

// One group of one row in whole numbers X, which kernels take in one or two bytes: x is about X times scale.
struct Whole {
  int16_t x[kMostColumns];
  int32_t total;
  float scale;
};

// Any group. One with NaN in it becomes NaN, and of one with infinities only these remain, so that either reaches y.
template <int width>
__attribute__((noinline)) void take_odd(const float* x, int64_t group, Whole& to) {
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr double kLargest = kLargestActivation<width>;
  double largest = 0.0;
  bool nan = false;
  for (int64_t i = 0; i < group; ++i) {
    nan |= x[i] != x[i];
    largest = std::max(largest, std::abs(static_cast<double>(x[i])));
  }
  const double inverse = largest > 0.0 ? kLargest / largest : 0.0;
  to.total = 0;
  for (int64_t i = 0; i < group; ++i) {
    const double whole = nan ? 0.0 : largest == kInf ? (x[i] == kInf) - (x[i] == -kInf) : std::nearbyint(x[i] * inverse);
    to.x[i] = static_cast<int16_t>(whole);
    to.total += to.x[i];
  }
  to.scale = nan ? kNan : largest == kInf ? kInf : static_cast<float>(largest / kLargest);
}

// The largest of a group, NaN aside.
inline float largest_of(const float* x, int64_t group) {
  Vec most(0.0f);
  for (int64_t i = 0; i < group; i += Vec::N) most = max(abs(Vec::load(x + i)), most);
  return hmax(most);
}

template <int width>
inline void take_group(const float* x, int64_t group, float largest, Whole& to) {
  constexpr float kLargest = kLargestActivation<width>;
  if (!(largest > 1e-30f && largest < 1e38f)) return take_odd<width>(x, group, to);  // its inverse, or it, may be infinite
  const Vec inverse(kLargest / largest);
  Vec total(0.0f);
  for (int64_t i = 0; i < group; i += Vec::N) {
    const Vec whole = round(Vec::load(x + i) * inverse);
    total += whole;
    store_int16(whole, to.x + i);
  }
  const float sum_of_whole = sum(total);  // exact, for it is less than 2^24
  if (sum_of_whole != sum_of_whole) return take_odd<width>(x, group, to);  // NaN
  to.total = static_cast<int32_t>(sum_of_whole);
  to.scale = largest * (1.0f / kLargest);
}

// Writes row r of a panel of `rows` rows. A single one is a case of its own: its words lie side by side.
template <typename D, bool kSingle>
void fill_row(const PackedMatrix& m, const float* x, uint32_t* panel, int64_t rows, int64_t r) {
  constexpr int64_t kWords = D::kWords;
  const int64_t group = m.group, R = kSingle ? 1 : rows;
  const int32_t zero = m.has_zeros ? -1 : D::kOffset - (1 << (D::kBits - 1));  // -1: the kernel multiplies by the zeros
  if (kSingle) r = 0;
  constexpr int64_t kAtOnce = 8;  // groups whose largest are sought together: each takes many steps, one after the other
  float largest[kAtOnce];
  Whole whole;
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
void apply(TileSums& sums, int64_t rows, Function function) {
  for (int64_t i = 0; i < rows * kTileHeight; i += Vec::N) function(Vec::load(sums.v + i)).store(sums.v + i);
}

// Out of line, for it is long and most layers have none.
__attribute__((noinline)) void activate(TileSums& sums, int64_t rows, int activation) {
  switch (activation) {
    case 1: return apply(sums, rows, [](Vec v) { return GeluExact::value(v); });
    case 2: return apply(sums, rows, [](Vec v) { return GeluTanh::value(v); });
    case 3: return apply(sums, rows, [](Vec v) { return v = max(Vec(0.0f), v), v * v; });  // NaN stays NaN
    default: return;
  }
}

// Adds the bias to the sums of one tile, applies the activation and writes rows [row, row + rows) of y.
inline void finish(const Linear& p, TileSums& sums, int64_t tile, int64_t row, int64_t rows) {
  const int64_t column = tile * kTileHeight, columns = min(kTileHeight, p.m.N - column);
  if (p.bias)
    for_lanes(columns, [&](int64_t j, auto lanes) {
      const Vec bias = load(p.bias + column + j, lanes);
      for (int64_t r = 0; r < rows; ++r) (Vec::load(sums.v + r * kTileHeight + j) + bias).store(sums.v + r * kTileHeight + j);
    });
  if (p.activation) activate(sums, rows, p.activation);
  for (int64_t r = 0; r < rows; ++r)
    for_lanes(columns, [&](int64_t j, auto lanes) {
      store(Vec::load(sums.v + r * kTileHeight + j), p.y + (row + r) * p.m.N + column + j, lanes);
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
    for (int t = 0; t < T; ++t) finish(p, sums[t], begin + t * part + i, row, R);
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

template <typename D>
void multiply(const Linear& p) {
  p.rows <= kPanelRows ? multiply_few<D>(p) : multiply_many<D>(p);
}

// Activations of so many bytes.
template <int width>
void linear(const float* x, const uint8_t* packed, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
            int64_t group, int64_t bits, int has_zeros, int activation) {
  if (rows <= 0 || N <= 0) return;
  const Linear p{PackedMatrix(N, K, group, bits, has_zeros != 0), x, packed, bias, y, rows, activation};
  bits == 4 ? multiply<Dots<4, width>>(p) : multiply<Dots<8, width>>(p);
}

}  // namespace

void packed_linear(const float* x, const uint8_t* packed, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
                   int64_t group, int64_t bits, int has_zeros, int activation) {
  linear<2>(x, packed, bias, y, rows, N, K, group, bits, has_zeros, activation);
}

void packed_linear_a8(const float* x, const uint8_t* packed, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
                      int64_t group, int64_t bits, int has_zeros, int activation) {
  linear<1>(x, packed, bias, y, rows, N, K, group, bits, has_zeros, activation);
}

}  // namespace portlm::PORTLM_ISA
