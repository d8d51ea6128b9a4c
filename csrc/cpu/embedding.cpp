// Rows of a table by token id, and the gradient of that table.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

int64_t embedding_fwd(const int64_t* ids, const float* weight, float* y, int64_t n, int64_t V, int64_t C) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= V) return i;
  if (C == 0) return -1;
  parallel_for(n, kElementwiseGrain / C + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(y + i * C, weight + ids[i] * C, sizeof(float) * static_cast<size_t>(C));
  });
  return -1;
}

// Threads share the columns: each adds all n rows, in their order, to its own columns. So no two write the same
// float, frequent tokens burden no thread more than another, and the result does not depend on their number.
void embedding_bwd(const int64_t* ids, const float* dy, float* dweight, int64_t n, int64_t V, int64_t C) {
  parallel_for(V * C, kElementwiseGrain, [=](int64_t begin, int64_t end) {
    std::memset(dweight + begin, 0, sizeof(float) * static_cast<size_t>(end - begin));
  });
  constexpr int64_t kLine = 16;  // columns are dealt out by cache lines
  parallel_for((C + kLine - 1) / kLine, kElementwiseGrain / (n * kLine + 1) + 1, [=](int64_t begin, int64_t end) {
    const int64_t first = begin * kLine, last = end * kLine < C ? end * kLine : C;
    for (int64_t r = 0; r < n; ++r) {
      const float* from = dy + r * C + first;
      float* to = dweight + ids[r] * C + first;
      for_lanes(last - first, [=](int64_t i, auto lanes) { store(load(to + i, lanes) + load(from + i, lanes), to + i, lanes); });
    }
  });
}

}  // namespace portlm::PORTLM_ISA
