// AdamW (Loshchilov and Hutter 2019) over all tensors of a model in one call.
//
// Memory bound: the gradient norm reads 4 bytes per parameter, the update reads 16 and writes 12, and clipping is a
// factor inside it. Work is dealt out by elements, so hundreds of small tensors cost no more than one large one.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kNormBlock = 1 << 14;  // floats per partial sum of squares, whatever the number of threads

struct Table {
  const int64_t *params, *grads, *means, *squares, *steps, *sizes, *groups;
  int64_t count;
  std::vector<int64_t> offsets, blocks;  // where each tensor's elements, and its norm blocks, begin among all

  Table(const int64_t* rows, int64_t n)
      : params(rows), grads(rows + n), means(rows + 2 * n), squares(rows + 3 * n), steps(rows + 4 * n), sizes(rows + 5 * n),
        groups(rows + 6 * n), count(n), offsets(static_cast<size_t>(n) + 1), blocks(static_cast<size_t>(n) + 1) {
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      offsets[i + 1] = offsets[i] + sizes[i];
      blocks[i + 1] = blocks[i] + (sizes[i] + kNormBlock - 1) / kNormBlock;
    }
  }

  // Calls body(tensor, first, last) for each tensor's part of the elements [begin, end).
  template <typename Body>
  void walk(int64_t begin, int64_t end, Body body) const {
    int64_t i = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
    for (; i < count && offsets[static_cast<size_t>(i)] < end; ++i) {
      const int64_t start = offsets[static_cast<size_t>(i)];
      const int64_t first = std::max<int64_t>(begin - start, 0), last = std::min(end - start, sizes[i]);
      if (first < last) body(i, first, last);
    }
  }
};

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

double sum_of_squares(const float* x, int64_t n) {
  SquareSum a, b;
  int64_t i = 0;
  for (; i + 2 * Vec::N <= n; i += 2 * Vec::N) {
    a.add(Vec::load(x + i));
    b.add(Vec::load(x + i + Vec::N));
  }
  for_lanes(n - i, [&](int64_t j, auto lanes) { a.add(load(x + i + j, lanes)); });
  return a.total() + b.total();
}

double global_norm(const Table& table) {
  std::vector<double> partial(static_cast<size_t>(table.blocks.back()));
  parallel_for(table.offsets.back(), kElementwiseGrain, [&](int64_t begin, int64_t end) {
    table.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
      const float* grad = pointer<const float>(table.grads[i]);
      // A block belongs to the thread in whose range it begins.
      for (int64_t b = (first + kNormBlock - 1) / kNormBlock; b * kNormBlock < last; ++b) {
        const int64_t n = std::min(kNormBlock, table.sizes[i] - b * kNormBlock);
        partial[static_cast<size_t>(table.blocks[static_cast<size_t>(i)] + b)] = sum_of_squares(grad + b * kNormBlock, n);
      }
    });
  });
  double total = 0.0;
  for (const double p : partial) total += p;
  return std::sqrt(total);
}

}  // namespace

double adamw_step(const int64_t* table_rows, int64_t count, const double* groups, double max_norm) {
  const Table table(table_rows, count);
  const double norm = global_norm(table);
  if (!std::isfinite(norm)) return norm;
  const Vec clip(static_cast<float>(std::min(1.0, max_norm / (norm + 1e-6))));
  parallel_for(table.offsets.back(), kElementwiseGrain, [&](int64_t begin, int64_t end) {
    table.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
      const double* group = groups + 5 * table.groups[i];
      const double lr = group[0], beta1 = group[1], beta2 = group[2], step = *pointer<const float>(table.steps[i]) + 1.0;
      const Vec keep_mean(static_cast<float>(1.0 - beta1)), beta_square(static_cast<float>(beta2));
      const Vec keep_square(static_cast<float>(1.0 - beta2)), eps(static_cast<float>(group[3]));
      const Vec decay(static_cast<float>(1.0 - lr * group[4]));
      const Vec rate(static_cast<float>(lr / (1.0 - std::pow(beta1, step))));
      const Vec root_correction(static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step))));
      const float* grad = pointer<const float>(table.grads[i]) + first;
      float* param = pointer<float>(table.params[i]) + first;
      float* mean = pointer<float>(table.means[i]) + first;
      float* square = pointer<float>(table.squares[i]) + first;
      for_lanes(last - first, [=](int64_t j, auto lanes) {
        const Vec g = load(grad + j, lanes) * clip;
        const Vec m = load(mean + j, lanes);
        const Vec m1 = fma(g - m, keep_mean, m);
        const Vec v1 = fma(g * g, keep_square, load(square + j, lanes) * beta_square);
        const Vec move = m1 / fma(sqrt(v1), root_correction, eps);
        store(m1, mean + j, lanes);
        store(v1, square + j, lanes);
        store(load(param + j, lanes) * decay - rate * move, param + j, lanes);
      });
    });
  });
  for (int64_t i = 0; i < count; ++i) *pointer<float>(table.steps[i]) += 1.0f;
  return norm;
}

}  // namespace portlm::PORTLM_ISA
