// Rotary position embedding (Su et al. 2021), halves convention: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

// One head of 2 * half columns; to may be from.
inline void rotate(const float* from, const float* cos, const float* sin, Vec sign, int64_t half, float* to) {
  for_lanes(half, [=](int64_t i, auto lanes) {
    const Vec x1 = load(from + i, lanes), x2 = load(from + half + i, lanes);
    const Vec co = load(cos + i, lanes), si = load(sin + i, lanes) * sign;
    store(x1 * co - x2 * si, to + i, lanes);
    store(x2 * co + x1 * si, to + half + i, lanes);
  });
}

}  // namespace

void rotary_fwd(const float* x, int64_t x_stride, const float* cos, const float* sin, const int64_t* positions, float* y,
                int64_t tokens, int64_t period, int64_t H, int64_t D, int inverse) {
  if (H * D == 0) return;
  const int64_t half = D / 2;
  const Vec sign(inverse ? -1.0f : 1.0f);
  parallel_for(tokens, kElementwiseGrain / (H * D) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = positions ? positions[t] : t % period;
      const float *c = cos + position * half, *s = sin + position * half;
      for (int64_t head = 0; head < H; ++head)
        rotate(x + t * x_stride + head * D, c, s, sign, half, y + (t * H + head) * D);
    }
  });
}

void rotary_heads(const float* x, int64_t x_stride, int64_t head_stride, const float* cos, const float* sin,
                  const int64_t* positions, float* y, int64_t y_stride, int64_t tokens, int64_t H, int64_t D, int64_t R) {
  if (H * D == 0) return;
  const int64_t half = R / 2;
  parallel_for(tokens, kElementwiseGrain / (H * D) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t head = 0; head < H; ++head) {
        const float* const from = x + t * x_stride + head * head_stride;
        float* const to = y + t * y_stride + head * D;
        if (half > 0) rotate(from, cos + positions[t] * half, sin + positions[t] * half, Vec(1.0f), half, to);
        for_lanes(D - R, [=](int64_t i, auto lanes) { store(load(from + R + i, lanes), to + R + i, lanes); });
      }
  });
}

}  // namespace portlm::PORTLM_ISA
