// What the probes share: how a pass over all threads is timed, and where its result goes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {

constexpr int kPasses = 4;  // the best of these counts: whatever disturbs a pass only makes it slower

template <typename Pass>
double best_seconds(Pass pass) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (int i = 0; i < kPasses; ++i) {
    const auto start = Clock::now();
    pass();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = seconds < best ? seconds : best;
  }
  return best;
}

inline int probe_threads() { return threads_for(int64_t{1} << 40, 1); }

// Keeps a result alive that nothing reads.
inline void keep_result(float value) {
  static std::atomic<float> kept;
  kept.store(value, std::memory_order_relaxed);
}

}  // namespace portlm::PORTLM_ISA
