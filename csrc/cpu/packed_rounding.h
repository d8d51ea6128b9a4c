// Activations of packed_linear as whole numbers: each group of each row, times one scale.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/dots.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

constexpr int64_t kMostColumns = 128;  // of a group

// One group of one row in whole numbers X, which kernels take in one or two bytes: x is about X times scale.
struct WholeGroup {
  int16_t x[kMostColumns];
  int32_t total;
  float scale;
};

// Any group. One with NaN in it becomes NaN, and of one with infinities only these remain, so that either reaches y.
template <int width>
__attribute__((noinline)) void take_odd(const float* x, int64_t group, WholeGroup& to) {
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr double kLargest = kLargestActivation<width>;
  double largest = 0.0;
  bool nan = false;
  for (int64_t i = 0; i < group; ++i) {
    nan |= x[i] != x[i];
    largest = std::max(largest, std::abs(static_cast<double>(x[i])));
  }
  const double inverse = largest > 0.0 ? kLargest / largest : 0.0;
  to.total = 0;
  for (int64_t i = 0; i < group; ++i) {
    const double whole = nan ? 0.0 : largest == kInf ? (x[i] == kInf) - (x[i] == -kInf) : std::nearbyint(x[i] * inverse);
    to.x[i] = static_cast<int16_t>(whole);
    to.total += to.x[i];
  }
  to.scale = nan ? kNan : largest == kInf ? kInf : static_cast<float>(largest / kLargest);
}

// The largest of a group, NaN aside.
inline float largest_of(const float* x, int64_t group) {
  Vec most(0.0f);
  for (int64_t i = 0; i < group; i += Vec::N) most = max(abs(Vec::load(x + i)), most);
  return hmax(most);
}

template <int width>
inline void take_group(const float* x, int64_t group, float largest, WholeGroup& to) {
  constexpr float kLargest = kLargestActivation<width>;
  if (!(largest > 1e-30f && largest < 1e38f)) return take_odd<width>(x, group, to);  // its inverse, or it, may be infinite
  const Vec inverse(kLargest / largest);
  Vec total(0.0f);
  for (int64_t i = 0; i < group; i += Vec::N) {
    const Vec whole = round(Vec::load(x + i) * inverse);
    total += whole;
    store_int16(whole, to.x + i);
  }
  const float sum_of_whole = sum(total);  // exact, for it is less than 2^24
  if (sum_of_whole != sum_of_whole) return take_odd<width>(x, group, to);  // NaN
  to.total = static_cast<int32_t>(sum_of_whole);
  to.scale = largest * (1.0f / kLargest);
}

}  // namespace portlm::PORTLM_ISA
