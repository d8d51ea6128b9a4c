// What a row of logits says of a token: how probable it is, and which is the most probable one. core/ops/token_scores.py is
// the definition.
//
// A part of a row gives what the whole is made of (csrc/run/head.cpp), so the logits of a long text need never be in memory
// together. Exponentials and sums are of float64: beside the product that makes a logit they cost little, and what is lost
// is the rounding of the logits alone.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/logits.h"
#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;  // logits below which a second thread costs more than it brings
constexpr int kSums = 32;            // that a loop adds to in turn, so that additions do not wait for each other

// The sum of e^(row[i] - top). Below -700, e^x is nothing beside 1.
double sum_of_exponentials(const float* row, int64_t n, double top) {
  double x[kExpBlock], sums[kSums] = {};
  for (int64_t begin = 0; begin < n; begin += kExpBlock) {
    const int64_t size = std::min(kExpBlock, n - begin);
    for (int64_t i = 0; i < size; ++i) {
      const double difference = static_cast<double>(row[begin + i]) - top;
      x[i] = difference > -700.0 ? difference : -700.0;
    }
    int64_t i = 0;
    for (; i + kSums <= size; i += kSums)
      for (int j = 0; j < kSums; ++j) sums[j] += scaled_exp(x[i + j], 0);
    for (; i < size; ++i) sums[i % kSums] += scaled_exp(x[i], 0);
  }
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace

void score_logits(const float* logits, int64_t rows, int64_t n, int64_t first, const int64_t* targets, double* parts) {
  parallel_for(rows, kGrain / (n + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* const row = logits + r * n;
      double* const part = parts + 4 * r;
      const Largest top = largest(row, n);
      part[0] = top.value;
      part[1] = static_cast<double>(top.id < 0 ? -1 : first + top.id);
      if (!targets) continue;
      part[2] = top.id < 0 ? 0.0 : sum_of_exponentials(row, n, top.value);
      const int64_t target = targets[r] - first;
      part[3] = target >= 0 && target < n ? row[target] : -kInf;
    }
  });
}

}  // namespace portlm::PORTLM_ISA
