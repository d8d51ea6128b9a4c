// The product of many rows in packed_linear with Intel's tile registers: sixteen rows of activations times sixteen of the
// matrix, group by group.
//
// One instruction adds the products of 16 x 64 and 64 x 16 signed bytes to 16 x 16 sums of 32 bits, and takes 16 cycles for
// fewer columns, too. Weights become signed bytes, less their zero, once for all rows. An activation of 15 bits is
// X = 256 h + l, h and l of one byte: two products, each with sums of its own. Sums leave a tile through memory only, and from
// there they are scaled and added to floats as multiply_tiles does it: all whole numbers are exact, and what is rounded is rounded
// in the same order, so results are the same bit for bit.
//
// What the processor gives, and the order of things that follows from it: storing a tile runs beside the product of another
// one and not beside its own, so a tile is stored when its turn comes again; and while tiles are in use a multiply-add
// of floats takes a cycle and not half of one, so their number counts, and integers are added instead where that is possible.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/amx.h"
#include "cpu/packed.h"
#include "cpu/packed_rounding.h"
#include "cpu/packed_tiles.h"

namespace portlm::PORTLM_ISA {

constexpr int64_t kBlockRows = 16;  // of activations, in a tile
constexpr int64_t kBlockSums = kBlockRows * kTileHeight;

// What tiles hold. kBytes: activations of 8 bits. kHalves: of 15 bits as h and l, which both have sums. kFloats: the same and
// weights as bfloat16, where all sums of both together are whole numbers of less than 2^24.
enum class Numbers { kBytes, kHalves, kFloats };

// Bytes of a group: of a block of activations, tiles of kDepth bytes (h and then l), 16 scales and 16 totals; of a tile of the
// matrix, its columns by fours or twos, 16 scales and 16 zero points.
template <int kGroup_, Numbers kNumbers_>
struct GroupTiles {
  static constexpr int kGroup = kGroup_;
  static constexpr Numbers kNumbers = kNumbers_;
  static constexpr int64_t kBytes = kNumbers == Numbers::kFloats ? 2 : 1, kParts = kNumbers == Numbers::kBytes ? 1 : 2;
  static constexpr int64_t kDepth = kGroup * kBytes < 64 ? kGroup * kBytes : 64, kSteps = kGroup * kBytes / kDepth;
  static constexpr int64_t kTileA = kBlockRows * kDepth, kStepA = kParts * kTileA, kStepB = kTileHeight * kDepth;
  static constexpr int64_t kScalesA = kSteps * kStepA, kTotalsA = kScalesA + 64, kBytesA = kTotalsA + 64;
  static constexpr int64_t kScalesB = kSteps * kStepB, kZerosB = kScalesB + 64, kBytesB = kZerosB + 64;
};

// --- activations ---------------------------------------------------------------------------------------------------

// Of eight columns, the order in which bfloat16 lie: that of the halves of bytes in a word of the packed matrix.
constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// The high words of 32 numbers in that order.
inline __m512i high_words(__m512i first, __m512i second) {
  alignas(64) static constexpr auto kPlaces = [] {
    struct { uint16_t v[32]; } places{};
    for (int i = 0; i < 32; ++i) places.v[i] = static_cast<uint16_t>(2 * (i / 8 * 8 + kOrder[i % 8]) + 1);
    return places;
  }();
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(kPlaces.v), second);
}

// 32 columns of one row of a block; h lies at `to` and l one tile behind it.
template <typename T>
inline void arrange(const int16_t* x, uint8_t* to) {
  const __m512i X = _mm512_loadu_si512(x);
  if constexpr (T::kNumbers == Numbers::kFloats) {  // h is X without what bfloat16 has no room for, and l is that
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(X)));
    const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(X, 1)));
    const __m512 room = _mm512_castsi512_ps(_mm512_set1_epi32(-65536));
    const __m512i l1 = _mm512_castps_si512(_mm512_sub_ps(first, _mm512_and_ps(first, room)));
    const __m512i l2 = _mm512_castps_si512(_mm512_sub_ps(second, _mm512_and_ps(second, room)));
    _mm512_storeu_si512(to, high_words(_mm512_castps_si512(first), _mm512_castps_si512(second)));
    _mm512_storeu_si512(to + T::kTileA, high_words(l1, l2));
  } else {
    if constexpr (T::kNumbers == Numbers::kHalves) {  // X = 256 h + l, and l is the last byte of X
      const __m512i h = _mm512_srai_epi16(_mm512_add_epi16(X, _mm512_set1_epi16(128)), 8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(h));
      to += T::kTileA;
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(X));
  }
}

// Row r of a block, K columns. a is the block.
template <typename T>
void fill_block_row(const float* x, int64_t groups, uint8_t* a, int64_t r) {
  constexpr int64_t kAtOnce = 8;  // as in fill_row
  constexpr int kWidth = T::kNumbers == Numbers::kBytes ? 1 : 2;
  float largest[kAtOnce];
  WholeGroup whole;
  for (int64_t g = 0; g < groups; ++g, x += T::kGroup, a += T::kBytesA) {
    if (g % kAtOnce == 0)
      for (int64_t i = 0; i < kAtOnce && g + i < groups; ++i) largest[i] = largest_of(x + i * T::kGroup, T::kGroup);
    take_group<kWidth>(x, T::kGroup, largest[g % kAtOnce], whole);
    for (int64_t i = 0; i < T::kGroup; i += 32) {
      const int64_t at = i * T::kBytes;
      arrange<T>(whole.x + i, a + at / T::kDepth * T::kStepA + r * T::kDepth + at % T::kDepth);
    }
    reinterpret_cast<float*>(a + T::kScalesA)[r] = whole.scale;
    reinterpret_cast<int32_t*>(a + T::kTotalsA)[r] = whole.total;
  }
}

// --- weights -------------------------------------------------------------------------------------------------------

// The bfloat16 of n, from -16 to 15, at its last five bits.
inline __m512i small_floats() {
  alignas(64) static constexpr uint16_t kFloats[32] = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
      0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
  return _mm512_load_si512(kFloats);
}

// A line of the packed matrix, less the zero of each row in all its bytes.
template <typename T, int bits>
inline void unpack_line(__m512i w, __m512i zero, uint8_t* to) {
  if constexpr (T::kNumbers == Numbers::kFloats) {
    const __m512i half = _mm512_set1_epi16(15), floats = small_floats();
    const auto put = [&](int row, __m512i n) {
      _mm512_store_si512(to + 64 * row, _mm512_permutexvar_epi16(_mm512_sub_epi8(_mm512_and_si512(n, half), zero), floats));
    };
    put(0, w);
    put(1, _mm512_srli_epi16(w, 4));
    put(2, _mm512_srli_epi16(w, 8));
    put(3, _mm512_srli_epi16(w, 12));
  } else if constexpr (bits == 4) {
    const __m512i low = _mm512_set1_epi8(15);
    _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(w, low), zero));
    _mm512_store_si512(to + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(w, 4), low), zero));
  } else {
    _mm512_store_si512(to, _mm512_sub_epi8(w, zero));
  }
}

// Groups of one tile of the matrix, as tiles of signed numbers. Weights of 8 bits become less by 128, and so do their zeros.
template <typename T, int bits>
void unpack_tile(const PackedMatrix& m, const uint8_t* from, int64_t groups, uint8_t* b) {
  constexpr int kHalf = 1 << (bits - 1);
  for (int64_t g = 0; g < groups; ++g, from += m.group_bytes, b += T::kBytesB) {
    const uint8_t* const behind = from + m.weight_bytes;
    __m512i zeros = _mm512_set1_epi32(kHalf);
    if (m.has_zeros) zeros = bytes(behind + 2 * kTileHeight).v;
    const __m512i zero = bits == 4 ? _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101)) : _mm512_set1_epi8(-128);
    uint8_t* to = b;
    for (const uint8_t* line = from; line < behind; line += kLineBytes, to += 8 / bits * kLineBytes * T::kBytes) {
      __builtin_prefetch(line + kAhead, 0, 2);
      unpack_line<T, bits>(_mm512_loadu_si512(line), zero, to);
    }
    half(behind).store(reinterpret_cast<float*>(b + T::kScalesB));
    _mm512_store_si512(b + T::kZerosB, _mm512_sub_epi32(zeros, _mm512_set1_epi32(kHalf)));
  }
}

// --- products ------------------------------------------------------------------------------------------------------

// Tiles 0 to 3 hold sums, 4 and 5 rows of activations, 6 and 7 columns of the matrix.
template <int t>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
}
// Rows that are `stride` bytes apart.
template <int t>
inline void load_tile(const uint8_t* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
inline void store_tile(int32_t* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(int64_t{64}), "i"(t) : "memory");
}
// Sums c += rows a times columns b, of signed bytes or of bfloat16.
template <typename T, int c, int a, int b>
inline void multiply_tile() {
  if constexpr (T::kNumbers == Numbers::kFloats)
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  else
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// How many groups are under way, and the tile of the first of two sums, or the only one, of each.
template <typename T>
constexpr int kTurns = T::kNumbers == Numbers::kHalves ? 2 : 4;
template <typename T, int turn>
constexpr int kSumTile = turn * (4 / kTurns<T>);

// The sums of one group.
template <typename T, int turn>
inline void multiply_group(const uint8_t* a, const uint8_t* b) {
  constexpr int kB = 6 + turn % 2, kSum = kSumTile<T, turn>;
  zero_tile<kSum>();
  if constexpr (T::kNumbers == Numbers::kHalves) zero_tile<kSum + 1>();
  for (int64_t step = 0; step < T::kSteps; ++step, a += T::kStepA, b += T::kStepB) {
    load_tile<kB>(b, 64);
    if constexpr (T::kNumbers == Numbers::kBytes) {
      constexpr int kA = 4 + turn % 2;
      load_tile<kA>(a, T::kDepth);
      multiply_tile<T, kSum, kA, kB>();
    } else {
      constexpr int kSecond = T::kNumbers == Numbers::kHalves ? kSum + 1 : kSum;
      load_tile<4>(a, T::kDepth);
      multiply_tile<T, kSum, 4, kB>();
      load_tile<5>(a + T::kTileA, T::kDepth);
      multiply_tile<T, kSecond, 5, kB>();
    }
  }
}

template <typename T, int turn>
inline void store_group(int32_t* sums) {
  store_tile<kSumTile<T, turn>>(sums);
  if constexpr (T::kNumbers == Numbers::kHalves) store_tile<kSumTile<T, turn> + 1>(sums + kBlockSums);
}

// Scales the sums of one group and adds them to y, row by row. kZeros: the weights are not yet less their zeros.
template <typename T, bool kZeros>
inline void add_group(const int32_t* sums, const uint8_t* a, const uint8_t* b, Vec (&y)[kBlockRows]) {
  constexpr float kBase = 12582912.0f;  // 1.5 * 2^23: an integer of less than 2^22 is added to it as to the last bits of a float
  constexpr bool kNear = T::kNumbers == Numbers::kBytes && !kZeros;  // of 128 columns at most, 2^7 * 2^7 * 127
  const float* const scales = reinterpret_cast<const float*>(a + T::kScalesA);
  const int32_t* const totals = reinterpret_cast<const int32_t*>(a + T::kTotalsA);
  const Vec scale = Vec::load(reinterpret_cast<const float*>(b + T::kScalesB)), less_base = scale * Vec(-kBase);  // exact
  const Ints base(0x4b400000), zeros(load_bits(b + T::kZerosB));
#pragma GCC unroll 16
  for (int64_t r = 0; r < kBlockRows; ++r) {
    const int32_t* const row = sums + r * kTileHeight;
    Vec scaled;
    if constexpr (T::kNumbers == Numbers::kFloats) {
      scaled = Vec::load(reinterpret_cast<const float*>(row)) * scale;
    } else {
      Ints sum(load_bits(row));
      if constexpr (T::kNumbers == Numbers::kHalves) sum = Ints(_mm512_slli_epi32(sum.v, 8)) + Ints(load_bits(row + kBlockSums));
      if constexpr (kZeros) sum = sum - zeros * Ints(totals[r]);
      if constexpr (kNear)  // rounded once, as the product of the sum and the scale is
        scaled = fma(_mm512_castsi512_ps((sum + base).v), scale, less_base);
      else
        scaled = to_float(sum) * scale;
    }
    y[r] = fma(scaled, Vec(scales[r]), y[r]);
  }
}

// Blocks of activations, block_bytes apart, times some tiles of the matrix, one behind the other in b; some groups of both.
// Adds to sums (blocks, tiles, 16 rows, 16) or, with `first`, writes them.
struct TileProduct {
  const uint8_t* a;
  int64_t block_bytes, blocks;
  const uint8_t* b;
  int64_t tiles, groups;
  float* sums;
  bool first;
};

// Where a group of a block and a tile lies: groups pass first, then tiles, then blocks.
template <typename T>
class Place {
 public:
  explicit Place(const TileProduct& p) : a_(p.a), b_(p.b), p_(p) {}
  const uint8_t* a() const { return a_; }
  const uint8_t* b() const { return b_; }
  bool begins() const { return group_ == 0; }
  bool ends() const { return group_ + 1 == p_.groups; }
  __attribute__((always_inline)) void advance() {
    const bool last = ends();
    a_ += T::kBytesA;
    b_ += T::kBytesB;
    ++group_;
    if (!last) return;
    group_ = 0;
    a_ -= p_.groups * T::kBytesA;
    if (++tile_ < p_.tiles) return;
    tile_ = 0;
    a_ += p_.block_bytes;
    b_ = p_.b;
  }

 private:
  const uint8_t *a_, *b_;
  int64_t group_ = 0, tile_ = 0;
  const TileProduct& p_;
};

template <typename T, bool kZeros>
void multiply_blocks(const TileProduct& p) {
  alignas(64) int32_t sums[kTurns<T>][T::kNumbers == Numbers::kHalves ? 2 * kBlockSums : kBlockSums];
  const HeldTiles<T::kDepth> held;
  const int64_t count = p.blocks * p.tiles * p.groups;
  Place<T> ahead(p), behind(p);
  float* to = p.sums;
  Vec y[kBlockRows];
  // Takes group i; stores the sums of the one whose tile it needs; and adds those that were stored in the turn before.
  const auto take_turn = [&](int64_t i, auto number) __attribute__((always_inline)) {
    constexpr int turn = decltype(number)::value, before = (turn + kTurns<T> - 1) % kTurns<T>;
    if (i >= kTurns<T> && i - kTurns<T> < count) store_group<T, turn>(sums[turn]);
    if (i < count) {
      multiply_group<T, turn>(ahead.a(), ahead.b());
      ahead.advance();
    }
    if (i <= kTurns<T> || i - kTurns<T> > count) return;
    if (behind.begins())
#pragma GCC unroll 16
      for (int64_t r = 0; r < kBlockRows; ++r) y[r] = p.first ? Vec(0.0f) : Vec::load(to + r * kTileHeight);
    add_group<T, kZeros>(sums[before], behind.a(), behind.b(), y);
    if (behind.ends()) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kBlockRows; ++r) y[r].store(to + r * kTileHeight);
      to += kBlockSums;
    }
    behind.advance();
  };
  for (int64_t i = 0; i <= count + kTurns<T>; i += kTurns<T>) {
    take_turn(i, std::integral_constant<int, 0>());
    take_turn(i + 1, std::integral_constant<int, 1>());
    if constexpr (kTurns<T> == 4) {
      take_turn(i + 2, std::integral_constant<int, 2>());
      take_turn(i + 3, std::integral_constant<int, 3>());
    }
  }
}

}  // namespace portlm::PORTLM_ISA
