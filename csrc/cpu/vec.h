// A vector of floats as wide as this compilation's registers, so that each kernel is written once.
//
// Vec<float> in everything but name: load, store, partial load/store for tails, arithmetic, reductions. The scalar
// build has width 1 and runs the same polynomials, so testing it tests the mathematics of the wide ones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace portlm::PORTLM_ISA {

// Which lanes of a vector exist. Whole is known at compile time, so a loop body written once for both costs nothing.
struct Whole {};
struct First {
  int64_t n;  // 0 <= n <= Vec::N
};

#if defined(PORTLM_ISA_AVX512)

struct Vec {
  static constexpr int64_t N = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }  // lanes >= n are 0
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
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

struct SquareSum {
  __m512d lo = _mm512_setzero_pd(), hi = _mm512_setzero_pd();
  void add(Vec x) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
    lo = _mm512_fmadd_pd(a, a, lo);
    hi = _mm512_fmadd_pd(b, b, hi);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(lo, hi)); }
};

#elif defined(PORTLM_ISA_AVX2)

struct Vec {
  static constexpr int64_t N = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const float* p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, mask(n), v); }
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

#elif defined(PORTLM_ISA_NEON)

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

struct SquareSum {
  float64x2_t lo = vdupq_n_f64(0.0), hi = vdupq_n_f64(0.0);
  void add(Vec x) {
    const float64x2_t a = vcvt_f64_f32(vget_low_f32(x.v)), b = vcvt_high_f64_f32(x.v);
    lo = vfmaq_f64(lo, a, a);
    hi = vfmaq_f64(hi, b, b);
  }
  double total() const { return vaddvq_f64(vaddq_f64(lo, hi)); }
};

#else  // scalar

struct Vec {
  static constexpr int64_t N = 1;
  float v;
  Vec() = default;
  Vec(float x) : v(x) {}
  static Vec load(const float* p) { return *p; }
  static Vec load(const float* p, int64_t n) { return n > 0 ? *p : 0.0f; }
  void store(float* p) const { *p = v; }
  void store(float* p, int64_t n) const {
    if (n > 0) *p = v;
  }
};
inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }  // std::fma is a slow library call at this baseline
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
inline Vec sqrt(Vec a) { return std::sqrt(a.v); }
inline Vec abs(Vec a) { return std::fabs(a.v); }
inline Vec round(Vec a) { return std::nearbyint(a.v); }
inline Vec where_lt(Vec a, Vec b, Vec x, Vec y) { return a.v < b.v ? x : y; }
inline Vec copysign(Vec magnitude, Vec sign) { return std::copysign(magnitude.v, sign.v); }
inline Vec ldexp(Vec a, Vec n) {
  if (!(n.v == n.v)) return n;  // converting NaN to an integer is undefined
  const int32_t i = static_cast<int32_t>(n.v), half = i >> 1, rest = i - half;
  const auto power = [](int32_t e) {
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  };
  return a.v * power(half) * power(rest);
}
inline Vec keep(Vec a, First lanes) { return lanes.n > 0 ? a.v : 0.0f; }
inline Vec split_exponent(Vec a, Vec& exponent) {
  const bool tiny = a.v < 1.17549435e-38f;  // subnormal: scale up first
  const float scaled = tiny ? a.v * 33554432.0f : a.v;
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  exponent = static_cast<float>(bits >> 23) - (tiny ? 152.0f : 127.0f);
  bits = (bits & 0x007fffffu) | 0x3f800000u;
  float mantissa;
  std::memcpy(&mantissa, &bits, 4);
  return mantissa;
}
inline float sum(Vec a) { return a.v; }
inline float hmax(Vec a) { return a.v; }

struct SquareSum {
  double value = 0.0;
  void add(Vec x) { value += static_cast<double>(x.v) * static_cast<double>(x.v); }
  double total() const { return value; }
};

#endif

// Of the functions above that are defined per instruction set:
//   keep(a, lanes)               lanes that do not exist become 0, so that sums may include them
//   split_exponent(a, exponent)  for 0 < a < inf: the mantissa in [1, 2), with a = mantissa * 2^exponent
//   SquareSum                    sums squares in float64

inline Vec keep(Vec a, Whole) { return a; }
inline Vec load(const float* p, Whole) { return Vec::load(p); }
inline Vec load(const float* p, First lanes) { return Vec::load(p, lanes.n); }
inline void store(Vec a, float* p, Whole) { a.store(p); }
inline void store(Vec a, float* p, First lanes) { a.store(p, lanes.n); }

inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// Calls body(i, lanes) for i = 0, N, 2N, ... below size; lanes is Whole, or First in a last vector that is not full.
template <typename Body>
inline void for_lanes(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + Vec::N <= size; i += Vec::N) body(i, Whole{});
  if (i < size) body(i, First{size - i});
}

// Sums K quantities over one row: terms(i, lanes) returns a Sums<K> of K vectors, which `keep` has cleared of lanes
// that do not exist.
//
// The additions form a tree: four accumulators, which hide the latency of an addition, are closed after 16 turns.
// So the error grows as 16 + size / (64 N) and not as size / N, which is what width-1 vectors would give.
template <int K>
struct Sums {
  Vec v[K];
};

template <int K, typename Terms>
inline void row_sums(int64_t size, float (&out)[K], Terms terms) {
  constexpr int64_t kTurn = 4 * Vec::N, kBlock = 16 * kTurn;
  Vec total[K];
  for (int k = 0; k < K; ++k) total[k] = Vec(0.0f);
  int64_t i = 0;
  while (i + kTurn <= size) {
    const int64_t end = i + kBlock < size ? i + kBlock : size;
    Sums<K> a = terms(i, Whole{}), b = terms(i + Vec::N, Whole{});
    Sums<K> c = terms(i + 2 * Vec::N, Whole{}), d = terms(i + 3 * Vec::N, Whole{});
    for (i += kTurn; i + kTurn <= end; i += kTurn) {
      const Sums<K> p = terms(i, Whole{}), q = terms(i + Vec::N, Whole{});
      const Sums<K> r = terms(i + 2 * Vec::N, Whole{}), s = terms(i + 3 * Vec::N, Whole{});
      for (int k = 0; k < K; ++k) {
        a.v[k] += p.v[k];
        b.v[k] += q.v[k];
        c.v[k] += r.v[k];
        d.v[k] += s.v[k];
      }
    }
    for (int k = 0; k < K; ++k) total[k] += (a.v[k] + b.v[k]) + (c.v[k] + d.v[k]);
  }
  for_lanes(size - i, [&](int64_t j, auto lanes) {
    const Sums<K> p = terms(i + j, lanes);
    for (int k = 0; k < K; ++k) total[k] += p.v[k];
  });
  for (int k = 0; k < K; ++k) out[k] = sum(total[k]);
}

// Calls whole(i) for each whole vector and tail(i, n) once for the n < N floats that are left: for_lanes for bodies
// that differ.
template <typename Whole, typename Tail>
inline void for_each_vec(int64_t size, Whole whole, Tail tail) {
  int64_t i = 0;
  for (; i + Vec::N <= size; i += Vec::N) whole(i);
  if (i < size) tail(i, size - i);
}

}  // namespace portlm::PORTLM_ISA
