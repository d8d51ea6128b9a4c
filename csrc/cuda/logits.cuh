// What choosing a token and scoring one have in common: the largest of a row of logits, and exponentials in float64 that
// have the bits of those in csrc/cpu/logits.h.
#pragma once

#include <cmath>

#include "cuda/common.cuh"

namespace portlm::cuda {

template <typename To, typename From>
__device__ inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &value, sizeof(to));
  return to;
}

// Larger for larger floats; the same for -0 and +0.
__device__ inline uint32_t key_of(float x) {
  const auto bits = bits_of<uint32_t>(x + 0.0f);
  return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}

// A logit and its id as one number, the largest of which is the largest logit, with the lowest id among equals. NaN and +inf
// are above all others.
__device__ inline uint64_t candidate(float x, int64_t id) {
  const uint32_t key = x < INFINITY ? key_of(x) : 0xffffffffu;
  return uint64_t{key} << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

constexpr uint64_t kNoCandidate = 0;  // below -inf

// Of the largest candidate of a row.
struct Largest {
  float value;  // NaN if one is NaN or +inf
  int64_t id;   // -1 then, and if all are -inf
};

__device__ inline Largest largest_of(uint64_t candidate) {
  const auto key = static_cast<uint32_t>(candidate >> 32);
  if (key == 0xffffffffu) return {NAN, -1};
  if (key <= 0x007fffffu) return {-INFINITY, -1};
  const auto value = bits_of<float>(key ^ ((0u - (1u - (key >> 31))) | 0x80000000u));
  return {value, static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(candidate))};
}

// The largest x of the block, in every thread.
__device__ inline uint64_t block_largest(unsigned long long x) {
  __shared__ unsigned long long partial[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  __syncthreads();  // the previous call's values have been read
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  for (unsigned w = 0; w < warps; ++w) x = partial[w] > x ? partial[w] : x;
  return x;
}

// 2^scale e^x, for results in the range of normal numbers: every operation rounded once, as csrc/cpu/logits.h does it.
__device__ inline double scaled_exp(double x, int scale) {
  constexpr double kRound = 0x1.8p52;
  constexpr double kInverseFactorials[] = {2.755731922398589e-07, 2.7557319223985893e-06, 2.48015873015873e-05,
                                           1.984126984126984e-04, 1.388888888888889e-03,  8.333333333333333e-03,
                                           4.1666666666666664e-02, 1.6666666666666666e-01, 0.5, 1.0, 1.0};
  const double shifted = __dadd_rn(__dmul_rn(x, 1.4426950408889634), kRound), k = __dsub_rn(shifted, kRound);
  const double r = __dsub_rn(__dsub_rn(x, __dmul_rn(k, 6.93147180369123816490e-01)), __dmul_rn(k, 1.90821492927058770002e-10));
  double p = 2.505210838544172e-08;
#pragma unroll
  for (const double coefficient : kInverseFactorials) p = __dadd_rn(__dmul_rn(p, r), coefficient);
  const uint64_t exponent = (bits_of<uint64_t>(shifted) + static_cast<uint64_t>(1023 + scale)) << 52;
  return __dmul_rn(p, bits_of<double>(exponent));
}

}  // namespace portlm::cuda
