// Products of weights and activations without vector registers: one row of weights at a time, and what the others mean.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/half.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

struct Ints {
  uint32_t v;  // as int32_t, but may wrap on the way to a sum that fits
  Ints() = default;
  explicit Ints(int32_t x) : v(static_cast<uint32_t>(x)) {}
};
inline Ints operator+(Ints a, Ints b) { return Ints(static_cast<int32_t>(a.v + b.v)); }
inline Ints operator-(Ints a, Ints b) { return Ints(static_cast<int32_t>(a.v - b.v)); }
inline Ints operator*(Ints a, Ints b) { return Ints(static_cast<int32_t>(a.v * b.v)); }
inline Vec to_float(Ints a) { return static_cast<float>(static_cast<int32_t>(a.v)); }
inline Ints bytes(const uint8_t* p) { return Ints(*p); }
inline Vec half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return from_half(bits);
}
inline void store_int16(Vec a, int16_t* p) { *p = a.v == a.v ? static_cast<int16_t>(a.v) : int16_t{0}; }  // NaN has none

template <int bits, int width>
struct Dots : DotsOf<bits, width> {
  static constexpr int32_t kOffset = 0;
  static constexpr int kWords = width;
  struct Weights {
    uint8_t q[4];
  };
  struct Activations {
    int8_t h[4], l[4];  // of one byte, l alone
  };

  // In 4 bits a line holds columns k .. k + 3 of each row in low halves of bytes, and k + 4 .. k + 7 in high ones.
  static void unpack(const uint8_t* p, Weights (&w)[8 / bits]) {
    for (int j = 0; j < 4; ++j) {
      if constexpr (bits == 4)
        w[0].q[j] = p[j] & 15, w[1].q[j] = p[j] >> 4;
      else
        w[0].q[j] = p[j];
    }
  }
  static void arrange(const int16_t* x, uint32_t* words) {
    for (int unit = 0; unit < 4; ++unit) {
      int8_t h[4], l[4];
      for (int j = 0; j < 4; ++j) {
        const int value = x[4 * unit + j], low = width == 1 ? value : ((value + 64) & 127) - 64;
        h[j] = static_cast<int8_t>((value - low) / 128);
        l[j] = static_cast<int8_t>(low);
      }
      if constexpr (width == 2) std::memcpy(words + 2 * unit, h, 4);
      std::memcpy(words + width * unit + width - 1, l, 4);
    }
  }
  static Activations load(const uint32_t* words) {
    Activations a;
    if constexpr (width == 2) std::memcpy(a.h, words, 4);
    std::memcpy(a.l, words + width - 1, 4);
    return a;
  }

  struct Sum {
    uint32_t h, l;
    void start(Ints value) { h = 0, l = value.v; }
    void add(const Weights& w, const Activations& a, int) {
      for (int j = 0; j < 4; ++j) {
        if constexpr (width == 2) h += static_cast<uint32_t>(w.q[j] * a.h[j]);
        l += static_cast<uint32_t>(w.q[j] * a.l[j]);
      }
    }
    void carry() {}
    Ints total() const { return Ints(static_cast<int32_t>(128 * h + l)); }
  };
};

}  // namespace portlm::PORTLM_ISA
