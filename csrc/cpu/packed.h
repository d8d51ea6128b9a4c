// How a quantized matrix lies in memory for packed_linear, on every instruction set.
//
// W (N, K) is cut into tiles of 16 rows, filled up with zeros. A tile holds one block per group of `group` columns: the
// weights, then 16 float16 scales, then, if the groups have zeros of their own, 16 bytes of them. Weights come in lines
// of 64 bytes, four bytes to a row: one column per byte, or two, k .. k + 3 in the low halves and k + 4 .. k + 7 in the
// high ones. So a line is one register that meets four activations, the same for all rows, and sums of rows stay in
// their lanes. A tile ends at a multiple of 64 bytes.
#pragma once

#include <cstdint>

namespace portlm::PORTLM_ISA {

constexpr int64_t kTileHeight = 16;
constexpr int64_t kLineBytes = 64;

struct PackedMatrix {
  int64_t N, K, group, bits;
  bool has_zeros;
  int64_t groups, tiles;
  int64_t weight_bytes;  // of one group in one tile, without what is behind the weights
  int64_t group_bytes, tile_bytes;

  PackedMatrix(int64_t N, int64_t K, int64_t group, int64_t bits, bool has_zeros)
      : N(N),
        K(K),
        group(group),
        bits(bits),
        has_zeros(has_zeros),
        groups(K / group),
        tiles((N + kTileHeight - 1) / kTileHeight),
        weight_bytes(kTileHeight * group * bits / 8),
        group_bytes(weight_bytes + kTileHeight * (has_zeros ? 3 : 2)),
        tile_bytes((groups * group_bytes + kLineBytes - 1) / kLineBytes * kLineBytes) {}
};

}  // namespace portlm::PORTLM_ISA
