// Attention as cuda/kernels.def lists it: each call is described once, and handed to what serves it.
#include "cuda/attention.cuh"

#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

Attention with_bias(Attention a, const int64_t* mask, const void* bias, int64_t bias_batch, int64_t bias_head) {
  a.mask = mask;
  a.bias = bias;
  a.bias_batch = bias_batch;
  a.bias_head = bias_head;
  return a;
}

Attention with_order(Attention a, bool causal, int64_t window, float softcap) {
  a.causal = causal;
  a.window = window < a.S ? size_of(window) : 0;  // one that hides nothing
  a.softcap = softcap;
  return a;
}

Gradients gradients_of(const void* dout, const void* out, const float* stats, void* dq, void* dk, void* dv,
                       const int64_t* strides, float* delta, float* dbias, int64_t dbias_batch) {
  return {dout,
          out,
          stats,
          dq,
          dk,
          dv,
          {strides[0], strides[1], strides[2]},
          {strides[3], strides[4], strides[5]},
          {strides[6], strides[7], strides[8]},
          delta,
          dbias,
          dbias_batch};
}

}  // namespace

void attention_fwd(const void* q, const void* k, const void* v, const int64_t* strides, void* out, float* stats, int64_t B,
                   int64_t T, int64_t H, int64_t K, int64_t D, int causal, float scale, int64_t window, float softcap,
                   bool is_bfloat16, uintptr_t stream) {
  const Attention a = attention_of(q, k, v, strides, B, T, T, H, K, D, scale, is_bfloat16);
  attend_in_tiles(with_order(a, causal != 0, window, softcap), out, stats, stream);
}

void attention_bwd(const void* dout, const void* q, const void* k, const void* v, const int64_t* strides, const void* out,
                   const float* stats, void* dq, void* dk, void* dv, const int64_t* grad_strides, float* delta, int64_t B,
                   int64_t T, int64_t H, int64_t K, int64_t D, int causal, float scale, int64_t window, float softcap,
                   bool is_bfloat16, uintptr_t stream) {
  const Attention a = attention_of(q, k, v, strides, B, T, T, H, K, D, scale, is_bfloat16);
  differentiate_in_tiles(with_order(a, causal != 0, window, softcap),
                         gradients_of(dout, out, stats, dq, dk, dv, grad_strides, delta, nullptr, 0), stream);
}

void masked_attention_fwd(const void* q, const void* k, const void* v, const int64_t* strides, const int64_t* mask,
                          const void* bias, int64_t bias_batch, int64_t bias_head, void* out, float* stats, int64_t B,
                          int64_t T, int64_t S, int64_t H, int64_t K, int64_t D, float scale, bool is_bfloat16,
                          uintptr_t stream) {
  const Attention a = attention_of(q, k, v, strides, B, T, S, H, K, D, scale, is_bfloat16);
  const Attention biased = with_bias(a, mask, bias, bias_batch, bias_head);
  if (!stats && T <= kFewQueries)
    attend_in_parts(biased, out, nullptr, 1, stream);
  else
    attend_in_tiles(biased, out, stats, stream);
}

void masked_attention_bwd(const void* dout, const void* q, const void* k, const void* v, const int64_t* strides,
                          const int64_t* mask, const void* bias, int64_t bias_batch, int64_t bias_head, const void* out,
                          const float* stats, void* dq, void* dk, void* dv, const int64_t* grad_strides, float* delta,
                          float* dbias, int64_t dbias_batch, int64_t B, int64_t T, int64_t S, int64_t H, int64_t K, int64_t D,
                          float scale, bool is_bfloat16, uintptr_t stream) {
  const Attention a = attention_of(q, k, v, strides, B, T, S, H, K, D, scale, is_bfloat16);
  differentiate_in_tiles(with_bias(a, mask, bias, bias_batch, bias_head),
                         gradients_of(dout, out, stats, dq, dk, dv, grad_strides, delta, dbias, dbias_batch), stream);
}

void cached_attention(const void* q, const void* keys, const void* values, int64_t batch_stride, int64_t head_stride,
                      const int64_t* mask, float scale, void* out, int64_t B, int64_t T, int64_t S, int64_t H, int64_t K,
                      int64_t D, int64_t window, float softcap, float* partial, int64_t parts, bool is_bfloat16,
                      uintptr_t stream) {
  const int64_t strides[] = {T * H * D, H * D, D, batch_stride, D, head_stride, batch_stride, D, head_stride};
  Attention a = with_order(attention_of(q, keys, values, strides, B, T, S, H, K, D, scale, is_bfloat16), true, window, softcap);
  a.mask = mask;
  if (T <= kFewQueries)
    attend_in_parts(a, out, partial, parts, stream);
  else
    attend_in_tiles(a, out, nullptr, stream);
}

}  // namespace portlm::cuda
