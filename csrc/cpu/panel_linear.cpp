// Linear maps whose matrix W (N, K) lies in panels, as a packed file keeps it: 64 rows of W are one panel, in which the 64
// elements of column k = 0, 1, ... lie side by side; rows beyond N are zero. So a pass over W reads memory in order,
// sums need no turning around, and many rows of x need no packing before: one copy serves one token and a prompt.
//
// Each element of y is added up in one order, over blocks of kDepth products, whatever rows are beside it.
//
// A few rows of x should cost what one does, the pass over W. One row meets all 64 elements of a column at once, so memory is
// read in order, a little ahead of what is needed. With more rows than their sums have registers a part of a panel is
// read in several sweeps, the first of which would take every fourth line, say, and wait for each: so while a part is
// multiplied, the next one is asked for in order, and by all sweeps and all rows in equal shares.
//
// W is float32, or float16 or bfloat16 and then half as long to read: its elements are widened in registers, which is
// exact, and all that follows is the same arithmetic.
#include <cstring>

#include "cpu/gelu.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/widen.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kPanel = 64;       // rows of W in a panel
constexpr int64_t kDepth = 256;      // columns that are added up before they join the total: 64 KB of a panel stay in L2
constexpr int64_t kRowBlock = 126;   // rows of x that meet such a part of a panel before the next one
constexpr int64_t kGrain = 1 << 13;  // cycles below which a second thread costs more than it brings
constexpr int64_t kAhead = 4096;     // bytes by which one row asks for memory before it needs it
constexpr int64_t kLine = 64;        // bytes

// A tile is R rows of x, 1 .. kTall, by V vectors of rows of W: as many accumulators as leave registers for V vectors and one
// element, or one vector and R elements.
#if defined(PORTLM_ISA_AVX512)
constexpr int kTall = 6;
constexpr int vectors(int) { return 4; }
#elif defined(PORTLM_ISA_AVX2)
constexpr int kTall = 6;
constexpr int vectors(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
#elif defined(PORTLM_ISA_NEON)
constexpr int kTall = 6;
constexpr int vectors(int rows) { return rows == 1 ? 16 : rows <= 3 ? 8 : 4; }
#else
constexpr int kTall = 4;
constexpr int vectors(int rows) { return rows == 1 ? 8 : 4; }
#endif

enum Activation { kNone, kGelu, kGeluTanh, kReluSquared, kRelu };

Vec activated(Vec x, int activation) {
  switch (activation) {
    case kGelu: return GeluExact::value(x);
    case kGeluTanh: return GeluTanh::value(x);
    case kReluSquared: {
      const Vec r = max(Vec(0.0f), x);  // NaN stays NaN
      return r * r;
    }
    case kRelu: return max(Vec(0.0f), x);
    default: return x;
  }
}

template <typename W>
struct Part {
  const float* x;  // row 0 at the first column of this part
  const W* panel;
  const char* ahead;  // what a tile asks for: `pace` bytes and a little more in each step
  int64_t pace;
  const float* bias;  // of the first row of W here, or nullptr
  float* y;
  int64_t depth, K, N;  // columns here, floats from row to row of x and of y
  int64_t columns;      // of y that exist here
  bool first, last;
  int activation;
};

// Apart from its callers, so that all registers are there for sums: gcc would keep numbers of the activations in some.
template <int R, int V, bool kAsks, typename W>
__attribute__((noinline)) void tile(const Part<W>& p) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = Vec(0.0f);
  constexpr int64_t kBytes = V * Vec::N * static_cast<int64_t>(sizeof(W));
  const int64_t K = p.K, pace = R == 1 ? kPanel * static_cast<int64_t>(sizeof(W)) : p.pace;
  const char* ahead = R == 1 ? reinterpret_cast<const char*>(p.panel) + kAhead : p.ahead;
  const W* w = p.panel;
  const W* const end = w + p.depth * kPanel;
  for (const float* from = p.x; w < end; w += kPanel, ++from, ahead += pace) {
    if constexpr (kAsks) {  // into L2, from where the processor fetches it by itself
#pragma GCC unroll 16
      for (int64_t byte = 0; byte < kBytes; byte += kLine) __builtin_prefetch(ahead + byte, 0, 2);
    }
    Vec row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) row[v] = widen(w + v * Vec::N);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x(from[r * K]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = fma(x, row[v], sum[r][v]);
    }
  }
  const auto finish = [&](int v, auto lanes) {
    const int64_t j = v * Vec::N;
    const Vec bias = p.first && p.bias ? load(p.bias + j, lanes) : Vec(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* const y = p.y + r * p.N + j;
      const Vec total = p.first ? sum[r][v] + bias : load(y, lanes) + sum[r][v];
      store(p.last ? activated(total, p.activation) : total, y, lanes);
    }
  };
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int64_t left = p.columns - v * Vec::N;
    if (left >= Vec::N)
      finish(v, Whole{});
    else if (left > 0)
      finish(v, First{left});
  }
}

// All columns of a panel for so many rows, 1 .. kTall, which ask for one of so many shares of what lies ahead; 0: for nothing.
// Rows that are alone and meet a whole column at once read in order: they ask as one row does.
template <int R = kTall, typename W>
void rows_of(int64_t rows, bool alone, int64_t shares, const Part<W>& part) {
  if constexpr (R > 1)
    if (rows < R) return rows_of<R - 1>(rows, alone, shares, part);
  constexpr int V = vectors(R);
  constexpr int64_t kColumns = V * Vec::N, kBytes = kColumns * static_cast<int64_t>(sizeof(W));
  const bool in_order = kColumns == kPanel && alone;
  Part<W> p = part;
  p.pace = in_order ? kBytes : shares ? (kBytes + shares - 1) / shares : 0;
  if (in_order) p.ahead = reinterpret_cast<const char*>(part.panel) + kAhead;
  for (int64_t j = 0; j < part.columns; j += kColumns) {
    p.panel = part.panel + j, p.bias = part.bias ? part.bias + j : nullptr, p.y = part.y + j, p.columns = part.columns - j;
    R == 1 || in_order || shares > 0 ? tile<R, V, true>(p) : tile<R, V, false>(p);
    p.ahead += part.depth * p.pace;
  }
}

template <typename W>
void multiply(const float* x, const W* panels, const float* bias, float* y, int64_t rows, int64_t N, int64_t K, int activation) {
  if (rows <= 0 || N <= 0) return;
  const int64_t count = (N + kPanel - 1) / kPanel, blocks = (rows + kRowBlock - 1) / kRowBlock, items = count * blocks;
  const int64_t threads = threads_for(rows * N * K / 32 + (N * K + rows * (N + K)) / 4, kGrain);
  const int64_t parts = threads < items ? threads : items;
  parallel_for(parts, 1, [=](int64_t begin, int64_t end) {
    const int64_t last = items * end / parts;
    const W* const stop = panels + ((last - 1) / blocks + 1) * kPanel * K;  // where this thread's panels end
    for (int64_t item = items * begin / parts; item < last; ++item) {
      const int64_t j = item / blocks * kPanel, block = item % blocks;
      const int64_t i0 = rows * block / blocks, i1 = rows * (block + 1) / blocks, groups = (i1 - i0 + kTall - 1) / kTall;
      int64_t k = 0;
      do {
        const int64_t depth = K - k < kDepth ? K - k : kDepth;
        const W* const from = panels + (j * K + k * kPanel);
        const bool more = stop - from > kDepth * kPanel;
        const W* const ahead = more ? from + kDepth * kPanel : from;
        const int64_t share = (depth * kPanel * static_cast<int64_t>(sizeof(W)) + groups - 1) / groups;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t i = i0 + (i1 - i0) * g / groups, rows_here = i0 + (i1 - i0) * (g + 1) / groups - i;
          rows_of(rows_here, groups == 1, more ? groups : 0,
                  Part<W>{x + i * K + k, from, reinterpret_cast<const char*>(ahead) + g * share, 0, bias ? bias + j : nullptr,
                          y + i * N + j, depth, K, N, N - j < kPanel ? N - j : kPanel, k == 0, k + depth == K, activation});
        }
        k += depth;
      } while (k < K);
    }
  });
}

template <typename W>
int64_t look_up(const int64_t* ids, const W* panels, float* y, int64_t n, int64_t V, int64_t K) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= V) return i;
  if (K == 0) return -1;
  parallel_for(n, kElementwiseGrain / (16 * K) + 1, [=](int64_t begin, int64_t end) {  // each element is in another line
    for (int64_t i = begin; i < end; ++i) {
      const W* const from = panels + ids[i] / kPanel * kPanel * K + ids[i] % kPanel;
      for (int64_t k = 0; k < K; ++k) y[i * K + k] = widen_one(from[k * kPanel]);
    }
  });
  return -1;
}

const Float16* as_float16(const uint16_t* p) { return reinterpret_cast<const Float16*>(p); }
const BFloat16* as_bfloat16(const uint16_t* p) { return reinterpret_cast<const BFloat16*>(p); }

}  // namespace

void panel_linear(const float* x, const float* panels, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
                  int activation) {
  multiply(x, panels, bias, y, rows, N, K, activation);
}

int64_t panel_rows(const int64_t* ids, const float* panels, float* y, int64_t n, int64_t V, int64_t K) {
  return look_up(ids, panels, y, n, V, K);
}

void half_linear(const float* x, const uint16_t* panels, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
                 int bfloat16, int activation) {
  bfloat16 ? multiply(x, as_bfloat16(panels), bias, y, rows, N, K, activation)
           : multiply(x, as_float16(panels), bias, y, rows, N, K, activation);
}

int64_t half_rows(const int64_t* ids, const uint16_t* panels, float* y, int64_t n, int64_t V, int64_t K, int bfloat16) {
  return bfloat16 ? look_up(ids, as_bfloat16(panels), y, n, V, K) : look_up(ids, as_float16(panels), y, n, V, K);
}

void half_panels(const uint16_t* matrix, uint16_t* panels, int64_t N, int64_t K) {
  constexpr int64_t kColumns = 32;  // of a block: 64 rows of a line each stay in the first cache
  prefer_huge_pages(panels, (N + kPanel - 1) / kPanel * kPanel * K * static_cast<int64_t>(sizeof(uint16_t)));
  parallel_for((N + kPanel - 1) / kPanel, (1 << 10) / (K + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t k0 = 0; k0 < K; k0 += kColumns)
        for (int64_t r = 0; r < kPanel; ++r)
          for (int64_t k = k0; k < k0 + kColumns && k < K; ++k)
            panels[(panel * K + k) * kPanel + r] = panel * kPanel + r < N ? matrix[(panel * kPanel + r) * K + k] : 0;
  });
}

}  // namespace portlm::PORTLM_ISA
