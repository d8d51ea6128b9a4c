// Attention over the key/value cache as a TVM-FFI function, output last (destination passing).
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "tvm/call.h"

using portlm::kernels;
using portlm::tvm::Any;
using portlm::tvm::Call;
using portlm::tvm::guarded;

namespace {

using portlm::tvm::Tensor;

// The queries of all tokens side by side, as kernels want them: columns [first, first + H*D) of source, which may hold keys
// and values beside them.
class Queries {
 public:
  Queries(const Call& call, const Tensor& source, int64_t width) : q_(source.data<float>() + call.integer(1, "first")) {
    const int64_t rows = source.size(0) * source.size(1), W = source.size(2);
    call.expect_columns(source, call.integer(1, "first"), width);
    if (W == width || rows <= 1) return;
    gathered_.reset(new float[static_cast<size_t>(rows * width)]);
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(gathered_.get() + row * width, q_ + row * W, static_cast<size_t>(width) * sizeof(float));
    q_ = gathered_.get();
  }
  const float* data() const { return q_; }

 private:
  const float* q_;
  std::unique_ptr<float[]> gathered_;
};

// Two tensors (B, K, S, D) are laid out alike, and the slots of a head lie without gaps.
void expect_slots(const Call& call, const Tensor& keys, const Tensor& values, int64_t B, int64_t K, int64_t S, int64_t D) {
  call.expect_shape(keys, {B, K, S, D});
  call.expect_same_shape(keys, values);
  if (keys.stride(3) != 1 || keys.stride(2) != D || values.stride(3) != 1 || values.stride(2) != D)
    call.fail("keys and values must hold the slots of a head without gaps");
  if (values.stride(0) != keys.stride(0) || values.stride(1) != keys.stride(1))
    call.fail("keys and values must be laid out alike");
}

}  // namespace

// (source (B, T, W), first, keys (B, K, S, D), values (B, K, S, D), mask (B, S) int64, H, K, scale) -> out (B, T, H*D)
//
// The queries are columns [first, first + H*D) of source. Query i sees slot j iff j <= S - T + i and mask[b, j] != 0. keys
// and values may be views of a longer buffer, as append_cache returns them: the heads may be further apart than S slots.
PORTLM_TVM_FUNCTION(cached_attention) {
  return guarded("cached_attention", args, count, [](const Call& call) {
    call.expect_count(9);
    const auto source = call.f32(0, "source", 3), out = call.f32(8, "out", 3);
    const auto keys = call.strided_f32(2, "keys", 4), values = call.strided_f32(3, "values", 4);
    const auto mask = call.i64(4, "mask", 2);
    const int64_t H = call.integer(5, "num_heads"), K = call.integer(6, "num_kv_heads");
    const int64_t B = source.size(0), T = source.size(1), S = keys.size(2), D = keys.size(3);
    if (K < 1 || H < 1 || H % K != 0) call.fail("num_kv_heads must divide num_heads");
    expect_slots(call, keys, values, B, K, S, D);
    call.expect_shape(mask, {B, S});
    call.expect_shape(out, {B, T, H * D});
    if (S < T) call.fail("there must be at least as many slots as queries");
    const Queries q(call, source, H * D);
    kernels().cached_attention(q.data(), keys.data<float>(), values.data<float>(), keys.stride(0), keys.stride(1),
                               mask.data<int64_t>(), call.real(7, "scale"), out.data<float>(), B, T, S, H, K, D);
  });
}

// (source, first, keys int8, key_scales (B, K, S, 1), values int8, value_scales, mask, H, K, scale) -> out
//
// The same over a cache of bytes and their scales, as append_bytes and append_byte_scales return them.
PORTLM_TVM_FUNCTION(quantized_attention) {
  return guarded("quantized_attention", args, count, [](const Call& call) {
    call.expect_count(11);
    const auto source = call.f32(0, "source", 3), out = call.f32(10, "out", 3);
    const auto keys = call.strided_i8(2, "keys", 4), values = call.strided_i8(4, "values", 4);
    const auto key_scales = call.strided_f32(3, "key_scales", 4), value_scales = call.strided_f32(5, "value_scales", 4);
    const auto mask = call.i64(6, "mask", 2);
    const int64_t H = call.integer(7, "num_heads"), K = call.integer(8, "num_kv_heads");
    const int64_t B = source.size(0), T = source.size(1), S = keys.size(2), D = keys.size(3);
    if (K < 1 || H < 1 || H % K != 0) call.fail("num_kv_heads must divide num_heads");
    expect_slots(call, keys, values, B, K, S, D);
    expect_slots(call, key_scales, value_scales, B, K, S, 1);
    call.expect_shape(mask, {B, S});
    call.expect_shape(out, {B, T, H * D});
    if (S < T) call.fail("there must be at least as many slots as queries");
    const Queries q(call, source, H * D);
    kernels().quantized_attention(q.data(), keys.data<int8_t>(), key_scales.data<float>(), values.data<int8_t>(),
                                  value_scales.data<float>(), keys.stride(0), keys.stride(1), key_scales.stride(0),
                                  key_scales.stride(1), mask.data<int64_t>(), call.real(9, "scale"), out.data<float>(), B, T, S,
                                  H, K, D);
  });
}
