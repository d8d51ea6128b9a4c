// Vec without vector registers: 1 float. It defines what the other vec_*.h compute, and runs on any machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/lanes.h"

namespace portlm::PORTLM_ISA {

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
inline Vec sums(const Vec (&rows)[1]) { return rows[0]; }

struct SquareSum {
  double value = 0.0;
  void add(Vec x) { value += static_cast<double>(x.v) * static_cast<double>(x.v); }
  double total() const { return value; }
};

}  // namespace portlm::PORTLM_ISA
