// Quantized matrices as a device reads them: as core/ops/quantized.py keeps them, but for the scales, which are float16. A row of
// numbers is a multiple of 16 bytes, and no 16 bytes of it belong to two groups.
//
// A number becomes a float by being put below the exponent of 2^23, from which 2^23 and the zero point are subtracted again:
// both are whole numbers below 2^24, so nothing is rounded.
#pragma once

#include <cuda_fp16.h>

#include "cuda/common.cuh"

namespace portlm::cuda {

struct PackedMatrix {
  const uint8_t* q;       // (N, K bits / 8), low halves first
  const __half* scales;   // (N, G)
  const uint8_t* zeros;   // (N, ceil(G bits / 8)), or nullptr
  int64_t K, groups;
  int group;

  PackedMatrix(const uint8_t* q, const uint16_t* scales, const uint8_t* zeros, int64_t K, int64_t group)
      : q(q), scales(reinterpret_cast<const __half*>(scales)), zeros(zeros), K(K), groups(K / group), group(static_cast<int>(group)) {}
};

constexpr unsigned kMagic = 0x4b000000u;  // 2^23
constexpr float kMagicValue = 8388608.0f;

// What 16 bytes of a row hold, and what they mean: scale * (number - zero).
struct Numbers {
  Pack<uint32_t, 4> words;
  float scale, zero;
};

template <int Bits>
struct PackedWeights {
  static constexpr int kChunk = 128 / Bits;
  static constexpr int kStep = 4;
  static constexpr bool kScaled = true;
  using Raw = Numbers;

  PackedMatrix m;

  __device__ Raw load(int64_t n, int64_t chunk) const {
    Raw raw;
    raw.words = *reinterpret_cast<const Pack<uint32_t, 4>*>(m.q + (n * m.K + chunk * kChunk) * Bits / 8);
    const int64_t g = chunk * kChunk / m.group;
    raw.scale = __half2float(m.scales[n * m.groups + g]);
    raw.zero = 1 << (Bits - 1);
    if (m.zeros) {
      const uint8_t* const row = m.zeros + n * ((m.groups * Bits + 7) / 8);
      raw.zero = static_cast<float>(Bits == 8 ? row[g] : row[g / 2] >> g % 2 * 4 & 15);
    }
    return raw;
  }

  // Four numbers less their zero point. Of 4 bits each stays where it is in its word, so it counts 16^i times as much.
  template <int S>
  static __device__ void decode(const Raw& raw, float (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (Bits == 8) {
        w[i] = __uint_as_float(__byte_perm(raw.words.v[S], kMagic, 0x7440u + i)) - (kMagicValue + raw.zero);
      } else {
        const unsigned word = S % 2 ? raw.words.v[S / 2] >> 16 : raw.words.v[S / 2];
        const float sixteens = 1 << 4 * i;
        w[i] = __uint_as_float((word & 15u << 4 * i) | kMagic) - fmaf(sixteens, raw.zero, kMagicValue);
      }
  }

  // And column k of x that much less, which is exact but for numbers near the smallest that there are.
  static __host__ __device__ constexpr float unit(int k) { return Bits == 8 ? 1.0f : 1.0f / static_cast<float>(1 << 4 * (k % 4)); }
};

}  // namespace portlm::cuda
