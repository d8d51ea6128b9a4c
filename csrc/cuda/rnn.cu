// Elman's network (1990), h' = tanh(projected + W h) or relu of it: a layer over a whole sequence, forward and backward, and
// one step of it behind its two products.
#include "cuda/kernels.h"
#include "cuda/recurrent.cuh"

namespace portlm::cuda {
namespace {

__device__ inline float activated(float x, bool relu) { return relu ? (x < 0.0f ? 0.0f : x) : tanhf(x); }  // NaN stays NaN

struct Forward {
  const float* projected;
  const int64_t* mask;
  float* y;
  bool relu;
  __device__ void operator()(const Layer& layer, int64_t b, int64_t t, int64_t, int64_t unit, const float (&sum)[1],
                             const float* before) const {
    const int64_t at = (b * layer.T + t) * layer.H + unit;
    if (hidden(layer, mask, b, t)) {
      y[at] = before[unit];
      return;
    }
    y[at] = activated(projected[at] + sum[0], relu);
  }
};

struct Backward {
  const float* dy;
  const int64_t* mask;
  const float* y;
  float* dprojected;
  bool relu;
  __device__ float operator()(const Layer& layer, int64_t b, int64_t t, int64_t, int64_t unit, float h) const {
    const int64_t at = (b * layer.T + t) * layer.H + unit;
    h += dy[at];
    const bool skipped = hidden(layer, mask, b, t);
    const float state = y[at], inner = relu ? (0.0f < state ? h : 0.0f) : h * (1.0f - state * state);
    dprojected[at] = skipped ? 0.0f : inner;
    return skipped ? h : 0.0f;
  }
};

struct Cell {
  const float *projected, *recurrent, *h;
  const int64_t* mask;
  float* y;
  int64_t H;
  bool relu;
  __device__ void operator()(int64_t b, int64_t unit) const {
    const int64_t at = b * H + unit;
    y[at] = mask && mask[b] == 0 ? h[at] : activated(projected[at] + recurrent[at], relu);
  }
};

}  // namespace

void rnn_fwd(const float* projected, const float* weight, const float* h0, const int64_t* mask, float* y, int64_t B, int64_t T,
             int64_t H, int relu, int reverse, uintptr_t stream) {
  const Layer layer{B, T, H, reverse != 0};
  forward_steps<1>(layer, weight, h0, y, Forward{projected, mask, y, relu != 0}, stream);
}

void rnn_bwd(const float* dy, const float* weight, const int64_t* mask, const float* y, float* dprojected, float* dh0,
             int64_t B, int64_t T, int64_t H, int relu, int reverse, uintptr_t stream) {
  const Layer layer{B, T, H, reverse != 0};
  backward_steps(layer, weight, H, dprojected, dh0, Backward{dy, mask, y, dprojected, relu != 0}, stream);
}

void rnn_cell(const float* projected, const float* recurrent, const float* h, const int64_t* mask, float* y, int64_t rows,
              int64_t H, int relu, uintptr_t stream) {
  for_units(rows, H, Cell{projected, recurrent, h, mask, y, H, relu != 0}, stream);
}

}  // namespace portlm::cuda
