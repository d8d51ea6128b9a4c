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

int64_t window(const Call& call, int32_t i) {
  const int64_t window = call.integer(i, "window");
  if (window < 0) call.fail("window must not be negative");
  return window;
}

// (q (B, T, H*D), k (B, S, K*D), v (B, S, K*D), mask (B, S) int64, bias (H or 1, T, S) or with B or 1 in front, H, K, D, the
// bias's number of axes, scale) -> out (B, T, H*D), without the mask or the bias if it has none.
void attend_to_all(const Call& call, bool masked, bool biased) {
  call.expect_count(9 + masked + biased);
  const int32_t after = 3 + masked + biased;
  const auto q = call.f32(0, "q", 3), k = call.f32(1, "k", 3), v = call.f32(2, "v", 3), out = call.f32(after + 5, "out", 3);
  const int64_t H = call.integer(after, "num_heads"), K = call.integer(after + 1, "num_kv_heads");
  const int64_t D = call.integer(after + 2, "head_dim"), B = q.size(0), T = q.size(1), S = k.size(1);
  if (K < 1 || H < 1 || H % K != 0) call.fail("num_kv_heads must divide num_heads");
  constexpr int64_t kMost = int64_t{1} << 31;
  if (D < 1 || D >= kMost || H >= kMost) call.fail("the heads have no width");
  call.expect_shape(q, {B, T, H * D});
  call.expect_shape(k, {B, S, K * D});
  call.expect_same_shape(k, v);
  call.expect_same_shape(q, out);
  const int64_t* mask = nullptr;
  if (masked) {
    const auto given = call.i64(3, "mask", 2);
    call.expect_shape(given, {B, S});
    mask = given.data<int64_t>();
  }
  const float* bias = nullptr;
  int64_t bias_batch = 0, bias_head = 0;
  if (biased) {
    const auto given = call.f32(3 + masked, "bias");
    const int32_t axes = given.ndim();
    const int64_t heads = axes >= 3 ? given.size(-3) : 0, rows = axes == 4 ? given.size(0) : 1;
    if (axes < 3 || axes > 4 || (heads != 1 && heads != H) || (rows != 1 && rows != B) || given.size(-2) != T || given.size(-1) != S)
      call.fail("bias must be (H or 1, T, S), got " + portlm::tvm::shape_text(given.raw().shape, axes));
    bias = given.data<float>();
    bias_head = heads == 1 ? 0 : T * S;
    bias_batch = rows == 1 ? 0 : heads * T * S;
  }
  const int64_t strides[] = {T * H * D, H * D, D, S * K * D, K * D, D, S * K * D, K * D, D};
  kernels().masked_attention_fwd(q.data<float>(), k.data<float>(), v.data<float>(), strides, mask, bias, bias_batch, bias_head,
                                 out.data<float>(), nullptr, B, T, S, H, K, D, call.real(after + 4, "scale"));
}

}  // namespace

PORTLM_TVM_FUNCTION(masked_attention) {
  return guarded("masked_attention", args, count, [](const Call& call) { attend_to_all(call, true, true); });
}
PORTLM_TVM_FUNCTION(masked_attention_no_mask) {
  return guarded("masked_attention_no_mask", args, count, [](const Call& call) { attend_to_all(call, false, true); });
}
PORTLM_TVM_FUNCTION(masked_attention_no_bias) {
  return guarded("masked_attention_no_bias", args, count, [](const Call& call) { attend_to_all(call, true, false); });
}
PORTLM_TVM_FUNCTION(masked_attention_no_mask_no_bias) {
  return guarded("masked_attention_no_mask_no_bias", args, count, [](const Call& call) { attend_to_all(call, false, false); });
}

// (source (B, T, W), first, keys (B, K, S, D), values (B, K, S, D), mask (B, S) int64, H, K, scale) -> out (B, T, H*D)
//
// Or, with a window or a soft cap, both behind scale: 0 for none. The queries are columns [first, first + H*D) of source. Query
// i sees slot j iff j <= S - T + i, mask[b, j] != 0 and j is one of the last of a window that ends with the query. keys and values may be views of a longer buffer, as append_cache returns them: the heads may be further apart than S slots.
PORTLM_TVM_FUNCTION(cached_attention) {
  return guarded("cached_attention", args, count, [](const Call& call) {
    const bool bounded = call.count() == 11;
    if (!bounded) call.expect_count(9);
    const auto source = call.f32(0, "source", 3), out = call.f32(call.count() - 1, "out", 3);
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
                               mask.data<int64_t>(), call.real(7, "scale"), out.data<float>(), B, T, S, H, K, D,
                               bounded ? window(call, 8) : 0, bounded ? call.real(9, "softcap") : 0.0f);
  });
}

// (source, first, keys int8, key_scales (B, K, S, 1), values int8, value_scales, mask, H, K, scale) -> out
//
// The same over a cache of bytes and their scales, as append_bytes and append_byte_scales return them.
PORTLM_TVM_FUNCTION(quantized_attention) {
  return guarded("quantized_attention", args, count, [](const Call& call) {
    const bool bounded = call.count() == 13;
    if (!bounded) call.expect_count(11);
    const auto source = call.f32(0, "source", 3), out = call.f32(call.count() - 1, "out", 3);
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
                                  H, K, D, bounded ? window(call, 10) : 0, bounded ? call.real(11, "softcap") : 0.0f);
  });
}
