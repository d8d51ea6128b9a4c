// GELU of x + bias, forward and backward.
#include "cpu/column_sums.h"
#include "cpu/gelu.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {
namespace {

template <typename Form>
void forward(const float* x, const float* bias, float* y, int64_t rows, int64_t F) {
  if (!bias) F *= rows, rows = 1;  // one long row
  parallel_for(rows * F, kElementwiseGrain, [=](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {  // a thread's share may begin and end within a row
      const int64_t column = at % F, left = F - column, n = left < end - at ? left : end - at;
      for_lanes(n, [=](int64_t j, auto lanes) {
        Vec v = load(x + at + j, lanes);
        if (bias) v += load(bias + column + j, lanes);
        store(Form::value(v), y + at + j, lanes);
      });
      at += n;
    }
  });
}

template <typename Form>
void backward(const float* dy, const float* x, const float* bias, float* dx, float* dbias, int64_t rows, int64_t F) {
  const auto row = [=](int64_t first, int64_t n, int64_t column, float* sums) {
    for_lanes(n, [=](int64_t j, auto lanes) {
      const int64_t i = first + j;
      Vec v = load(x + i, lanes);
      if (bias) v += load(bias + column + j, lanes);
      Vec value;  // not needed here
      const Vec d = load(dy + i, lanes) * Form::slope(v, value);
      store(d, dx + i, lanes);
      if (sums) store(load(sums + j, lanes) + d, sums + j, lanes);
    });
  };
  if (dbias) {
    float* const outs[1] = {dbias};
    column_sums<1>(rows, F, outs, [=](int64_t begin, int64_t end, float* const(&partial)[1]) {
      for (int64_t r = begin; r < end; ++r) row(r * F, F, 0, partial[0]);
    });
    return;
  }
  parallel_for(rows * F, kElementwiseGrain, [=](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t column = at % F, left = F - column, n = left < end - at ? left : end - at;
      row(at, n, column, nullptr);
      at += n;
    }
  });
}

}  // namespace

void gelu_bias_fwd(const float* x, const float* bias, float* y, int64_t rows, int64_t F, int approximate_tanh) {
  approximate_tanh ? forward<GeluTanh>(x, bias, y, rows, F) : forward<GeluExact>(x, bias, y, rows, F);
}

void gelu_bias_bwd(const float* dy, const float* x, const float* bias, float* dx, float* dbias, int64_t rows, int64_t F,
                   int approximate_tanh) {
  approximate_tanh ? backward<GeluTanh>(dy, x, bias, dx, dbias, rows, F) : backward<GeluExact>(dy, x, bias, dx, dbias, rows, F);
}

}  // namespace portlm::PORTLM_ISA
