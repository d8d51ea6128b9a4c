// The functions of vecmath.h over an array. Tests use it to measure them against float64; nothing else does.
#include "cpu/kernels.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {
namespace {

template <typename F>
void map(const float* x, float* y, int64_t n, F f) {
  for_lanes(n, [=](int64_t i, auto lanes) { store(f(load(x + i, lanes)), y + i, lanes); });
}

}  // namespace

int64_t elementary(int64_t function, const float* x, float* y, int64_t n) {
  switch (function) {
    case 0: map(x, y, n, [](Vec v) { return exp(v); }); return 0;
    case 1: map(x, y, n, [](Vec v) { return log(v); }); return 0;
    case 2: map(x, y, n, [](Vec v) { return tanh(v); }); return 0;
    case 3: map(x, y, n, [](Vec v) { return erf(v); }); return 0;
    case 4: map(x, y, n, [](Vec v) { return sigmoid(v); }); return 0;
    case 5: map(x, y, n, [](Vec v) { return silu(v); }); return 0;
    default: return -1;
  }
}

}  // namespace portlm::PORTLM_ISA
