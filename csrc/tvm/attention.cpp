// Attention over the key/value cache as a TVM-FFI function, output last (destination passing).
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "tvm/call.h"

using portlm::kernels;
using portlm::tvm::Any;
using portlm::tvm::Call;
using portlm::tvm::guarded;

// (source (B, T, W), first, keys (B, K, S, D), values (B, K, S, D), mask (B, S) int64, H, K, scale) -> out (B, T, H*D)
//
// The queries are columns [first, first + H*D) of source, which may hold keys and values beside them. Query i sees slot
// j iff j <= S - T + i and mask[b, j] != 0. keys and values may be views of a longer buffer, as append_cache returns
// them: the slots of one head lie without gaps, the heads may be further apart.
PORTLM_TVM_FUNCTION(cached_attention) {
  return guarded("cached_attention", args, count, [](const Call& call) {
    call.expect_count(9);
    const auto source = call.f32(0, "source", 3), out = call.f32(8, "out", 3);
    const auto keys = call.strided_f32(2, "keys", 4), values = call.strided_f32(3, "values", 4);
    const auto mask = call.i64(4, "mask", 2);
    const int64_t first = call.integer(1, "first");
    const int64_t H = call.integer(5, "num_heads"), K = call.integer(6, "num_kv_heads");
    const int64_t B = source.size(0), T = source.size(1), W = source.size(2), S = keys.size(2), D = keys.size(3);
    if (K < 1 || H < 1 || H % K != 0) call.fail("num_kv_heads must divide num_heads");
    call.expect_columns(source, first, H * D);
    call.expect_shape(keys, {B, K, S, D});
    call.expect_same_shape(keys, values);
    call.expect_shape(mask, {B, S});
    call.expect_shape(out, {B, T, H * D});
    if (S < T) call.fail("there must be at least as many slots as queries");
    const int64_t batch_stride = keys.stride(0), head_stride = keys.stride(1);
    if (keys.stride(3) != 1 || keys.stride(2) != D || values.stride(3) != 1 || values.stride(2) != D)
      call.fail("keys and values must hold the slots of a head without gaps");
    if (values.stride(0) != batch_stride || values.stride(1) != head_stride)
      call.fail("keys and values must be laid out alike");
    const float* q = source.data<float>() + first;
    std::unique_ptr<float[]> gathered;  // the kernel wants the queries of all tokens side by side
    if (W != H * D && B * T > 1) {
      gathered.reset(new float[static_cast<size_t>(B * T * H * D)]);
      for (int64_t row = 0; row < B * T; ++row)
        std::memcpy(gathered.get() + row * H * D, q + row * W, static_cast<size_t>(H * D) * sizeof(float));
      q = gathered.get();
    }
    kernels().cached_attention(q, keys.data<float>(), values.data<float>(), batch_stride, head_stride,
                               mask.data<int64_t>(), call.real(7, "scale"), out.data<float>(), B, T, S, H, K, D);
  });
}
