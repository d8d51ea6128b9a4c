// Weights of 16 bits, float16 (IEEE 754 binary16) and bfloat16 (the upper half of a float32), as vectors of float32: every
// value is kept, NaN and the infinities, too. Elements of float32 are loaded as they are, so that a kernel may be written
// once for all three.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/dots.h"
#include "cpu/half.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float widen_one(float x) { return x; }
inline float widen_one(Float16 x) { return from_half(x.bits); }
inline float widen_one(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Vec::N elements, which may begin anywhere.
inline Vec widen(const float* p) { return Vec::load(p); }
inline Vec widen(const Float16* p) { return half(reinterpret_cast<const uint8_t*>(p)); }
inline Vec widen(const BFloat16* p) {
#if defined(PORTLM_ISA_AVX512)
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
#elif defined(PORTLM_ISA_AVX2)
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
#elif defined(PORTLM_ISA_NEON)
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
#else
  return widen_one(*p);
#endif
}

}  // namespace portlm::PORTLM_ISA
