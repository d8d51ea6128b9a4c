// Elementary functions on Vec. Errors are in units in the last place (ulp), measured against float64 by the tests.
#pragma once

#include <limits>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

// e^x. Cody-Waite reduction x = n ln 2 + r with |r| <= ln 2 / 2, then a degree-6 polynomial; at most 2 ulp.
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

}  // namespace portlm::PORTLM_ISA
