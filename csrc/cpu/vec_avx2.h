// Vec with AVX2 and FMA: 8 floats. vec.h includes this one where it is the instruction set.
#pragma once

#include <immintrin.h>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/watched.h"

namespace portlm::PORTLM_ISA {

struct Vec {
  static constexpr int64_t N = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const float* p, int64_t n) { return _mm256_maskload_ps(watched(p, n), mask(n)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const {
    watched(p, n);
    _mm256_maskstore_ps(p, mask(n), v);
  }
  static __m256i mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};
inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec where_lt(Vec a, Vec b, Vec x, Vec y) { return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)); }
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m256 m = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(m, sign.v), _mm256_andnot_ps(m, magnitude.v));
}
inline Vec ldexp(Vec a, Vec n) {
  // In two halves, so that 2^n itself may lie outside float's exponent range.
  const __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 a2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a.v, a1), a2);
}
inline Vec keep(Vec a, First lanes) { return _mm256_and_ps(a.v, _mm256_castsi256_ps(Vec::mask(lanes.n))); }
inline Vec split_exponent(Vec a, Vec& exponent) {
  const __m256 tiny = _mm256_cmp_ps(a.v, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);  // subnormal: scale up first
  const __m256i bits = _mm256_castps_si256(_mm256_blendv_ps(a.v, _mm256_mul_ps(a.v, _mm256_set1_ps(33554432.0f)), tiny));
  const __m256 biased = _mm256_cvtepi32_ps(_mm256_srli_epi32(bits, 23));
  exponent = _mm256_sub_ps(biased, _mm256_blendv_ps(_mm256_set1_ps(127.0f), _mm256_set1_ps(152.0f), tiny));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
  return _mm256_castsi256_ps(_mm256_or_si256(mantissa, _mm256_set1_epi32(0x3f800000)));
}
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float hmax(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec sums(const Vec (&rows)[8]) {
  const auto four = [](const Vec* r) {  // in each half: the sums of four rows over it
    const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(r[0].v, r[1].v), _mm256_unpackhi_ps(r[0].v, r[1].v));
    const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(r[2].v, r[3].v), _mm256_unpackhi_ps(r[2].v, r[3].v));
    const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
  };
  const __m256 a = four(rows), b = four(rows + 4);
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

struct SquareSum {
  __m256d lo = _mm256_setzero_pd(), hi = _mm256_setzero_pd();
  void add(Vec x) {
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
    lo = _mm256_fmadd_pd(a, a, lo);
    hi = _mm256_fmadd_pd(b, b, hi);
  }
  double total() const {
    const __m256d s = _mm256_add_pd(lo, hi);
    const __m128d h = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
  }
};

}  // namespace portlm::PORTLM_ISA
