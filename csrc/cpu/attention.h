// Attention of many queries over a key/value cache, for cached_attention.cpp, and of many over all keys.
#pragma once

#include <cstdint>

namespace portlm::PORTLM_ISA {

// As cached_attention in kernels.def. It packs keys and values for register tiles, which about kTiledQueries queries
// outweigh.
constexpr int64_t kTiledQueries = 16;
void attend_to_cache(const float* q, const float* keys, const float* values, int64_t batch_stride, int64_t head_stride,
                     const int64_t* mask, float scale, float* out, int64_t B, int64_t T, int64_t S, int64_t H, int64_t K,
                     int64_t D, int64_t window, float softcap);
// As masked_attention_fwd in kernels.def.
void attend_to_all(const float* q, const float* k, const float* v, const int64_t* strides, const int64_t* mask, const float* bias,
                   int64_t bias_batch, int64_t bias_head, float* out, float* stats, int64_t B, int64_t T, int64_t S, int64_t H,
                   int64_t K, int64_t D, float scale);

}  // namespace portlm::PORTLM_ISA
