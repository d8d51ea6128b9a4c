// Products of weights and activations with AVX2 and AVX-512. See dots.h.
//
// With VNNI one instruction adds four products of an unsigned and a signed byte to a 32-bit sum. Without, there is the
// one that adds two of them in 16 bits, and saturates: weights of 4 bits stay far within (2 * 15 * 127 = 3810, and eight
// times that is less than 2^15), so that their sums are widened every 32 columns. Weights of 8 bits do not, and are
// multiplied in 16 bits by whole activations, with nothing lost, which is as much work for activations of one byte as of two.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

#if defined(PORTLM_ISA_AVX512)
using Bits = __m512i;
#define PORTLM_X86(name) _mm512_##name
inline Bits load_bits(const void* p) { return _mm512_loadu_si512(p); }
inline Bits both(Bits a, Bits b) { return _mm512_and_si512(a, b); }
inline Vec to_float(Bits a) { return _mm512_cvtepi32_ps(a); }
inline Bits widen_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec half(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_int16(Vec a, int16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
#else
using Bits = __m256i;
#define PORTLM_X86(name) _mm256_##name
inline Bits load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Bits both(Bits a, Bits b) { return _mm256_and_si256(a, b); }
inline Vec to_float(Bits a) { return _mm256_cvtepi32_ps(a); }
inline Bits widen_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline Vec half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_int16(Vec a, int16_t* p) {
  const __m256i i = _mm256_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
}
#endif

struct Ints {
  Bits v;
  Ints() = default;
  explicit Ints(Bits x) : v(x) {}
  explicit Ints(int32_t x) : v(PORTLM_X86(set1_epi32)(x)) {}
};
inline Ints operator+(Ints a, Ints b) { return Ints(PORTLM_X86(add_epi32)(a.v, b.v)); }
inline Ints operator-(Ints a, Ints b) { return Ints(PORTLM_X86(sub_epi32)(a.v, b.v)); }
inline Ints operator*(Ints a, Ints b) { return Ints(PORTLM_X86(mullo_epi32)(a.v, b.v)); }
inline Vec to_float(Ints a) { return to_float(a.v); }
inline Ints bytes(const uint8_t* p) { return Ints(widen_bytes(p)); }

// Four bytes or two 16-bit numbers, the same for every row.
inline Bits load_word(const uint32_t* word) { return PORTLM_X86(set1_epi32)(static_cast<int32_t>(*word)); }

struct WordPair {
  Bits a, b;
};
inline WordPair load_pair(const uint32_t* words) { return {load_word(words), load_word(words + 1)}; }

// 16 activations of one byte, four to a word.
inline void arrange_narrow(const int16_t* x, uint32_t* words) {
  const __m128i *const from = reinterpret_cast<const __m128i*>(x), first = _mm_loadu_si128(from);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_packs_epi16(first, _mm_loadu_si128(from + 1)));
}

// 16 activations as words (h, l), of four bytes each.
inline void arrange_bytes(const int16_t* x, uint32_t* words) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), c64 = _mm256_set1_epi16(64);
  const __m256i l = _mm256_sub_epi16(_mm256_and_si256(_mm256_add_epi16(v, c64), _mm256_set1_epi16(127)), c64);
  const __m256i h = _mm256_srai_epi16(_mm256_sub_epi16(v, l), 7);
  // per half: h 0-3, h 4-7, l 0-3, l 4-7, of which the middle two change places
  const __m256i hl = _mm256_shuffle_epi32(_mm256_packs_epi16(h, l), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), hl);
}

// 16 activations as words ((X0, X2), (X1, X3)), of two 16-bit numbers each.
inline void arrange_shorts(const int16_t* x, uint32_t* words) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(v, 0xD8), 0xD8));
}

template <int bits>
struct StoredWeights {
  Bits v;
  static void unpack(const uint8_t* p, StoredWeights (&w)[8 / bits]) {
    const Bits line = load_bits(p);
    if constexpr (bits == 4) {
      const Bits low = PORTLM_X86(set1_epi8)(15);
      w[0].v = both(line, low);
      w[1].v = both(PORTLM_X86(srli_epi16)(line, 4), low);
    } else {
      w[0].v = line;
    }
  }
};

// The value is in a register here. Keeps additions as they are written, where gcc would first make all products of a long
// sum, more than there are registers; and makes one load of memory that is used twice.
inline void hold(Bits& value) { __asm__("" : "+v"(value)); }

template <int bits, int width>
struct Dots;

#if defined(PORTLM_BYTE_DOTS)

template <int bits>
struct Dots<bits, 2> : DotsOf<bits, 2> {
  static constexpr int32_t kOffset = 0;
  static constexpr int kWords = 2;
  using Weights = StoredWeights<bits>;
  using Activations = WordPair;
  static void unpack(const uint8_t* p, Weights (&w)[8 / bits]) { Weights::unpack(p, w); }
  static void arrange(const int16_t* x, uint32_t* words) { arrange_bytes(x, words); }
  static Activations load(const uint32_t* words) { return load_pair(words); }
  struct Sum {
    Bits h, l;
    void start(Ints value) { h = Ints(0).v, l = value.v; }
    void add(const Weights& w, const Activations& x, int) {
      h = PORTLM_X86(dpbusd_epi32)(h, w.v, x.a);
      l = PORTLM_X86(dpbusd_epi32)(l, w.v, x.b);
    }
    void carry() {}
    Ints total() const { return Ints(PORTLM_X86(slli_epi32)(h, 7)) + Ints(l); }
  };
};

// With one product per weight, unpacking is most of the rest: high halves of bytes stay where they are, as numbers 16 times as
// large, with a sum of their own.
template <int bits>
struct Dots<bits, 1> : DotsOf<bits, 1> {
  static constexpr int32_t kOffset = 0;
  static constexpr int kWords = 1;
  struct Weights {
    Bits v;
  };
  using Activations = Bits;
  static void unpack(const uint8_t* p, Weights (&w)[8 / bits]) {
    Bits line = load_bits(p);
    if constexpr (bits == 4) {
      hold(line);
      w[0].v = both(line, PORTLM_X86(set1_epi8)(15));
      w[1].v = both(line, PORTLM_X86(set1_epi8)(-16));
    } else {
      w[0].v = line;
    }
  }
  static void arrange(const int16_t* x, uint32_t* words) { arrange_narrow(x, words); }
  static Activations load(const uint32_t* words) { return load_word(words); }
  struct Sum {
    Bits low, high;
    void start(Ints value) { low = value.v, high = Ints(0).v; }
    void add(const Weights& w, const Activations& x, int unit) {
      Bits& sum = unit == 0 ? low : high;
      sum = PORTLM_X86(dpbusd_epi32)(sum, w.v, x);
    }
    void carry() {}
    Ints total() const { return bits == 8 ? Ints(low) : Ints(low) + Ints(PORTLM_X86(srai_epi32)(high, 4)); }
  };
};

#else

// Products of bytes summed in 16 bits, of fewer than 32 columns, until they are taken into 32 bits.
struct ShortSum {
  Bits v;
  void clear() { v = Ints(0).v; }
  void add(Bits weights, Bits activations) {
    v = PORTLM_X86(add_epi16)(v, PORTLM_X86(maddubs_epi16)(weights, activations));
    hold(v);
  }
  Ints take(int16_t factor) {
    const Ints sum(PORTLM_X86(madd_epi16)(v, PORTLM_X86(set1_epi16)(factor)));
    clear();
    return sum;
  }
};

template <>
struct Dots<4, 2> : DotsOf<4, 2> {
  static constexpr int32_t kOffset = 0;
  static constexpr int kWords = 2;
  using Weights = StoredWeights<4>;
  using Activations = WordPair;
  static void unpack(const uint8_t* p, Weights (&w)[2]) { Weights::unpack(p, w); }
  static void arrange(const int16_t* x, uint32_t* words) { arrange_bytes(x, words); }
  static Activations load(const uint32_t* words) { return load_pair(words); }
  struct Sum {
    ShortSum h, l;
    Ints sum;
    void start(Ints value) { h.clear(), l.clear(), sum = value; }
    void add(const Weights& w, const Activations& x, int) { h.add(w.v, x.a), l.add(w.v, x.b); }
    void carry() { sum = sum + (h.take(128) + l.take(1)); }
    Ints total() const { return sum; }
  };
};

template <>
struct Dots<4, 1> : DotsOf<4, 1> {
  static constexpr int32_t kOffset = 0;
  static constexpr int kWords = 1;
  using Weights = StoredWeights<4>;
  using Activations = Bits;
  static void unpack(const uint8_t* p, Weights (&w)[2]) { Weights::unpack(p, w); }
  static void arrange(const int16_t* x, uint32_t* words) { arrange_narrow(x, words); }
  static Activations load(const uint32_t* words) { return load_word(words); }
  struct Sum {
    ShortSum narrow;
    Ints sum;
    void start(Ints value) { narrow.clear(), sum = value; }
    void add(const Weights& w, const Activations& x, int) { narrow.add(w.v, x); }
    void carry() { sum = sum + narrow.take(1); }
    Ints total() const { return sum; }
  };
};

template <int width>
struct Dots<8, width> : DotsOf<8, width> {
  static constexpr int32_t kOffset = 0;
  static constexpr int kWords = 2;
  struct Weights {
    Bits even, odd;  // 16 bits each
  };
  using Activations = WordPair;
  static void unpack(const uint8_t* p, Weights (&w)[1]) {
    const Bits line = load_bits(p);
    w[0].even = both(line, PORTLM_X86(set1_epi16)(255));
    w[0].odd = PORTLM_X86(srli_epi16)(line, 8);
  }
  static void arrange(const int16_t* x, uint32_t* words) { arrange_shorts(x, words); }
  static Activations load(const uint32_t* words) { return load_pair(words); }
  struct Sum {
    Ints sum;
    void start(Ints value) { sum = value; }
    void add(const Weights& w, const Activations& x, int) {
      sum = sum + (Ints(PORTLM_X86(madd_epi16)(w.even, x.a)) + Ints(PORTLM_X86(madd_epi16)(w.odd, x.b)));
      hold(sum.v);
    }
    void carry() {}
    Ints total() const { return sum; }
  };
};

#endif
#undef PORTLM_X86

}  // namespace portlm::PORTLM_ISA
