// Vec with NEON: 4 floats. vec.h includes this one where it is the instruction set.
#pragma once

#include <arm_neon.h>
#include <cstdint>

#include "cpu/lanes.h"

namespace portlm::PORTLM_ISA {

struct Vec {
  static constexpr int64_t N = 4;
  float32x4_t v;
  Vec() = default;
  Vec(float32x4_t x) : v(x) {}
  Vec(float x) : v(vdupq_n_f32(x)) {}
  static Vec load(const float* p) { return vld1q_f32(p); }
  static Vec load(const float* p, int64_t n) {
    float lanes[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(float* p, int64_t n) const {
    float lanes[4];
    vst1q_f32(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
};
inline Vec operator+(Vec a, Vec b) { return vaddq_f32(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return vsubq_f32(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return vmulq_f32(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return vdivq_f32(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c.v, a.v, b.v); }
inline Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v); }
inline Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v); }
inline Vec sqrt(Vec a) { return vsqrtq_f32(a.v); }
inline Vec abs(Vec a) { return vabsq_f32(a.v); }
inline Vec round(Vec a) { return vrndnq_f32(a.v); }
inline Vec where_lt(Vec a, Vec b, Vec x, Vec y) { return vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v); }
inline Vec copysign(Vec magnitude, Vec sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, magnitude.v); }
inline Vec ldexp(Vec a, Vec n) {
  const int32x4_t i = vcvtnq_s32_f32(n.v), half = vshrq_n_s32(i, 1), rest = vsubq_s32(i, half), bias = vdupq_n_s32(127);
  const float32x4_t a1 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  const float32x4_t a2 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23));
  return vmulq_f32(vmulq_f32(a.v, a1), a2);
}
inline Vec keep(Vec a, First lanes) {
  const int32x4_t index = {0, 1, 2, 3};
  return vbslq_f32(vcltq_s32(index, vdupq_n_s32(static_cast<int32_t>(lanes.n))), a.v, vdupq_n_f32(0.0f));
}
inline Vec split_exponent(Vec a, Vec& exponent) {
  const uint32x4_t tiny = vcltq_f32(a.v, vdupq_n_f32(1.17549435e-38f));  // subnormal: scale up first
  const uint32x4_t bits = vreinterpretq_u32_f32(vbslq_f32(tiny, vmulq_n_f32(a.v, 33554432.0f), a.v));
  const float32x4_t biased = vcvtq_f32_u32(vshrq_n_u32(bits, 23));
  exponent = vsubq_f32(biased, vbslq_f32(tiny, vdupq_n_f32(152.0f), vdupq_n_f32(127.0f)));
  const uint32x4_t mantissa = vandq_u32(bits, vdupq_n_u32(0x007fffffu));
  return vreinterpretq_f32_u32(vorrq_u32(mantissa, vdupq_n_u32(0x3f800000u)));
}
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline float hmax(Vec a) { return vmaxvq_f32(a.v); }
inline Vec sums(const Vec (&rows)[4]) {
  return vpaddq_f32(vpaddq_f32(rows[0].v, rows[1].v), vpaddq_f32(rows[2].v, rows[3].v));
}

struct SquareSum {
  float64x2_t lo = vdupq_n_f64(0.0), hi = vdupq_n_f64(0.0);
  void add(Vec x) {
    const float64x2_t a = vcvt_f64_f32(vget_low_f32(x.v)), b = vcvt_high_f64_f32(x.v);
    lo = vfmaq_f64(lo, a, a);
    hi = vfmaq_f64(hi, b, b);
  }
  double total() const { return vaddvq_f64(vaddq_f64(lo, hi)); }
};

}  // namespace portlm::PORTLM_ISA
