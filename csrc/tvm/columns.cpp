// Columns of every head, for queries, keys and values that lie side by side head by head, as TVM-FFI functions, outputs
// last (destination passing). Copies for a prompt cost little beside its products, and for one token nothing.
#include <cstdint>
#include <cstring>

#include "tvm/call.h"

using portlm::tvm::Call;
using portlm::tvm::guarded;
using portlm::tvm::Tensor;

namespace {

// Columns [first, first + width) of every `period` columns of a tensor (B, T, W): four arguments from number `at` on.
struct Source {
  const float* data;
  int64_t B, T, heads, period, width;
  Source(const Call& call, int32_t at) {
    const Tensor x = call.f32(at, "x", 3);
    period = call.integer(at + 1, "period"), width = call.integer(at + 3, "width");
    const int64_t first = call.integer(at + 2, "first");
    if (period < 1 || x.size(2) % period) call.fail("period must divide the columns of x");
    if (first < 0 || width < 1 || width > period || first > period - width) call.fail("there are no such columns");
    B = x.size(0), T = x.size(1), heads = x.size(2) / period;
    data = x.data<float>() + first;
  }
  int64_t rows() const { return B * T * heads; }
};

void copy(const Source& from, float* to, int64_t stride) {
  for (int64_t row = 0; row < from.rows(); ++row)
    std::memcpy(to + row * stride, from.data + row * from.period, static_cast<size_t>(from.width) * sizeof(float));
}

}  // namespace

// (x (B, T, H*period), period, first, width) -> y (B, T, H*width)
PORTLM_TVM_FUNCTION(columns) {
  return guarded("columns", args, count, [](const Call& call) {
    call.expect_count(5);
    const Source x(call, 0);
    const auto y = call.f32(4, "y", 3);
    call.expect_shape(y, {x.B, x.T, x.heads * x.width});
    copy(x, y.data<float>(), x.width);
  });
}

// (a, period, first, width, b, period, first, width) -> y (B, T, H*(width of a + width of b)), head by head
PORTLM_TVM_FUNCTION(join_columns) {
  return guarded("join_columns", args, count, [](const Call& call) {
    call.expect_count(9);
    const Source a(call, 0), b(call, 4);
    const auto y = call.f32(8, "y", 3);
    const int64_t width = a.width + b.width;
    if (a.heads != b.heads) call.fail("both must have the same number of heads");
    if (a.B != b.B || a.T != b.T) call.fail("both must have the same number of tokens");
    call.expect_shape(y, {a.B, a.T, a.heads * width});
    copy(a, y.data<float>(), width);
    copy(b, y.data<float>() + a.width, width);
  });
}
