// Quantized matrices in the order in which packed_linear reads them, and rows of them for embeddings.
#include <cstring>

#include "cpu/half.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"
#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {
namespace {

// Element `index` of an array of bits-wide numbers, low halves of bytes first.
int element(const uint8_t* p, int64_t index, int64_t bits) {
  return bits == 8 ? p[index] : (p[index / 2] >> (index % 2 * 4)) & 15;
}

// The four low halves of bytes 0 and 1, one to a byte.
uint32_t spread(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}

// Eight columns in their order, as a line holds them: 0 4 1 5 2 6 3 7.
uint32_t interleave(uint32_t nibbles) { return spread(nibbles & 0xffffu) | spread(nibbles >> 16) << 4; }

}  // namespace

int64_t packed_size(int64_t N, int64_t K, int64_t group, int64_t bits, int has_zeros) {
  const PackedMatrix m{N, K, group, bits, has_zeros != 0};
  return m.tiles * m.tile_bytes;
}

void pack_matrix(const uint8_t* q, const float* scales, const uint8_t* zeros, uint8_t* packed, int64_t N, int64_t K,
                 int64_t group, int64_t bits) {
  const PackedMatrix m{N, K, group, bits, zeros != nullptr};
  const int64_t G = m.groups, row_bytes = K * bits / 8, zero_bytes = (G * bits + 7) / 8;
  prefer_huge_pages(packed, m.tiles * m.tile_bytes);
  parallel_for(m.tiles, (1 << 12) / (K + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      uint8_t* const to = packed + tile * m.tile_bytes;
      std::memset(to, 0, static_cast<size_t>(m.tile_bytes));
      for (int64_t r = 0; r < kTileHeight && tile * kTileHeight + r < N; ++r) {
        const int64_t row = tile * kTileHeight + r;
        for (int64_t g = 0; g < G; ++g) {
          const uint8_t* const from = q + row * row_bytes + g * group * bits / 8;
          uint8_t* const block = to + g * m.group_bytes;
          for (int64_t i = 0; i < group * bits / 32; ++i) {  // four bytes, a line each
            uint32_t word;
            std::memcpy(&word, from + 4 * i, 4);
            if (bits == 4) word = interleave(word);
            std::memcpy(block + i * kLineBytes + 4 * r, &word, 4);
          }
          const uint16_t scale = to_half(scales[row * G + g]);
          std::memcpy(block + m.weight_bytes + 2 * r, &scale, 2);
          if (zeros)
            block[m.weight_bytes + 2 * kTileHeight + r] =
                static_cast<uint8_t>(element(zeros + row * zero_bytes, g, bits));
        }
      }
    }
  });
}

int64_t packed_rows(const int64_t* ids, const uint8_t* packed, float* y, int64_t n, int64_t V, int64_t K, int64_t group,
                    int64_t bits, int has_zeros) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= V) return i;
  const PackedMatrix m{V, K, group, bits, has_zeros != 0};
  parallel_for(n, kElementwiseGrain / (K + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = ids[i] % kTileHeight;
      const uint8_t* block = packed + ids[i] / kTileHeight * m.tile_bytes;
      float* to = y + i * K;
      for (int64_t g = 0; g < m.groups; ++g, block += m.group_bytes) {
        const uint8_t* const behind = block + m.weight_bytes;
        uint16_t half;
        std::memcpy(&half, behind + 2 * r, 2);
        const float scale = from_half(half);
        const int zero = has_zeros ? behind[2 * kTileHeight + r] : 1 << (bits - 1);
        for (const uint8_t* line = block + 4 * r; line < behind; line += kLineBytes) {
          if (bits == 4)
            for (int j = 0; j < 8; ++j) *to++ = scale * static_cast<float>(((line[j % 4] >> (j / 4 * 4)) & 15) - zero);
          else
            for (int j = 0; j < 4; ++j) *to++ = scale * static_cast<float>(line[j] - zero);
        }
      }
    }
  });
  return -1;
}

}  // namespace portlm::PORTLM_ISA
