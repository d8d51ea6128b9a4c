// The tiles and panels of bf16_tiles.h, in two ways: widened to float32, for any instruction set, and native, on
// AVX512_BF16. The build compiles this file once more for the latter, in a namespace of its own. bf16_amx.cpp is the third way.
//
// Native: a tile of 6 x 64 keeps 24 sums in registers. For two products at a time it takes four vectors of the panel, which
// holds pairs (k, k + 1) of 64 columns side by side, and six pairs of A, each broadcast: 10 loads for 24 instructions of
// one cycle each. The strip of A, 6 KB for 512 products, stays in L1 while panels come from L2 at 11 bytes per cycle.
#include "cpu/bf16_tiles.h"

#include <cstring>

#include "cpu/gemm_bf16.h"
#include "cpu/gemm_tile.h"
#include "cpu/watched.h"
#ifdef PORTLM_BF16_NATIVE
#include "cpu/bf16_pairs.h"
#endif

namespace portlm::PORTLM_ISA {
namespace {

#ifdef PORTLM_BF16_NATIVE

constexpr int64_t kRows = 6, kColumns = 64;
constexpr int64_t kSlot = 8;  // pairs of a transposed strip per k pair: a tile's rows, and room to store a vector

// 8 columns of two rows as 8 pairs.
__m256i pair8(const float* row, const float* next, __mmask8 columns, __mmask8 next_columns) {
  alignas(32) static constexpr uint16_t kOrder[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  const __m256 lo = _mm256_maskz_loadu_ps(columns, chosen(row, columns));
  const __m256 hi = _mm256_maskz_loadu_ps(next_columns, chosen(next, next_columns));
  const __m256i both = reinterpret_cast<__m256i>(_mm256_cvtne2ps_pbh(hi, lo));
  return _mm256_permutexvar_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(kOrder)), both);
}
__m256i pair8(const uint16_t* row, const uint16_t* next, __mmask8 columns, __mmask8 next_columns) {
  const __m128i lo = _mm_maskz_loadu_epi16(columns, chosen(row, columns));
  const __m128i hi = _mm_maskz_loadu_epi16(next_columns, chosen(next, next_columns));
  return _mm256_set_m128i(_mm_unpackhi_epi16(lo, hi), _mm_unpacklo_epi16(lo, hi));
}

// Pairs from row to row of a strip: 64 bytes more than whole vectors, so that rows do not fall into the same sets of L1.
int64_t strip_stride(int64_t K) { return round_up(pairs(K), 16) + 16; }

constexpr int64_t kPanelStep = 2 * kColumns, kTransposedStep = 2 * kSlot;
int64_t strip_bytes(int64_t K, bool transposed) { return transposed ? 4 * kSlot * pairs(K) : 4 * kRows * strip_stride(K); }
int64_t panel_bytes(int64_t K) { return 4 * kColumns * round_up(pairs(K), 16); }

template <typename T>
void pack_strip_of(const T* A, int64_t ld, bool transposed, int64_t count, int64_t K, uint32_t* strip) {
  if (transposed) {  // [pair][row]
    const __mmask8 rows = static_cast<__mmask8>((1u << count) - 1u);
    for (int64_t k = 0; k < K; k += 2, A += 2 * ld, strip += kSlot) {
      const bool whole = k + 1 < K;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(strip), pair8(A, whole ? A + ld : A, rows, whole ? rows : 0));
    }
    return;
  }
  for (int64_t r = 0; r < count; ++r, A += ld, strip += strip_stride(K))  // [row][pair]
    for (int64_t k = 0; k < K; k += 32) _mm512_storeu_si512(strip + k / 2, load32(A + k, K - k));
}

template <typename T>
void pack_panel_of(const T* B, int64_t ld, bool transposed, int64_t count, int64_t K, uint32_t* panel) {
  pack_pairs<kColumns>(B, ld, transposed, count, K, panel);
}

template <int R, bool kTransposed>
void tile_of_rows(int64_t K, const uint32_t* a, const uint32_t* panel, const Bf16Target& to) {
  for (int r = 0; r < R; ++r)  // C is touched only after the loop: ask for it now
    for (int64_t j = 0; j < kColumns; j += 16) __builtin_prefetch(to.C + r * to.ldc + j, 1);
  __m512 c[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = _mm512_setzero_ps();
  const int64_t stride = strip_stride(K), count = pairs(K);
  for (int64_t p = 0; p < count; ++p, panel += kColumns) {
    __m512bh b[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) b[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + 16 * v));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const uint32_t pair = kTransposed ? a[p * kSlot + r] : a[r * stride + p];
      const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) c[r][v] = _mm512_dpbf16_ps(c[r][v], both, b[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __mmask16 lanes = first16(to.columns - 16 * v);
    if (!lanes) break;
    const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(lanes, chosen(to.bias + 16 * v, lanes)) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      float* const at = to.C + r * to.ldc + 16 * v;
      chosen(at, lanes);
      __m512 sum = to.bias ? _mm512_add_ps(c[r][v], bias) : c[r][v];
      if (to.accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, at), sum);
      _mm512_mask_storeu_ps(at, lanes, sum);
    }
  }
}

template <bool kTransposed, int R = kRows>
void tile_of_count(int64_t rows, int64_t K, const uint32_t* strip, const uint32_t* panel, const Bf16Target& to) {
  if constexpr (R > 1)
    if (rows < R) return tile_of_count<kTransposed, R - 1>(rows, K, strip, panel, to);
  tile_of_rows<R, kTransposed>(K, strip, panel, to);
}

void run_tile(int64_t R, int64_t K, const void* strip, bool transposed, const void* panel, const Bf16Target& to) {
  const auto *a = static_cast<const uint32_t*>(strip), *b = static_cast<const uint32_t*>(panel);
  transposed ? tile_of_count<true>(R, K, a, b, to) : tile_of_count<false>(R, K, a, b, to);
}

float chains(int64_t turns) {
  __m512 chain[12];
  for (int k = 0; k < 12; ++k) chain[k] = _mm512_set1_ps(static_cast<float>(k));
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.001f), _mm512_set1_ps(-0.001f));
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 12
    for (int k = 0; k < 12; ++k) chain[k] = _mm512_dpbf16_ps(chain[k], a, a);
  }
  float total = 0.0f;
  for (int k = 0; k < 12; ++k) total += _mm512_reduce_add_ps(chain[k]);
  return total;
}

void round_all(const float* from, uint16_t* to, int64_t count) { round_pairs(from, to, count); }

constexpr int64_t kNative = 1;
constexpr double kTurnFlops = 12 * 16 * 4;

#else  // widened

constexpr int64_t kRows = kTileRows, kColumns = kTileCols;

// One number, rounded and widened again; a whole row of them is a loop that compilers make vectors of.
inline uint32_t rounded_bits(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  const uint32_t ordinary = magnitude > 0x7F800000u ? (bits & 0xFFFF0000u) | 0x00400000u : nearest;
  return magnitude < 0x00800000u ? bits & 0x80000000u : ordinary;
}

void widened(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    bits = rounded_bits(bits);
    std::memcpy(to + i, &bits, 4);
  }
}
void widened(const uint16_t* from, float* to, int64_t count) { widen(from, to, count); }

void round_all(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    to[i] = static_cast<uint16_t>(rounded_bits(bits) >> 16);
  }
}

constexpr int64_t kPanelStep = 4 * kColumns, kTransposedStep = 4 * kRows;
int64_t strip_bytes(int64_t K, bool) { return 4 * kRows * K; }
int64_t panel_bytes(int64_t K) { return 4 * kColumns * K; }

template <typename T>
void pack_strip_of(const T* A, int64_t ld, bool transposed, int64_t count, int64_t K, float* strip) {
  if (transposed)
    for (int64_t k = 0; k < K; ++k) widened(A + k * ld, strip + k * kRows, count);
  else
    for (int64_t r = 0; r < count; ++r) widened(A + r * ld, strip + r * K, K);
}

template <typename T>
void pack_panel_of(const T* B, int64_t ld, bool transposed, int64_t count, int64_t K, float* panel) {
  if (!transposed) {
    for (int64_t k = 0; k < K; ++k, panel += kColumns) {
      widened(B + k * ld, panel, count);
      for (int64_t j = count; j < kColumns; ++j) panel[j] = 0.0f;
    }
    return;
  }
  constexpr int64_t kBlock = 64;
  alignas(64) float block[kColumns * kBlock];
  for (int64_t k = 0; k < K; k += kBlock) {
    const int64_t depth = K - k < kBlock ? K - k : kBlock;
    for (int64_t j = 0; j < count; ++j) widened(B + j * ld + k, block + j * kBlock, depth);
    pack_panel_transposed(block, kBlock, depth, count, panel + k * kColumns);
  }
}

void run_tile(int64_t R, int64_t K, const void* strip, bool transposed, const void* panel, const Bf16Target& to) {
  const auto *a = static_cast<const float*>(strip), *b = static_cast<const float*>(panel);
  const TileTarget target{to.C, to.ldc, to.columns, to.bias, to.accumulate};
  transposed ? tile_of<true>(R)(K, a, kRows, b, target) : tile_of<false>(R)(K, a, K, b, target);
}

float chains(int64_t turns) {
  Vec chain[12];
  for (int k = 0; k < 12; ++k) chain[k] = Vec(static_cast<float>(k));
  const Vec a(0.999f), b(0.001f);
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 12
    for (int k = 0; k < 12; ++k) chain[k] = fma(chain[k], a, b);
  }
  Vec total(0.0f);
  for (int k = 0; k < 12; ++k) total += chain[k];
  return sum(total);
}

constexpr int64_t kNative = 0;
constexpr double kTurnFlops = 12 * 2 * Vec::N;

#endif

template <typename Packed>
void pack_strip(const Bf16Operand& A, int64_t count, int64_t K, void* strip) {
  auto* const to = static_cast<Packed*>(strip);
  A.half ? pack_strip_of(static_cast<const uint16_t*>(A.data), A.ld, A.transposed, count, K, to)
         : pack_strip_of(static_cast<const float*>(A.data), A.ld, A.transposed, count, K, to);
}

template <typename Packed>
void pack_panel(const Bf16Operand& B, int64_t count, int64_t K, void* panel) {
  auto* const to = static_cast<Packed*>(panel);
  B.half ? pack_panel_of(static_cast<const uint16_t*>(B.data), B.ld, B.transposed, count, K, to)
         : pack_panel_of(static_cast<const float*>(B.data), B.ld, B.transposed, count, K, to);
}

#ifdef PORTLM_BF16_NATIVE
using Packed = uint32_t;
#else
using Packed = float;
#endif

void nothing() {}
constexpr int64_t kDepth = 1024, kRate = 32;

}  // namespace

extern const Bf16Tiles own_bf16_tiles;
const Bf16Tiles own_bf16_tiles = {kNative,
                                  kRows,
                                  1,
                                  kColumns,
                                  kDepth,
                                  kRate,
                                  nothing,
                                  nothing,
                                  strip_bytes,
                                  panel_bytes,
                                  kPanelStep,
                                  kTransposedStep,
                                  pack_strip<Packed>,
                                  pack_panel<Packed>,
                                  run_tile,
                                  round_all,
                                  chains,
                                  kTurnFlops};

}  // namespace portlm::PORTLM_ISA
