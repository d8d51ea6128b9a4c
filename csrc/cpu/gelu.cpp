// GELU (Hendrycks and Gimpel 2016) of x + bias, forward and backward, exact and in its tanh approximation.
//
// Both forms are x Phi(x) for some Phi that rises from 0 to 1:
//   exact  Phi(x) = (1 + erf(x / sqrt 2)) / 2 = 1 - q for x > 0 and q otherwise, q = e^(-x^2/2) erfcx(|x| / sqrt 2) / 2
//   tanh   Phi(x) = (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
// which needs one exponential each, and unlike 1 + erf and 1 + tanh does not cancel for negative x.
#include "cpu/column_sums.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr float kTwoSqrtTwoOverPi = 1.59576912f, kCubic = 0.044715f;

struct Exact {
  static Vec gaussian(Vec x) { return exp(x * x * Vec(-0.5f)); }
  static Vec phi(Vec x, Vec gauss) {
    const Vec q = gauss * erfcx(abs(x) * Vec(0.707106781f)) * Vec(0.5f);
    return where_lt(Vec(0.0f), x, Vec(1.0f) - q, q);
  }
  static Vec value(Vec x) { return x * phi(x, gaussian(x)); }
  static Vec slope(Vec x) {  // Phi(x) + x Phi'(x), where Phi' is the density of the normal distribution
    const Vec gauss = gaussian(x);
    return fma(x * gauss, Vec(0.398942280f), phi(x, gauss));
  }
};

struct Tanh {
  static Vec value(Vec x) {
    const Vec u2 = x * fma(x * x, Vec(kTwoSqrtTwoOverPi * kCubic), Vec(kTwoSqrtTwoOverPi));
    return x * sigmoid(u2);
  }
  static Vec slope(Vec x) {  // s + x s (1 - s) d(2u)/dx, where s = 1 / (1 + e) and so 1 - s = e s, without cancelling
    const Vec c = min(Vec(9.5f), max(Vec(-9.5f), x));  // the slope is 0 or 1 there, and e is finite
    const Vec z = c * c;
    const Vec e = exp(c * fma(z, Vec(-kTwoSqrtTwoOverPi * kCubic), Vec(-kTwoSqrtTwoOverPi)));
    const Vec s = Vec(1.0f) / (Vec(1.0f) + e);
    const Vec du2 = fma(z, Vec(3.0f * kTwoSqrtTwoOverPi * kCubic), Vec(kTwoSqrtTwoOverPi));
    return fma(c * du2, s * (e * s), s);
  }
};

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
      const Vec d = load(dy + i, lanes) * Form::slope(v);
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
  approximate_tanh ? forward<Tanh>(x, bias, y, rows, F) : forward<Exact>(x, bias, y, rows, F);
}

void gelu_bias_bwd(const float* dy, const float* x, const float* bias, float* dx, float* dbias, int64_t rows, int64_t F,
                   int approximate_tanh) {
  approximate_tanh ? backward<Tanh>(dy, x, bias, dx, dbias, rows, F) : backward<Exact>(dy, x, bias, dx, dbias, rows, F);
}

}  // namespace portlm::PORTLM_ISA
