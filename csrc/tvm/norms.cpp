// Normalisation as TVM-FFI functions, outputs last (destination passing).
#include "cpu/kernels.h"
#include "tvm/call.h"

using portlm::kernels;
using portlm::tvm::Call;
using portlm::tvm::guarded;

// (x (..., C), weight (C), bias (C), epsilon) -> y (..., C)
PORTLM_TVM_FUNCTION(layer_norm) {
  return guarded("layer_norm", args, count, [](const Call& call) {
    call.expect_count(5);
    const auto x = call.f32(0, "x"), weight = call.f32(1, "weight", 1), bias = call.f32(2, "bias", 1), y = call.f32(4, "y");
    const int64_t C = x.size(-1);
    call.expect_shape(weight, {C});
    call.expect_shape(bias, {C});
    call.expect_same_shape(x, y);
    kernels().layer_norm_fwd(x.data<float>(), nullptr, weight.data<float>(), bias.data<float>(), call.real(3, "epsilon"),
                             y.data<float>(), nullptr, nullptr, nullptr, x.rows(), C);
  });
}

// (x (..., C), residual (..., C), weight (C), bias (C), epsilon) -> y (..., C), h = x + residual (..., C)
PORTLM_TVM_FUNCTION(add_layer_norm) {
  return guarded("add_layer_norm", args, count, [](const Call& call) {
    call.expect_count(7);
    const auto x = call.f32(0, "x"), residual = call.f32(1, "residual"), weight = call.f32(2, "weight", 1),
               bias = call.f32(3, "bias", 1), y = call.f32(5, "y"), h = call.f32(6, "h");
    const int64_t C = x.size(-1);
    call.expect_same_shape(x, residual);
    call.expect_shape(weight, {C});
    call.expect_shape(bias, {C});
    call.expect_same_shape(x, y);
    call.expect_same_shape(x, h);
    kernels().layer_norm_fwd(x.data<float>(), residual.data<float>(), weight.data<float>(), bias.data<float>(),
                             call.real(4, "epsilon"), y.data<float>(), h.data<float>(), nullptr, nullptr, x.rows(), C);
  });
}

// (x (..., C), weight (C), epsilon) -> y (..., C)
PORTLM_TVM_FUNCTION(rms_norm) {
  return guarded("rms_norm", args, count, [](const Call& call) {
    call.expect_count(4);
    const auto x = call.f32(0, "x"), weight = call.f32(1, "weight", 1), y = call.f32(3, "y");
    call.expect_shape(weight, {x.size(-1)});
    call.expect_same_shape(x, y);
    kernels().rms_norm_fwd(x.data<float>(), nullptr, weight.data<float>(), call.real(2, "epsilon"), y.data<float>(),
                           nullptr, nullptr, x.rows(), x.size(-1));
  });
}

// (x (..., C), residual (..., C), weight (C), epsilon) -> y (..., C), h = x + residual (..., C)
PORTLM_TVM_FUNCTION(add_rms_norm) {
  return guarded("add_rms_norm", args, count, [](const Call& call) {
    call.expect_count(6);
    const auto x = call.f32(0, "x"), residual = call.f32(1, "residual"), weight = call.f32(2, "weight", 1),
               y = call.f32(4, "y"), h = call.f32(5, "h");
    call.expect_same_shape(x, residual);
    call.expect_shape(weight, {x.size(-1)});
    call.expect_same_shape(x, y);
    call.expect_same_shape(x, h);
    kernels().rms_norm_fwd(x.data<float>(), residual.data<float>(), weight.data<float>(), call.real(3, "epsilon"),
                           y.data<float>(), h.data<float>(), nullptr, x.rows(), x.size(-1));
  });
}
