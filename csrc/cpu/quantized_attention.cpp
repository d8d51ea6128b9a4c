// Attention over a key/value cache of bytes, each slot of a head with a scale of its own. The query stays float32, and a
// scale multiplies the score or the weight of its slot, not D numbers.
#include <memory>

#include "cpu/attention.h"
#include "cpu/bytes.h"
#include "cpu/cached_queries.h"
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers that are worth waking a thread

// What S slots of K heads mean, (K, S, D) without gaps.
void widen(const int8_t* cache, const float* scales, int64_t head_stride, int64_t scales_head_stride, float* out, int64_t K,
           int64_t S, int64_t D) {
  parallel_for(K * S, kGrain / (D + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int8_t* const slot = cache + i / S * head_stride + i % S * D;
      const Vec scale(scales[i / S * scales_head_stride + i % S]);
      for_lanes(D, [&](int64_t d, auto lanes) { store(load(slot + d, lanes) * scale, out + i * D + d, lanes); });
    }
  });
}

}  // namespace

void append_bytes(const float* fresh, int64_t fresh_stride, int8_t* cache, int64_t batch_stride, int64_t head_stride,
                  float* scales, int64_t scales_batch_stride, int64_t scales_head_stride, int64_t B, int64_t K, int64_t P,
                  int64_t T, int64_t D) {
  parallel_for(B * K * T, kGrain / (D + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % K, t = i / K % T, b = i / K / T;
      const float* const x = fresh + (b * T + t) * fresh_stride + k * D;
      const float scale = byte_scale(x, D);
      if (cache) to_bytes(x, scale, cache + b * batch_stride + k * head_stride + (P + t) * D, D);
      if (scales) scales[b * scales_batch_stride + k * scales_head_stride + P + t] = scale;
    }
  });
}

void quantized_attention(const float* q, const int8_t* keys, const float* key_scales, const int8_t* values,
                         const float* value_scales, int64_t batch_stride, int64_t head_stride, int64_t scales_batch_stride,
                         int64_t scales_head_stride, const int64_t* mask, float scale, float* out, int64_t B, int64_t T,
                         int64_t S, int64_t H, int64_t K, int64_t D, int64_t window, float softcap) {
  if (B == 0 || T == 0 || H == 0 || D == 0) return;
  if (T < kTiledQueries) {
    const auto cache_of = [=](int64_t b, int64_t k) {
      const int64_t head = b * batch_stride + k * head_stride, slot = b * scales_batch_stride + k * scales_head_stride;
      return Cache<int8_t>{keys + head,
                           values + head,
                           key_scales + slot,
                           value_scales + slot,
                           mask ? mask + b * S : nullptr,
                           D,
                           scale,
                           softcap,
                           D};
    };
    return attend_in_blocks<int8_t>(B, T, S, H, K, D, cache_of, last_queries(q, out, T, S, H, D, window));
  }
  // The tiles take floats: one row of the batch at a time, so that they are few beside the cache.
  const std::unique_ptr<float[]> wide(new float[static_cast<size_t>(2 * K * S * D)]);
  float *const wide_keys = wide.get(), *const wide_values = wide_keys + K * S * D;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t row = b * batch_stride, slots = b * scales_batch_stride, at = b * T * H * D;
    widen(keys + row, key_scales + slots, head_stride, scales_head_stride, wide_keys, K, S, D);
    widen(values + row, value_scales + slots, head_stride, scales_head_stride, wide_values, K, S, D);
    attend_to_cache(q + at, wide_keys, wide_values, K * S * D, S * D, mask ? mask + b * S : nullptr, scale, out + at, 1, T, S, H,
                    K, D, window, softcap);
  }
}

}  // namespace portlm::PORTLM_ISA
