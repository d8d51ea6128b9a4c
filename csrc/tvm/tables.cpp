// Look-ups in tables, whose places are checked, as TVM-FFI functions.
#include <string>

#include "cpu/kernels.h"
#include "tvm/call.h"

using portlm::kernels;
using portlm::tvm::Call;
using portlm::tvm::guarded;

// (ids (B, T) int64, weight (V, C)) -> y (B, T, C)
PORTLM_TVM_FUNCTION(embedding) {
  return guarded("embedding", args, count, [](const Call& call) {
    call.expect_count(3);
    const auto ids = call.i64(0, "ids", 2);
    const auto weight = call.f32(1, "weight", 2), y = call.f32(2, "y", 3);
    const int64_t V = weight.size(0), C = weight.size(1);
    call.expect_shape(y, {ids.size(0), ids.size(1), C});
    const int64_t wrong = kernels().embedding_fwd(ids.data<int64_t>(), weight.data<float>(), y.data<float>(),
                                                  ids.elements(), V, C);
    if (wrong >= 0)
      call.fail("ids must be from 0 to " + std::to_string(V - 1) + ", got " + std::to_string(ids.data<int64_t>()[wrong]));
  });
}

// (x (B, T, H*D), positions (B, T) int64, cos (context, D/2), sin (context, D/2), num_heads) -> y (B, T, H*D)
PORTLM_TVM_FUNCTION(rotary) {
  return guarded("rotary", args, count, [](const Call& call) {
    call.expect_count(6);
    const auto x = call.f32(0, "x", 3), cos = call.f32(2, "cos", 2), sin = call.f32(3, "sin", 2), y = call.f32(5, "y", 3);
    const auto positions = call.i64(1, "positions", 2);
    const int64_t H = call.integer(4, "num_heads"), D = 2 * cos.size(1), tokens = x.size(0) * x.size(1);
    call.expect_shape(x, {positions.size(0), positions.size(1), H * D});
    call.expect_same_shape(cos, sin);
    call.expect_same_shape(x, y);
    for (int64_t i = 0; i < tokens; ++i)
      if (positions.data<int64_t>()[i] < 0 || positions.data<int64_t>()[i] >= cos.size(0))
        call.fail("positions must be from 0 to " + std::to_string(cos.size(0) - 1) + ", got " +
                  std::to_string(positions.data<int64_t>()[i]));
    kernels().rotary_fwd(x.data<float>(), H * D, cos.data<float>(), sin.data<float>(), positions.data<int64_t>(),
                         y.data<float>(), tokens, tokens, H, D, 0);
  });
}
