// A few queries against all slots of a key/value cache, whose numbers are floats, or bytes with a scale for each slot.
//
// The cache is read once per block of queries that share it: the G query heads of a key/value head, and up to
// kRows of their T queries, go through it together. The softmax is online (Milakov and Gimelshein 2018), over blocks
// of kSlots positions, so nothing of length S is stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/bytes.h"
#include "cpu/parallel.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int kRows = 4;
constexpr int64_t kSlots = 64;
constexpr int kSums = Vec::N == 16 ? 16 : 8;  // vectors of sums of values: what registers there are for
constexpr int64_t kWorkPerThread = 1 << 17;  // multiply-adds that are worth waking a thread
constexpr float kHidden = -std::numeric_limits<float>::infinity();

template <typename T>
struct Cache {
  const T* keys;              // (S, D) of one head
  const T* values;            // (S, D)
  const float* key_scales;    // (S) of bytes
  const float* value_scales;  // (S)
  const int64_t* mask;        // (S), or nullptr
  int64_t D;
  float scale;
  float softcap;  // 0 for none
  int64_t row;    // numbers from slot to slot
};

template <typename T>
constexpr bool kScaled = std::is_same_v<T, int8_t>;

// One query: where it is, where its result goes, the positions [begin, limit) that it sees, and what is added to their scores.
struct Query {
  const float* q;
  float* out;
  int64_t begin, limit;
  const float* bias;  // (S), or nullptr
};

// Slots that are scored together: with R queries as many products as a vector has lanes, so that one transposition adds
// them all up.
template <int R>
constexpr int kTogether = Vec::N / (R == 3 ? 4 : R) > 1 ? Vec::N / (R == 3 ? 4 : R) : 1;

// scores[r][j + i] = q_r . key_(first + j + i) for slots i of those together; beyond the last slot it is that one's again.
template <int R, typename T>
void score_slots(const Cache<T>& cache, const Query (&query)[R], int64_t first, int64_t count, int64_t j,
                 float (&scores)[R][kSlots]) {
  constexpr int J = kTogether<R>;
  constexpr int kProducts = (R * J + Vec::N - 1) / Vec::N * Vec::N;
  const int64_t D = cache.D;
  const T* keys[J];
  for (int i = 0; i < J; ++i) keys[i] = cache.keys + (first + std::min(j + i, count - 1)) * cache.row;
  Vec dot[kProducts];
#pragma GCC unroll 16
  for (int i = 0; i < kProducts; ++i) dot[i] = Vec(0.0f);
  for_lanes(D, [&](int64_t d, auto lanes) {
    Vec q[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) q[r] = load(query[r].q + d, lanes);
#pragma GCC unroll 16
    for (int i = 0; i < J; ++i) {
      const Vec k = load(keys[i] + d, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dot[r * J + i] = fma(q[r], k, dot[r * J + i]);
    }
  });
  float totals[kProducts];
  for (int i = 0; i < kProducts; i += Vec::N) {
    Vec rows[Vec::N];
#pragma GCC unroll 16
    for (int64_t n = 0; n < Vec::N; ++n) rows[n] = dot[i + n];
    sums(rows).store(totals + i);
  }
  for (int r = 0; r < R; ++r) std::copy(totals + r * J, totals + (r + 1) * J, scores[r] + j);
}

// cap tanh(score / cap) for each of a row of scores.
inline void cap(float softcap, float* row, int64_t count) {
  for_lanes(count, [=](int64_t j, auto lanes) {
    store(tanh(load(row + j, lanes) * Vec(1.0f / softcap)) * Vec(softcap), row + j, lanes);
  });
}

// scores[r][j] = q_r . key_(first + j) * scale for j < count, or -inf where query r must not look.
template <int R, typename T>
void score(const Cache<T>& cache, const Query (&query)[R], int64_t first, int64_t count, float (&scores)[R][kSlots]) {
  for (int64_t j = 0; j < count; j += kTogether<R>) score_slots<R, T>(cache, query, first, count, j, scores);
  for (int r = 0; r < R; ++r) {
    float* const row = scores[r];
    if constexpr (kScaled<T>)
      for (int64_t j = 0; j < count; ++j) row[j] *= cache.scale * cache.key_scales[first + j];
    else
      for (int64_t j = 0; j < count; ++j) row[j] *= cache.scale;
    if (cache.softcap != 0.0f) cap(cache.softcap, row, count);
    if (query[r].bias)
      for (int64_t j = 0; j < count; ++j) row[j] += query[r].bias[first + j];
    for (int64_t j = std::min(count, query[r].begin - first); j > 0; --j) row[j - 1] = kHidden;
    for (int64_t j = std::max<int64_t>(0, query[r].limit - first); j < count; ++j) row[j] = kHidden;
    if (cache.mask)
      for (int64_t j = 0; j < count; ++j) row[j] = cache.mask[first + j] ? row[j] : kHidden;
  }
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
template <int R, int V, typename T, typename Lanes>
void add_columns(const T* values, int64_t row, int64_t D, int64_t count, const float (&weights)[R][kSlots], const float (&shrink)[R],
                 float* sums, Lanes lanes) {
  Vec a[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) a[r][v] = load(sums + r * D + v * Vec::N, lanes) * Vec(shrink[r]);
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < V; ++v) {
      const Vec value = load(values + j * row + v * Vec::N, lanes);
      for (int r = 0; r < R; ++r) a[r][v] = fma(Vec(weights[r][j]), value, a[r][v]);
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(a[r][v], sums + r * D + v * Vec::N, lanes);
}

// sums[r] = sums[r] * shrink[r] + sum over j of weights[r][j] * value_(first + j)
template <int R, typename T>
void add_values(const Cache<T>& cache, int64_t first, int64_t count, const float (&weights)[R][kSlots], const float (&shrink)[R],
                float* sums) {
  constexpr int V = std::max<int>(1, std::min<int>(64 / Vec::N, kSums / R));
  const int64_t D = cache.D;
  const T* values = cache.values + first * cache.row;
  int64_t d = 0;
  for (; d + V * Vec::N <= D; d += V * Vec::N)
    add_columns<R, V>(values + d, cache.row, D, count, weights, shrink, sums + d, Whole{});
  for_lanes(D - d, [&](int64_t i, auto lanes) {
    add_columns<R, 1>(values + d + i, cache.row, D, count, weights, shrink, sums + d + i, lanes);
  });
}

template <int R, typename T>
void attend(const Cache<T>& cache, const Query* queries, float* sums) {
  Query query[R];
  int64_t start = std::numeric_limits<int64_t>::max(), end = 0;
  for (int r = 0; r < R; ++r) {
    query[r] = queries[r];
    start = std::min(start, query[r].begin);
    end = std::max(end, query[r].limit);
  }
  float max[R], total[R], scores[R][kSlots];
  for (int r = 0; r < R; ++r) max[r] = kHidden, total[r] = 0.0f;
  std::fill(sums, sums + R * cache.D, 0.0f);
  for (int64_t first = start; first < end; first += kSlots) {
    const int64_t count = std::min(kSlots, end - first);
    score<R, T>(cache, query, first, count, scores);
    float shrink[R];
    for (int r = 0; r < R; ++r) {
      const float top = std::max(max[r], largest(scores[r], count));
      if (top == kHidden) {  // nothing seen so far but, maybe, NaN, which must reach the result
        for (int64_t j = 0; j < count; ++j)
          if (scores[r][j] != kHidden) total[r] = scores[r][j];
        std::fill(scores[r], scores[r] + count, 0.0f);
        shrink[r] = 1.0f;
        continue;
      }
      shrink[r] = max[r] == kHidden ? 0.0f : std::exp(max[r] - top);
      total[r] = total[r] * shrink[r] + exponentials(scores[r], count, top);
      max[r] = top;
    }
    if constexpr (kScaled<T>)  // from here on the weights of numbers
      for (int r = 0; r < R; ++r)
        for (int64_t j = 0; j < count; ++j) scores[r][j] *= cache.value_scales[first + j];
    add_values<R, T>(cache, first, count, scores, shrink, sums);
  }
  for (int r = 0; r < R; ++r) {
    const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];  // 0 for a query that sees nothing; NaN stays NaN
    for (int64_t d = 0; d < cache.D; ++d) query[r].out[d] = sums[r * cache.D + d] * inverse;
  }
}

template <typename T>
void attend(const Cache<T>& cache, const Query* queries, int64_t count, float* sums) {
  switch (count) {
    case 1: return attend<1, T>(cache, queries, sums);
    case 2: return attend<2, T>(cache, queries, sums);
    case 3: return attend<3, T>(cache, queries, sums);
    default: return attend<kRows, T>(cache, queries, sums);
  }
}

// Queries (B, T, H, D) that are the last T of S positions: each sees what is not behind it, and of that the last `window` if
// that is not 0.
inline auto last_queries(const float* q, float* out, int64_t T, int64_t S, int64_t H, int64_t D, int64_t window) {
  return [=](int64_t b, int64_t t, int64_t h) {
    const int64_t at = ((b * T + t) * H + h) * D, limit = S - T + t + 1;
    return Query{q + at, out + at, window ? std::max<int64_t>(0, limit - window) : 0, limit, nullptr};
  };
}

// Queries of H heads against S slots of K heads; cache_of(b, k) is what one head of one row looks at, and query_of(b, t, h)
// one query.
template <typename T, typename CacheOf, typename QueryOf>
void attend_in_blocks(int64_t B, int64_t queries_each, int64_t S, int64_t H, int64_t K, int64_t D, CacheOf cache_of,
                      QueryOf query_of) {
  const int64_t G = H / K, rows = queries_each * G, blocks = (rows + kRows - 1) / kRows;  // of one key/value head
  const int64_t work = 2 * kRows * S * D;
  parallel_for(B * K * blocks, kWorkPerThread / (work + 1) + 1, [=](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>(kRows * D));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % blocks, k = i / blocks % K, b = i / blocks / K;
      const Cache<T> cache = cache_of(b, k);
      Query queries[kRows];
      const int64_t first = block * kRows, count = std::min<int64_t>(kRows, rows - first);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t t = (first + r) / G, h = k * G + (first + r) % G;
        queries[r] = query_of(b, t, h);
      }
      attend<T>(cache, queries, count, sums.data());
    }
  });
}

}  // namespace
}  // namespace portlm::PORTLM_ISA
