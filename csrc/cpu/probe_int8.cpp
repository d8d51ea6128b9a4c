// The peak of byte products on this machine, measured with packed_linear's threads and the instructions it has for many rows.
#include "cpu/amx.h"
#include "cpu/dots.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/probe.h"

namespace portlm::PORTLM_ISA {

#if defined(PORTLM_ISA_AVX512_AMX)

double probe_int8(int64_t turns) {
  constexpr double kOperations = 2.0 * 16 * 16 * 64;  // of one product, which takes as long as 16 in vectors
  const int64_t each = turns / kPasses / 16;
  const int threads = probe_threads();
  const double seconds = best_seconds([=] {
    parallel_for(threads, 1, [=](int64_t, int64_t) {
      const HeldTiles<> held;
      for (int64_t turn = 0; turn < each; ++turn) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    });
  });
  return 4 * kOperations * static_cast<double>(each) * threads / seconds;
}

#else

double probe_int8(int64_t turns) {
  using D = Dots<4, 2>;
  constexpr int kSums = 6;   // of one product with high and one with low activations each: as many chains as probe_flops
  constexpr int kUnits = 8;  // products of a sum before it is widened, where that is needed
  const int64_t each = turns / kPasses / kUnits;
  const int threads = probe_threads();
  const double seconds = best_seconds([=] {
    parallel_for(threads, 1, [=](int64_t, int64_t) {
      uint8_t line[4 * Vec::N];
      for (uint8_t& b : line) b = 0x35;
      uint32_t words[2 * kSums];
      for (uint32_t& word : words) word = 0x01020304u;
      D::Weights w[2];
      D::unpack(line, w);
      D::Sum sums[kSums];
#pragma GCC unroll 6
      for (int k = 0; k < kSums; ++k) sums[k].start(Ints(k));
      for (int64_t turn = 0; turn < each; ++turn) {
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) {
          __asm__ volatile("" : : "r"(words) : "memory");  // they may have changed: no product can be used twice
#pragma GCC unroll 6
          for (int k = 0; k < kSums; ++k) sums[k].add(w[u % 2], D::load(words + 2 * k), u % 2);
        }
#pragma GCC unroll 6
        for (int k = 0; k < kSums; ++k) sums[k].carry();
      }
      Vec total(0.0f);
#pragma GCC unroll 6
      for (int k = 0; k < kSums; ++k) total += to_float(sums[k].total());
      keep_result(sum(total));
    });
  });
  return 2.0 * 2.0 * 4.0 * Vec::N * kSums * kUnits * static_cast<double>(each) * threads / seconds;
}

#endif

}  // namespace portlm::PORTLM_ISA
