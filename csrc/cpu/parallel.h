// Splits a range of work over threads. With OpenMP the threads are those PyTorch uses, so there is one pool, not two.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace portlm::PORTLM_ISA {

// Floats of elementwise work below which waking another thread costs more than it brings.
constexpr int64_t kElementwiseGrain = 1 << 14;

// Threads that a loop of n items would get, if a thread is worth waking for `grain` items or more.
inline int threads_for(int64_t n, int64_t grain) {
#ifdef _OPENMP
  if (omp_in_parallel()) return 1;
  const int64_t useful = grain > 0 ? n / grain : n;
  const int64_t most = omp_get_max_threads();
  return static_cast<int>(useful < 1 ? 1 : useful < most ? useful : most);
#else
  (void)n, (void)grain;
  return 1;
#endif
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
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = n * id / count, end = n * (id + 1) / count;
    if (begin < end) body(begin, end);
  }
#endif
}

}  // namespace portlm::PORTLM_ISA
