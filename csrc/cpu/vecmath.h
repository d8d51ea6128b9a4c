// Elementary functions on Vec. Errors are in units in the last place (ulp), measured against float64 by the tests.
#pragma once

#include <limits>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

// e^x. Cody-Waite reduction x = n ln 2 + r with |r| <= ln 2 / 2, then a degree-6 polynomial; at most 1 ulp.
// Results below the smallest normal number may flush to zero; +inf above 88.72; NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec lo(-104.0f), hi(89.0f);
  const Vec c = min(hi, max(lo, x));  // max and min hand on their second argument, so order decides what NaN does
  const Vec n = round(c * Vec(1.44269504088896341f));
  Vec r = fma(n, Vec(-0.693359375f), c);
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p(1.9875691500e-4f);
  p = fma(p, r, Vec(1.3981999507e-3f));
  p = fma(p, r, Vec(8.3334519073e-3f));
  p = fma(p, r, Vec(4.1665795894e-2f));
  p = fma(p, r, Vec(1.6666665459e-1f));
  p = fma(p, r, Vec(5.0000001201e-1f));
  p = fma(p, r * r, r) + Vec(1.0f);
  return ldexp(p, n);
}

// p(x) by Horner's rule, lowest coefficient first.
template <int n>
inline Vec polynomial(Vec x, const float (&c)[n]) {
  Vec p(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) p = fma(p, x, Vec(c[i]));
  return p;
}

// ln x. x = m 2^e with m in [1/sqrt 2, sqrt 2), then ln m = f - f^2 / 2 + f^3 p(f) with f = m - 1; at most 1 ulp.
// -inf at zero, NaN below, +inf at +inf; NaN stays NaN.
inline Vec log(Vec x) {
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  Vec e;
  const Vec m = split_exponent(x, e);
  const Vec high(1.41421356f);
  e = where_lt(m, high, e, e + Vec(1.0f));
  const Vec f = where_lt(m, high, m, m * Vec(0.5f)) - Vec(1.0f), square = f * f;
  const Vec p = polynomial(f, {3.333333171e-01f, -2.500082106e-01f, 2.000122710e-01f, -1.662335654e-01f, 1.420175162e-01f,
                               -1.316018348e-01f, 1.276162108e-01f, -7.634547339e-02f});
  // ln 2 in two parts, the first short enough that e times it is exact.
  const Vec small = fma(e, Vec(-2.12194440e-4f), fma(square * f, p, square * Vec(-0.5f)));
  Vec y = fma(e, Vec(0.693359375f), f + small);
  y = where_lt(Vec(0.0f), x, y, where_lt(x, Vec(0.0f), Vec(kNan), Vec(-kInf)));  // NaN falls through to -inf here
  y = where_lt(x, Vec(kInf), y, x);                                             // and becomes itself again, like +inf
  return y;
}

// tanh x. Near zero x + x^3 p(x^2), so that the relative error stays small; from 0.56 on 1 - 2 / (e^(2|x|) + 1).
// At most 1.5 ulp; +-1 for large |x|; NaN stays NaN.
inline Vec tanh(Vec x) {
  const Vec t = abs(x), z = x * x;
  const Vec p = polynomial(z, {-3.333331470e-01f, 1.333248118e-01f, -5.384056184e-02f, 2.102066131e-02f, -6.198802076e-03f});
  const Vec far = Vec(1.0f) - Vec(2.0f) / (exp(t + t) + Vec(1.0f));
  return copysign(where_lt(t, Vec(0.56f), fma(p * z, t, t), far), x);
}

// e^(t^2) erfc(t) for t >= 0: k p(k) with k = 1 / (1 + 0.4 t), a minimax fit for t <= 9.4, beyond which e^(-t^2) is
// zero in float32. At most 7 ulp; 0 at +inf.
inline Vec erfcx(Vec t) {
  const Vec k = Vec(1.0f) / fma(Vec(0.4f), t, Vec(1.0f));
  return k * polynomial(k, {2.256244907e-01f, 2.266056221e-01f, 2.007508168e-01f, 1.977554755e-01f, 6.968896525e-02f,
                            1.023105987e-01f, 7.162686109e-02f, -1.344166449e-01f, 4.005387143e-02f});
}

// erf x. Near zero x + x p(x^2); from 0.85 on 1 - e^(-x^2) erfcx(|x|). At most 1.6 ulp; +-1 for
// large |x|; NaN stays NaN.
inline Vec erf(Vec x) {
  const Vec t = abs(x), z = x * x;
  const Vec p = polynomial(z, {1.283791602e-01f, -3.761257187e-01f, 1.128271760e-01f, -2.680255190e-02f, 5.051097336e-03f,
                               -6.315126417e-04f});
  const Vec far = Vec(1.0f) - exp(Vec(0.0f) - z) * erfcx(t);
  return copysign(where_lt(t, Vec(0.85f), fma(p, t, t), far), x);
}

// 1 / (1 + e^-x), at most 2.5 ulp until e^-x overflows at -88.7, where it is 0.
inline Vec sigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + exp(Vec(0.0f) - x)); }

// x sigmoid(x), as accurate.
inline Vec silu(Vec x) { return x / (Vec(1.0f) + exp(Vec(0.0f) - x)); }

}  // namespace portlm::PORTLM_ISA
