// GELU (Hendrycks and Gimpel 2016) and its slope on Vec, exact and in its tanh approximation.
//
// Both forms are x Phi(x) for some Phi that rises from 0 to 1:
//   exact  Phi(x) = (1 + erf(x / sqrt 2)) / 2 = 1 - q for x > 0 and q otherwise, q = e^(-x^2/2) erfcx(|x| / sqrt 2) / 2
//   tanh   Phi(x) = (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
// which needs one exponential each, and unlike 1 + erf and 1 + tanh does not cancel for negative x.
#pragma once

#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {

struct GeluExact {
  static Vec gaussian(Vec x) { return exp(x * x * Vec(-0.5f)); }
  static Vec phi(Vec x, Vec gauss) {
    const Vec q = gauss * erfcx(abs(x) * Vec(0.707106781f)) * Vec(0.5f);
    return where_lt(Vec(0.0f), x, Vec(1.0f) - q, q);
  }
  static Vec value(Vec x) { return x * phi(x, gaussian(x)); }
  // Returns Phi(x) + x Phi'(x), where Phi' is the density of the normal distribution; value becomes value(x).
  static Vec slope(Vec x, Vec& value) {
    const Vec gauss = gaussian(x), p = phi(x, gauss);
    value = x * p;
    return fma(x * gauss, Vec(0.398942280f), p);
  }
};

struct GeluTanh {
  static constexpr float kTwoSqrtTwoOverPi = 1.59576912f, kCubic = 0.044715f;
  static Vec value(Vec x) {
    const Vec u2 = x * fma(x * x, Vec(kTwoSqrtTwoOverPi * kCubic), Vec(kTwoSqrtTwoOverPi));
    return x * sigmoid(u2);
  }
  // s + x s (1 - s) d(2u)/dx, where s = 1 / (1 + e) and so 1 - s = e s, without cancelling
  static Vec slope(Vec x, Vec& value) {
    const Vec c = min(Vec(9.5f), max(Vec(-9.5f), x));  // the slope is 0 or 1 there, and e is finite
    const Vec z = c * c;
    const Vec e = exp(c * fma(z, Vec(-kTwoSqrtTwoOverPi * kCubic), Vec(-kTwoSqrtTwoOverPi)));
    const Vec s = Vec(1.0f) / (Vec(1.0f) + e);
    const Vec du2 = fma(z, Vec(3.0f * kTwoSqrtTwoOverPi * kCubic), Vec(kTwoSqrtTwoOverPi));
    value = x * s;
    return fma(c * du2, s * (e * s), s);
  }
};

}  // namespace portlm::PORTLM_ISA
