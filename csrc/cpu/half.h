// float16 (IEEE 754 binary16) in software, where there is one number at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace portlm::PORTLM_ISA {

inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest < 0x400u) {  // zero, or subnormal: a multiple of 2^-24
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((rest << 13) + (rest < 0x7c00u ? 0x38000000u : 0x70000000u));
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounded to the nearest, of two the even one; infinite from 65520 on.
inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16
  uint32_t kept, lost, middle;
  if (bits < 0x38800000u) {  // below 2^-14: as a multiple of 2^-24
    const uint32_t shift = 126 - (bits >> 23);
    if (shift > 25) return static_cast<uint16_t>(sign);
    const uint32_t mantissa = (bits & 0x007fffffu) | 0x00800000u;
    kept = mantissa >> shift, lost = mantissa & ((1u << shift) - 1u), middle = 1u << (shift - 1);
  } else {
    kept = (bits - 0x38000000u) >> 13, lost = bits & 0x1fffu, middle = 0x1000u;
  }
  kept += lost > middle || (lost == middle && (kept & 1u));
  return static_cast<uint16_t>(sign | kept);
}

}  // namespace portlm::PORTLM_ISA
