// The tiles and panels of bf16_tiles.h in AMX's registers: compiled for the instruction set avx512_amx alone.
//
// A register holds 16 x 16 sums, or 16 rows of 32 operands. Four hold the sums of a tile of 32 x 32; for 32 products at a time
// it takes two registers of the strip and two of the panel: 4 KB loaded for four instructions of 16 cycles each. A strip of
// 32 rows and 512 products fills two thirds of L1, and panels come from L2 at 32 bytes per cycle.
#include "cpu/amx.h"

#include <cstring>

#include "cpu/bf16_pairs.h"
#include "cpu/bf16_tiles.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kSide = 16;                                 // rows of a register
constexpr int64_t kDepth = 32;                                // products of a register
constexpr int64_t kRows = 2 * kSide, kColumns = 2 * kSide;    // of a tile
constexpr int64_t kStripStep = 2 * kRows * kDepth;            // bytes of a strip per kDepth products: [row][product]
constexpr int64_t kPanelStep = 2 * kColumns;                  // bytes of a panel per product; [pair][column][2]
constexpr int64_t kPanelRow = 2 * kPanelStep;                 // and per pair

// A function that wrote what a register is loaded from puts this between: the compiler does not see the load.
inline void fence() { __asm__ volatile("" : : : "memory"); }

int64_t strip_bytes(int64_t K, bool) { return kStripStep * round_up(K, kDepth) / kDepth; }
int64_t panel_bytes(int64_t K) { return kPanelStep * round_up(K, kDepth); }

template <typename T>
void pack_strip_of(const T* A, int64_t ld, bool transposed, int64_t count, int64_t K, char* strip) {
  if (!transposed) {
    for (int64_t r = 0; r < count; ++r, A += ld)
      for (int64_t k = 0; k < K; k += kDepth)
        _mm512_store_si512(strip + k / kDepth * kStripStep + 2 * kDepth * r, load32(A + k, K - k));
    return;
  }
  alignas(64) uint32_t block[kSide * kSide];  // [pair][row], turned as if they were floats
  for (int64_t k = 0; k < K; k += kDepth, strip += kStripStep)
    for (int64_t r = 0; r < count; r += kSide) {
      const __mmask16 rows = first16(count - r);
      for (int64_t p = 0; p < kSide; ++p) {
        const int64_t left = K - k - 2 * p;
        const T* const row = A + (left > 0 ? (k + 2 * p) * ld + r : 0);
        _mm512_store_si512(block + kSide * p,
                           pair16(row, left > 1 ? row + ld : row, left > 0 ? rows : 0, left > 1 ? rows : 0));
      }
      transpose_block(reinterpret_cast<const float*>(block), kSide, reinterpret_cast<float*>(strip + 2 * kDepth * r), kSide);
    }
}

void pack_strip(const Bf16Operand& A, int64_t count, int64_t K, void* strip) {
  auto* const to = static_cast<char*>(strip);
  A.half ? pack_strip_of(static_cast<const uint16_t*>(A.data), A.ld, A.transposed, count, K, to)
         : pack_strip_of(static_cast<const float*>(A.data), A.ld, A.transposed, count, K, to);
}

void pack_panel(const Bf16Operand& B, int64_t count, int64_t K, void* panel) {
  auto* const to = static_cast<uint32_t*>(panel);
  B.half ? pack_pairs<kColumns>(static_cast<const uint16_t*>(B.data), B.ld, B.transposed, count, K, to)
         : pack_pairs<kColumns>(static_cast<const float*>(B.data), B.ld, B.transposed, count, K, to);
}

// Registers 0 to 3 += so many times 32 products; kBelow and kBeside: of two registers of rows, and of columns. Panels are
// loaded as what is not needed again soon, so that the strip stays in L1: a seventh less time.
template <bool kBelow, bool kBeside>
inline void multiply_add(int64_t times, const char* strip, const char* panel) {
  for (int64_t t = 0; t < times; ++t, strip += kStripStep, panel += kDepth * kPanelStep) {
    _tile_loadd(4, strip, 2 * kDepth);
    _tile_stream_loadd(6, panel, kPanelRow);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kBeside) {
      _tile_stream_loadd(7, panel + 4 * kSide, kPanelRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kBelow) {
      _tile_loadd(5, strip + 2 * kDepth * kSide, 2 * kDepth);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kBelow && kBeside) _tile_dpbf16ps(3, 5, 7);
  }
}

// Pairs from `panel` on of the last K < 32 products as a whole register's, zeros after them: in the panel other products or
// nothing may follow, and NaN times the strip's zero would be NaN.
void copy_rest(const char* panel, int64_t K, char* rest) {
  std::memset(rest, 0, kDepth * kPanelStep);
  std::memcpy(rest, panel, static_cast<size_t>(pairs(K) * kPanelRow));
  if (K % 2 == 0) return;
  auto* const last = reinterpret_cast<uint32_t*>(rest + (pairs(K) - 1) * kPanelRow);
  for (int64_t j = 0; j < kColumns; ++j) last[j] &= 0xFFFFu;
}

// C (kBelow ? 32 : 16, kBeside ? 32 : 16), `stride` bytes from row to row, = what `start` says + the products.
enum class Start { kZero, kBias, kSums };
template <bool kBelow, bool kBeside>
void whole_tile(int64_t K, const char* strip, const char* panel, float* C, int64_t stride, const float* bias, Start start) {
  float* const below = C + kSide * stride / 4;
  for (int64_t r = 0; r < (kBelow ? kRows : kSide); ++r)  // C is touched only after the loop: ask for it now
    for (int64_t j = 0; j < (kBeside ? kColumns : kSide); j += kSide) __builtin_prefetch(C + r * stride / 4 + j, 1);
  alignas(64) char rest[kDepth * kPanelStep];
  const int64_t left = K % kDepth;
  if (left) copy_rest(panel + (K - left) * kPanelStep, left, rest);
  fence();
  if (start == Start::kZero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {  // a bias is a matrix whose rows lie in one place
    const float* const from = start == Start::kBias ? bias : C;
    const int64_t step = start == Start::kBias ? 0 : stride;
    _tile_loadd(0, from, step);
    if constexpr (kBeside) _tile_loadd(1, from + kSide, step);
    if constexpr (kBelow) _tile_loadd(2, start == Start::kBias ? from : below, step);
    if constexpr (kBelow && kBeside) _tile_loadd(3, (start == Start::kBias ? from : below) + kSide, step);
  }
  multiply_add<kBelow, kBeside>(K / kDepth, strip, panel);
  if (left) multiply_add<kBelow, kBeside>(1, strip + K / kDepth * kStripStep, rest);
  _tile_stored(0, C, stride);
  if constexpr (kBeside) _tile_stored(1, C + kSide, stride);
  if constexpr (kBelow) _tile_stored(2, below, stride);
  if constexpr (kBelow && kBeside) _tile_stored(3, below + kSide, stride);
}

void tile_of(int64_t R, int64_t columns, int64_t K, const char* strip, const char* panel, float* C, int64_t stride,
             const float* bias, Start start) {
  const auto run = R > kSide ? (columns > kSide ? whole_tile<true, true> : whole_tile<true, false>)
                             : (columns > kSide ? whole_tile<false, true> : whole_tile<false, false>);
  run(K, strip, panel, C, stride, bias, start);
}

// Sums start from the bias or from C, here and where a tile is not whole, so that an element does not depend on which it is in.
void run_tile(int64_t R, int64_t K, const void* strip, bool, const void* panel, const Bf16Target& to) {
  const auto *a = static_cast<const char*>(strip), *b = static_cast<const char*>(panel);
  const int64_t columns = to.columns;
  if (R % kSide == 0 && columns % kSide == 0 && !(to.bias && to.accumulate)) {
    for (int64_t r = 0; r < R; ++r) watched(to.C + r * to.ldc, columns);
    if (to.bias) watched(to.bias, columns);
    const Start start = to.bias ? Start::kBias : to.accumulate ? Start::kSums : Start::kZero;
    return tile_of(R, columns, K, a, b, to.C, 4 * to.ldc, to.bias, start);
  }
  alignas(64) float C[kRows * kColumns] = {};
  for (int64_t j = 0; j < columns; j += kSide) {
    const __mmask16 lanes = first16(columns - j);
    const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(lanes, chosen(to.bias + j, lanes)) : _mm512_setzero_ps();
    for (int64_t r = 0; r < R; ++r) {
      const float* const at = to.C + r * to.ldc + j;
      const __m512 before = to.accumulate ? _mm512_maskz_loadu_ps(lanes, chosen(at, lanes)) : _mm512_setzero_ps();
      _mm512_store_ps(C + r * kColumns + j, to.bias ? _mm512_add_ps(before, bias) : before);
    }
  }
  tile_of(R, columns, K, a, b, C, 4 * kColumns, nullptr, Start::kSums);
  for (int64_t j = 0; j < columns; j += kSide) {
    const __mmask16 lanes = first16(columns - j);
    for (int64_t r = 0; r < R; ++r) {
      float* const at = to.C + r * to.ldc + j;
      _mm512_mask_storeu_ps(const_cast<float*>(chosen(at, lanes)), lanes, _mm512_load_ps(C + r * kColumns + j));
    }
  }
}

float chains(int64_t turns) {
  alignas(64) float some[kSide * kSide];
  for (float& x : some) x = 0.001f;
  fence();
  _tile_loadd(4, some, 64);
  _tile_loadd(5, some, 64);
  _tile_loadd(6, some, 64);
  _tile_loadd(7, some, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t turn = 0; turn < turns; ++turn) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, some, 64);
  float total = some[0];
  _tile_stored(3, some, 64);
  return total + some[0];
}

constexpr double kTurnFlops = 4.0 * kSide * kSide * kDepth * 2;
constexpr int64_t kMostProducts = 512;  // of a strip that leaves room in L1
constexpr int64_t kRate = 256;          // half of what the registers could: the rest waits for panels and C

}  // namespace

extern const Bf16Tiles own_bf16_tiles;
const Bf16Tiles own_bf16_tiles = {2, kRows, kSide, kColumns, kMostProducts, kRate,
                                  hold_tiles<>, release_tiles, strip_bytes,   panel_bytes,      kPanelStep,
                                  2 * kRows,  pack_strip,  pack_panel,    run_tile,         round_pairs,
                                  chains,     kTurnFlops};

}  // namespace portlm::PORTLM_ISA
