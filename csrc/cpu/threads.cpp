#include "cpu/threads.h"

#include "cpu/kernels.h"
#include "cpu/pool.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace portlm {
namespace {

thread_local bool own = false;

}  // namespace

OwnThreads::OwnThreads() : before_(own) { own = true; }

OwnThreads::~OwnThreads() { own = before_; }

#ifdef _OPENMP

int set_threads(int count) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(count);
  return before;
}

int threads_here() { return Pool::inside() || omp_in_parallel() ? 1 : omp_get_max_threads(); }

void run_parts(int count, Part part, const void* body) {
  if (own) return Pool::shared().run(count, part, body);
#pragma omp parallel num_threads(count)
  part(body, omp_get_thread_num(), omp_get_num_threads());
}

#else

int set_threads(int) { return 1; }

int threads_here() { return 1; }

void run_parts(int, Part part, const void* body) { part(body, 0, 1); }

#endif

}  // namespace portlm
