// Vec with AVX-512: 16 floats. vec.h includes this one where it is the instruction set.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/watched.h"

namespace portlm::PORTLM_ISA {

struct Vec {
  static constexpr int64_t N = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), watched(p, n)); }  // lanes >= n are 0
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const {
    watched(p, n);
    _mm512_mask_storeu_ps(p, mask(n), v);
  }
  static __mmask16 mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }  // 0 <= n <= 16
};
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }  // a*b + c, rounded once
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }                // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec where_lt(Vec a, Vec b, Vec x, Vec y) {  // a < b ? x : y, lane by lane
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m512i m = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(m, _mm512_castps_si512(sign.v), _mm512_castps_si512(magnitude.v), 0xCA));
}
inline Vec ldexp(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }  // a * 2^n for integral n
inline Vec keep(Vec a, First lanes) { return _mm512_maskz_mov_ps(Vec::mask(lanes.n), a.v); }
inline Vec split_exponent(Vec a, Vec& exponent) {
  exponent = _mm512_getexp_ps(a.v);
  return _mm512_getmant_ps(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float hmax(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec sums(const Vec (&rows)[16]) {
  const auto four = [](const Vec* r) {  // in each quarter: the sums of four rows over it
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[0].v, r[1].v), _mm512_unpackhi_ps(r[0].v, r[1].v));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(r[2].v, r[3].v), _mm512_unpackhi_ps(r[2].v, r[3].v));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  };
  const auto halves = [](__m512 a, __m512 b) {  // quarters 0 + 1 and 2 + 3 of a, then of b
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  return halves(halves(four(rows), four(rows + 4)), halves(four(rows + 8), four(rows + 12)));
}

struct SquareSum {
  __m512d lo = _mm512_setzero_pd(), hi = _mm512_setzero_pd();
  void add(Vec x) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
    lo = _mm512_fmadd_pd(a, a, lo);
    hi = _mm512_fmadd_pd(b, b, hi);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(lo, hi)); }
};

}  // namespace portlm::PORTLM_ISA
