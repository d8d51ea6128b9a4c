// Attention over a key/value cache: new queries against all positions so far. Forward only. A few queries, as
// generation has, go through cached_queries.h; many, as a prompt has, take the tiles of attention.cpp.
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
                      int64_t D) {
  if (B == 0 || T == 0 || H == 0 || D == 0) return;
  if (T >= kTiledQueries)
    return attend_to_cache(q, keys, values, batch_stride, head_stride, mask, scale, out, B, T, S, H, K, D);
  attend_in_blocks<float>(q, out, B, T, S, H, K, D, [=](int64_t b, int64_t k) {
    const int64_t head = b * batch_stride + k * head_stride;
    return Cache<float>{keys + head, values + head, nullptr, nullptr, mask ? mask + b * S : nullptr, D, scale};
  });
}

}  // namespace portlm::PORTLM_ISA
