// Signed bytes read as a Vec of floats, and what makes them: the numbers of a key/value cache of 8 bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

inline Vec load(const int8_t* p, Whole) {
#if defined(PORTLM_ISA_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(PORTLM_ISA_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(PORTLM_ISA_NEON)
  int32_t four;
  std::memcpy(&four, p, 4);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#else
  return static_cast<float>(*p);
#endif
}

inline Vec load(const int8_t* p, First lanes) {
  int8_t whole[Vec::N] = {};
  std::memcpy(whole, p, static_cast<size_t>(lanes.n));
  return load(whole, Whole{});
}

// The scale of D floats, max|x| / 127: NaN where one of them is NaN or infinite.
inline float byte_scale(const float* x, int64_t D) {
  Vec top(0.0f), none(0.0f);  // x86's max drops a NaN, and a sum of x * 0 keeps it
  for_lanes(D, [&](int64_t d, auto lanes) {
    const Vec v = load(x + d, lanes);
    top = max(keep(abs(v), lanes), top);
    none += keep(v * Vec(0.0f), lanes);
  });
  return hmax(top) / 127.0f + sum(none);
}

// q = x / scale, rounded to the nearest, of two the even one. A scale below the smallest normal number counts as that,
// so that nothing leaves -127 .. 127; 0 where the scale is NaN.
inline void to_bytes(const float* x, float scale, int8_t* q, int64_t D) {
  if (scale != scale) {
    std::memset(q, 0, static_cast<size_t>(D));
    return;
  }
  const Vec divisor(scale < 1.17549435e-38f ? 1.17549435e-38f : scale);
  for_lanes(D, [&](int64_t d, auto lanes) {
    float whole[Vec::N];
    round(load(x + d, lanes) / divisor).store(whole);
    const int64_t count = D - d < Vec::N ? D - d : Vec::N;
    for (int64_t i = 0; i < count; ++i) q[d + i] = static_cast<int8_t>(whole[i]);
  });
}

}  // namespace portlm::PORTLM_ISA
