// Splits a range of work over threads (cpu/threads.h).
#pragma once

#include <cstdint>

#include "cpu/threads.h"

namespace portlm::PORTLM_ISA {

// Floats of elementwise work below which waking another thread costs more than it brings.
constexpr int64_t kElementwiseGrain = 1 << 14;

// Threads that a loop of n items would get, if a thread is worth waking for `grain` items or more.
inline int threads_for(int64_t n, int64_t grain) {
  const int64_t useful = grain > 0 ? n / grain : n;
  if (useful < 2) return 1;
  const int64_t most = threads_here();
  return static_cast<int>(useful < most ? useful : most);
}

// Calls body(begin, end) on disjoint ranges that cover [0, n): one contiguous range per thread, always the same for
// the same n and thread count, so results are reproducible.
template <typename Body>
inline void parallel_for(int64_t n, int64_t grain, Body body) {
  if (n <= 0) return;
  const int threads = threads_for(n, grain);
  if (threads == 1) {
    body(int64_t{0}, n);
    return;
  }
  const auto part = [&body, n](int64_t id, int64_t count) {
    const int64_t begin = n * id / count, end = n * (id + 1) / count;
    if (begin < end) body(begin, end);
  };
  using Ranges = decltype(part);
  run_parts(threads, [](const void* ranges, int64_t id, int64_t count) { (*static_cast<Ranges*>(ranges))(id, count); }, &part);
}

}  // namespace portlm::PORTLM_ISA
