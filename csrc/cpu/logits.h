// What choosing a token and scoring one have in common: the largest of a row of logits, and exponentials in float64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kSought = 1024;   // logits whose maximum is taken together
constexpr int64_t kExpBlock = 256;  // exponents that are made ready together, see scaled_exp

template <typename To, typename From>
inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &value, sizeof(to));
  return to;
}

// Largest logit and the lowest id that has it. The id is -1 if a logit is NaN or +inf, and then the value is NaN, or if all
// are -inf.
struct Largest {
  float value;
  int64_t id;
};

inline Largest largest(const float* row, int64_t V) {
  float best = -kInf;
  int64_t block = -1;
  Vec refused(0.0f);
  for (int64_t begin = 0; begin < V; begin += kSought) {
    const int64_t size = std::min(kSought, V - begin);
    Vec most(-kInf);
    float m = -kInf;
    for_each_vec(
        size,
        [&](int64_t i) {
          const Vec x = Vec::load(row + begin + i);
          most = max(x, most);
          refused = max(where_lt(x, Vec(kInf), Vec(0.0f), Vec(1.0f)), refused);
        },
        [&](int64_t i, int64_t n) {
          for (int64_t j = begin + i; j < begin + i + n; ++j) {
            if (!(row[j] < kInf)) refused = Vec(1.0f);
            m = std::max(m, row[j]);
          }
        });
    m = std::max(m, hmax(most));
    if (m > best) best = m, block = begin;
  }
  if (hmax(refused) > 0.0f) return {std::numeric_limits<float>::quiet_NaN(), -1};
  if (block < 0) return {best, -1};
  int64_t id = block;
  while (row[id] != best) ++id;
  return {best, id};
}

// 2^scale e^x, for results in the range of normal numbers; at most 1e-14 of it wrong, and the same bits everywhere. Whoever
// calls it in a loop has x ready, because the compiler vectorises only loops without a branch. Adding 1.5 2^52 leaves the
// rounded number in the low bits.
inline double scaled_exp(double x, int scale) {
  constexpr double kRound = 0x1.8p52;
  const double shifted = x * 1.4426950408889634 + kRound, k = shifted - kRound;
  const double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  double p = 2.505210838544172e-08;
  p = p * r + 2.755731922398589e-07;
  p = p * r + 2.7557319223985893e-06;
  p = p * r + 2.48015873015873e-05;
  p = p * r + 1.984126984126984e-04;
  p = p * r + 1.388888888888889e-03;
  p = p * r + 8.333333333333333e-03;
  p = p * r + 4.1666666666666664e-02;
  p = p * r + 1.6666666666666666e-01;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const uint64_t exponent = (bits_of<uint64_t>(shifted) + static_cast<uint64_t>(1023 + scale)) << 52;
  return p * bits_of<double>(exponent);
}

}  // namespace portlm::PORTLM_ISA
