// Attention over a key/value cache: new queries against all positions so far, or, forward, against all of another sequence.
// A few queries, as generation has, go through cached_queries.h; many, as a prompt has, take the tiles of attention.cpp.
#include <cstring>

#include "cpu/attention.h"
#include "cpu/cached_queries.h"
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {

void append_cache(const float* past, const float* fresh, float* present, int64_t B, int64_t K, int64_t P, int64_t T, int64_t D) {
  const int64_t S = P + T;
  parallel_for(B * K, (1 << 16) / (S * D + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / K, k = i % K;
      float* head = present + i * S * D;
      if (P > 0) std::memcpy(head, past + i * P * D, static_cast<size_t>(P * D) * sizeof(float));
      for (int64_t t = 0; t < T; ++t)
        std::memcpy(head + (P + t) * D, fresh + ((b * T + t) * K + k) * D, static_cast<size_t>(D) * sizeof(float));
    }
  });
}

void cached_attention(const float* q, const float* keys, const float* values, int64_t batch_stride, int64_t head_stride,
                      const int64_t* mask, float scale, float* out, int64_t B, int64_t T, int64_t S, int64_t H, int64_t K,
                      int64_t D, int64_t window, float softcap) {
  if (B == 0 || T == 0 || H == 0 || D == 0) return;
  if (T >= kTiledQueries)
    return attend_to_cache(q, keys, values, batch_stride, head_stride, mask, scale, out, B, T, S, H, K, D, window, softcap);
  const auto cache_of = [=](int64_t b, int64_t k) {
    const int64_t head = b * batch_stride + k * head_stride;
    return Cache<float>{keys + head, values + head, nullptr, nullptr, mask ? mask + b * S : nullptr, D, scale, softcap, D};
  };
  attend_in_blocks<float>(B, T, S, H, K, D, cache_of, last_queries(q, out, T, S, H, D, window));
}

// A few queries, of which nobody wants gradients, are what generation has here, too: cross-attention.
void masked_attention_fwd(const float* q, const float* k, const float* v, const int64_t* strides, const int64_t* mask,
                          const float* bias, int64_t bias_batch, int64_t bias_head, float* out, float* stats, int64_t B,
                          int64_t T, int64_t S, int64_t H, int64_t K, int64_t D, float scale) {
  if (B <= 0 || T <= 0 || H <= 0 || D <= 0) return;
  const bool alike = strides[3] == strides[6] && strides[4] == strides[7] && strides[5] == strides[8];
  if (S > 0 && (stats || T >= kTiledQueries || !alike))
    return attend_to_all(q, k, v, strides, mask, bias, bias_batch, bias_head, out, stats, B, T, S, H, K, D, scale);
  const int64_t q_batch = strides[0], q_row = strides[1], q_head = strides[2];
  const int64_t batch = strides[3], row = strides[4], kv_head = strides[5];
  const auto cache_of = [=](int64_t b, int64_t kv) {
    const int64_t head = b * batch + kv * kv_head;
    return Cache<float>{k + head, v + head, nullptr, nullptr, mask ? mask + b * S : nullptr, D, scale, 0.0f, row};
  };
  const auto query_of = [=](int64_t b, int64_t t, int64_t h) {
    return Query{q + b * q_batch + t * q_row + h * q_head, out + ((b * T + t) * H + h) * D, 0, S,
                 bias ? bias + b * bias_batch + h * bias_head + t * S : nullptr};
  };
  attend_in_blocks<float>(B, T, S, H, K, D, cache_of, query_of);
}

}  // namespace portlm::PORTLM_ISA
