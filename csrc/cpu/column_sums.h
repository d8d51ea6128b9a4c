// Sums over the rows of a batch, as gradients of weights and biases need them, the same for every number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

// Calls body(first_row, last_row, partial) on blocks of rows that depend on `rows` alone; it adds what it finds to
// the K arrays partial[k] of `width` floats, which start at zero. Then outs[k] receives the sum of all blocks, in
// their order.
template <int K, typename Body>
inline void column_sums(int64_t rows, int64_t width, float* const (&outs)[K], Body body) {
  constexpr int64_t kMostBlocks = 64, kLeastRows = 32;  // up to 64 threads; 32 rows outweigh adding up one more block
  const int64_t blocks = rows < 2 * kLeastRows ? 1 : rows < kMostBlocks * kLeastRows ? rows / kLeastRows : kMostBlocks;
  const auto clear = [width](float* p) {
    for_lanes(width, [=](int64_t i, auto lanes) { store(Vec(0.0f), p + i, lanes); });
  };
  if (blocks == 1) {
    for (int k = 0; k < K; ++k) clear(outs[k]);
    body(int64_t{0}, rows, outs);
    return;
  }
  const auto memory = std::make_unique<float[]>(static_cast<size_t>(blocks * K * width));
  float* const all = memory.get();  // (blocks, K, width)
  parallel_for(blocks, kElementwiseGrain / (rows / blocks * width + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* partial[K];
      for (int k = 0; k < K; ++k) partial[k] = all + (b * K + k) * width;
      body(rows * b / blocks, rows * (b + 1) / blocks, partial);
    }
  });
  for (int k = 0; k < K; ++k) {
    float* const out = outs[k];
    parallel_for(width, kElementwiseGrain / blocks + 1, [=](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; ++b) {
        const float* from = all + (b * K + k) * width;
        for_lanes(end - begin, [=](int64_t j, auto lanes) {
          const int64_t i = begin + j;
          store(b == 0 ? load(from + i, lanes) : load(out + i, lanes) + load(from + i, lanes), out + i, lanes);
        });
      }
    });
  }
}

}  // namespace portlm::PORTLM_ISA
