// Attention over a key/value cache: new queries against all positions so far. Forward only. Here for a few queries,
// as generation has; many, as a prompt has, take the tiles of attention.cpp.
//
// The cache is read once per block of queries that share it: the G query heads of a key/value head, and up to
// kRows of their T queries, go through it together. The softmax is online (Milakov and Gimelshein 2018), over blocks
// of kSlots positions, so nothing of length S is stored.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int kRows = 4;
constexpr int64_t kSlots = 64;
constexpr int64_t kWorkPerThread = 1 << 17;  // multiply-adds that are worth waking a thread
constexpr float kHidden = -std::numeric_limits<float>::infinity();

struct Cache {
  const float* keys;    // (S, D) of one head
  const float* values;  // (S, D)
  const int64_t* mask;  // (S), or nullptr
  int64_t D;
  float scale;
};

// One query: where it is, where its result goes, and the number of positions before which it sees.
struct Query {
  const float* q;
  float* out;
  int64_t limit;
};

// scores[r][j] = q_r . key_(first + j) * scale for J slots from j on, or -inf where query r must not look.
template <int R, int J>
void score_slots(const Cache& cache, const Query (&query)[R], int64_t first, int64_t j, float (&scores)[R][kSlots]) {
  const int64_t D = cache.D;
  const float* const keys = cache.keys + (first + j) * D;
  Vec dot[R][J];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < J; ++i) dot[r][i] = Vec(0.0f);
  for_lanes(D, [&](int64_t d, auto lanes) {
    Vec k[J];
    for (int i = 0; i < J; ++i) k[i] = load(keys + i * D + d, lanes);
    for (int r = 0; r < R; ++r) {
      const Vec q = load(query[r].q + d, lanes);
      for (int i = 0; i < J; ++i) dot[r][i] = fma(q, k[i], dot[r][i]);
    }
  });
  for (int i = 0; i < J; ++i) {
    const int64_t slot = first + j + i;
    const bool present = !cache.mask || cache.mask[slot] != 0;
    for (int r = 0; r < R; ++r)
      scores[r][j + i] = present && slot < query[r].limit ? sum(dot[r][i]) * cache.scale : kHidden;
  }
}

// Several slots at once: their sums are chains that hide each other, and a query is loaded once for all of them.
template <int R>
void score(const Cache& cache, const Query (&query)[R], int64_t first, int64_t count, float (&scores)[R][kSlots]) {
  constexpr int J = R == 1 ? 4 : 2;
  int64_t j = 0;
  for (; j + J <= count; j += J) score_slots<R, J>(cache, query, first, j, scores);
  for (; j < count; ++j) score_slots<R, 1>(cache, query, first, j, scores);
}

// The largest of a row, NaN aside.
float largest(const float* row, int64_t count) {
  Vec most(kHidden);
  float rest = kHidden;
  for_each_vec(
      count, [&](int64_t j) { most = max(Vec::load(row + j), most); },
      [&](int64_t j, int64_t n) {
        for (int64_t i = j; i < j + n; ++i) rest = std::max(rest, row[i]);
      });
  return std::max(rest, hmax(most));
}

// Turns a row of scores into exp(score - max), in place, and returns their sum.
float exponentials(float* row, int64_t count, float max) {
  Vec total(0.0f);
  float rest = 0.0f;
  for_each_vec(
      count,
      [&](int64_t j) {
        const Vec s = Vec::load(row + j), e = where_lt(s, Vec(-1e30f), Vec(0.0f), exp(s - Vec(max)));
        e.store(row + j);
        total += e;
      },
      [&](int64_t j, int64_t n) {
        const Vec s = Vec::load(row + j, n), e = where_lt(s, Vec(-1e30f), Vec(0.0f), exp(s - Vec(max)));
        e.store(row + j, n);
        for (int64_t i = j; i < j + n; ++i) rest += row[i];
      });
  return sum(total) + rest;
}

// V vectors of columns of add_values. Each is a chain of additions, slot after slot, and V of them hide each other.
template <int R, int V, typename Lanes>
void add_columns(const float* values, int64_t D, int64_t count, const float (&weights)[R][kSlots], const float (&shrink)[R],
                 float* sums, Lanes lanes) {
  Vec a[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) a[r][v] = load(sums + r * D + v * Vec::N, lanes) * Vec(shrink[r]);
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < V; ++v) {
      const Vec value = load(values + j * D + v * Vec::N, lanes);
      for (int r = 0; r < R; ++r) a[r][v] = fma(Vec(weights[r][j]), value, a[r][v]);
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(a[r][v], sums + r * D + v * Vec::N, lanes);
}

// sums[r] = sums[r] * shrink[r] + sum over j of weights[r][j] * value_(first + j)
template <int R>
void add_values(const Cache& cache, int64_t first, int64_t count, const float (&weights)[R][kSlots], const float (&shrink)[R],
                float* sums) {
  constexpr int V = std::max<int>(1, std::min<int>(8, 64 / Vec::N) / R);
  const int64_t D = cache.D;
  const float* values = cache.values + first * D;
  int64_t d = 0;
  for (; d + V * Vec::N <= D; d += V * Vec::N) add_columns<R, V>(values + d, D, count, weights, shrink, sums + d, Whole{});
  for_lanes(D - d, [&](int64_t i, auto lanes) {
    add_columns<R, 1>(values + d + i, D, count, weights, shrink, sums + d + i, lanes);
  });
}

template <int R>
void attend(const Cache& cache, const Query* queries, float* sums) {
  Query query[R];
  int64_t end = 0;
  for (int r = 0; r < R; ++r) {
    query[r] = queries[r];
    end = std::max(end, query[r].limit);
  }
  float max[R], total[R], scores[R][kSlots];
  for (int r = 0; r < R; ++r) max[r] = kHidden, total[r] = 0.0f;
  std::fill(sums, sums + R * cache.D, 0.0f);
  for (int64_t first = 0; first < end; first += kSlots) {
    const int64_t count = std::min(kSlots, end - first);
    score<R>(cache, query, first, count, scores);
    float shrink[R];
    for (int r = 0; r < R; ++r) {
      const float top = std::max(max[r], largest(scores[r], count));
      if (top == kHidden) {  // nothing seen so far
        std::fill(scores[r], scores[r] + count, 0.0f);
        shrink[r] = 1.0f;
        continue;
      }
      shrink[r] = max[r] == kHidden ? 0.0f : std::exp(max[r] - top);
      total[r] = total[r] * shrink[r] + exponentials(scores[r], count, top);
      max[r] = top;
    }
    add_values<R>(cache, first, count, scores, shrink, sums);
  }
  for (int r = 0; r < R; ++r) {
    const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];  // 0 for a query that sees nothing; NaN stays NaN
    for (int64_t d = 0; d < cache.D; ++d) query[r].out[d] = sums[r * cache.D + d] * inverse;
  }
}

void attend(const Cache& cache, const Query* queries, int64_t count, float* sums) {
  switch (count) {
    case 1: return attend<1>(cache, queries, sums);
    case 2: return attend<2>(cache, queries, sums);
    case 3: return attend<3>(cache, queries, sums);
    default: return attend<kRows>(cache, queries, sums);
  }
}

}  // namespace

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
  const int64_t G = H / K, rows = T * G, blocks = (rows + kRows - 1) / kRows;  // of one key/value head
  const int64_t work = 2 * kRows * S * D;
  parallel_for(B * K * blocks, kWorkPerThread / (work + 1) + 1, [=](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>(kRows * D));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % blocks, k = i / blocks % K, b = i / blocks / K;
      const int64_t head = b * batch_stride + k * head_stride;
      const Cache cache{keys + head, values + head, mask ? mask + b * S : nullptr, D, scale};
      Query queries[kRows];
      const int64_t first = block * kRows, count = std::min<int64_t>(kRows, rows - first);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t t = (first + r) / G, h = k * G + (first + r) % G;
        const int64_t at = ((b * T + t) * H + h) * D;
        queries[r] = {q + at, out + at, S - T + t + 1};
      }
      attend(cache, queries, count, sums.data());
    }
  });
}

}  // namespace portlm::PORTLM_ISA
