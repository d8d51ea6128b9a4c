// Products of weights and activations with NEON. See dots.h.
//
// NEON multiplies signed bytes, so 128 is taken away from weights of 8 bits. With the dot product extension one
// instruction adds four products to a 32-bit sum, and takes the activations from a part of a register, so that they are
// loaded and not repeated; without, bytes are multiplied into 16 bits, where the sum of two still fits
// (2 * 128 * 127 < 2^15), and added up in pairs.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

struct Ints {
  int32x4_t v;
  Ints() = default;
  explicit Ints(int32x4_t x) : v(x) {}
  explicit Ints(int32_t x) : v(vdupq_n_s32(x)) {}
};
inline Ints operator+(Ints a, Ints b) { return Ints(vaddq_s32(a.v, b.v)); }
inline Ints operator-(Ints a, Ints b) { return Ints(vsubq_s32(a.v, b.v)); }
inline Ints operator*(Ints a, Ints b) { return Ints(vmulq_s32(a.v, b.v)); }
inline Vec to_float(Ints a) { return vcvtq_f32_s32(a.v); }
inline Ints bytes(const uint8_t* p) {
  const uint32x4_t four = {p[0], p[1], p[2], p[3]};
  return Ints(vreinterpretq_s32_u32(four));
}
inline Vec half(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
inline void store_int16(Vec a, int16_t* p) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(a.v))); }

template <int bits, int width>
struct Dots : DotsOf<bits, width> {
  static constexpr int32_t kOffset = bits == 8 ? 128 : 0;
  static constexpr int kWords = width;
  struct Weights {
    int8x16_t v;
  };
#if defined(PORTLM_BYTE_DOTS)
  using Activations = int8x8_t;  // h and l, or l and what lies behind it
#else
  struct Activations {
    int8x16_t h, l;  // of one byte, l alone
  };
#endif

  static void unpack(const uint8_t* p, Weights (&w)[8 / bits]) {
    const uint8x16_t line = vld1q_u8(p);
    if constexpr (bits == 4) {
      w[0].v = vreinterpretq_s8_u8(vandq_u8(line, vdupq_n_u8(15)));
      w[1].v = vreinterpretq_s8_u8(vshrq_n_u8(line, 4));
    } else {
      w[0].v = vreinterpretq_s8_u8(veorq_u8(line, vdupq_n_u8(128)));
    }
  }
  static void arrange(const int16_t* x, uint32_t* words) {
    for (int half = 0; half < 2; ++half) {
      const int16x8_t v = vld1q_s16(x + 8 * half), c64 = vdupq_n_s16(64);
      if constexpr (width == 1) {
        vst1_u32(words + 2 * half, vreinterpret_u32_s8(vmovn_s16(v)));
        continue;
      }
      const int16x8_t l = vsubq_s16(vandq_s16(vaddq_s16(v, c64), vdupq_n_s16(127)), c64);
      const uint32x2_t high = vreinterpret_u32_s8(vmovn_s16(vshrq_n_s16(vsubq_s16(v, l), 7)));
      const uint32x2_t low = vreinterpret_u32_s8(vmovn_s16(l));
      vst1q_u32(words + 4 * half, vcombine_u32(vzip1_u32(high, low), vzip2_u32(high, low)));
    }
  }

#if defined(PORTLM_BYTE_DOTS)
  static Activations load(const uint32_t* words) { return vreinterpret_s8_u32(vld1_u32(words)); }
  struct Sum {
    int32x4_t h, l;
    void start(Ints value) { h = vdupq_n_s32(0), l = value.v; }
    void add(const Weights& w, Activations a, int) {
      if constexpr (width == 2) h = vdotq_lane_s32(h, w.v, a, 0);
      l = vdotq_lane_s32(l, w.v, a, width - 1);
    }
#else
  static Activations load(const uint32_t* words) {
    const int8x16_t l = vreinterpretq_s8_u32(vld1q_dup_u32(words + width - 1));
    if constexpr (width == 1) return {l, l};
    return {vreinterpretq_s8_u32(vld1q_dup_u32(words)), l};
  }
  static int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x) {
    const int16x8_t rows01 = vmull_s8(vget_low_s8(w), vget_low_s8(x)), rows23 = vmull_high_s8(w, x);
    return vpadalq_s16(sum, vpaddq_s16(rows01, rows23));
  }
  struct Sum {
    int32x4_t h, l;
    void start(Ints value) { h = vdupq_n_s32(0), l = value.v; }
    void add(const Weights& w, const Activations& a, int) {
      if constexpr (width == 2) h = dot(h, w.v, a.h);
      l = dot(l, w.v, a.l);
    }
#endif
    void carry() {}
    Ints total() const { return Ints(width == 1 ? l : vaddq_s32(vshlq_n_s32(h, 7), l)); }
  };
};

}  // namespace portlm::PORTLM_ISA
