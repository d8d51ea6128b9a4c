// Rotary position embedding (Su et al. 2021), halves convention: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

void rotary_fwd(const float* x, int64_t x_stride, const float* cos, const float* sin, const int64_t* positions, float* y,
                int64_t tokens, int64_t period, int64_t H, int64_t D, int inverse) {
  if (H * D == 0) return;
  const int64_t half = D / 2;
  const Vec sign(inverse ? -1.0f : 1.0f);
  parallel_for(tokens, kElementwiseGrain / (H * D) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = positions ? positions[t] : t % period;
      const float *c = cos + position * half, *s = sin + position * half;
      for (int64_t head = 0; head < H; ++head) {
        const float* from = x + t * x_stride + head * D;
        float* to = y + (t * H + head) * D;
        for_lanes(half, [=](int64_t i, auto lanes) {
          const Vec x1 = load(from + i, lanes), x2 = load(from + half + i, lanes);
          const Vec co = load(c + i, lanes), si = load(s + i, lanes) * sign;
          store(x1 * co - x2 * si, to + i, lanes);
          store(x2 * co + x1 * si, to + half + i, lanes);
        });
      }
    }
  });
}

}  // namespace portlm::PORTLM_ISA
