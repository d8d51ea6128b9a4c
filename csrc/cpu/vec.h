// A vector of floats as wide as this compilation's registers, so that each kernel is written once.
//
// Vec<float> in everything but name: load, store, partial load/store for tails, arithmetic, reductions. One vec_*.h per
// instruction set defines it; here is what they share. The scalar build has width 1 and runs the same polynomials, so
// testing it tests the mathematics of the wide ones.
#pragma once

#include <cstdint>

#if defined(PORTLM_ISA_AVX512)
#include "cpu/vec_avx512.h"
#elif defined(PORTLM_ISA_AVX2)
#include "cpu/vec_avx2.h"
#elif defined(PORTLM_ISA_NEON)
#include "cpu/vec_neon.h"
#else
#include "cpu/vec_scalar.h"
#endif

namespace portlm::PORTLM_ISA {

// Of the functions that are defined per instruction set:
//   keep(a, lanes)               lanes that do not exist become 0, so that sums may include them
//   split_exponent(a, exponent)  for 0 < a < inf: the mantissa in [1, 2), with a = mantissa * 2^exponent
//   sums(rows)                   of N vectors: the sum of rows[i] in lane i, added in the same order for each
//   SquareSum                    sums squares in float64

inline Vec keep(Vec a, Whole) { return a; }
inline Vec load(const float* p, Whole) { return Vec::load(p); }
inline Vec load(const float* p, First lanes) { return Vec::load(p, lanes.n); }
inline void store(Vec a, float* p, Whole) { a.store(p); }
inline void store(Vec a, float* p, First lanes) { a.store(p, lanes.n); }

inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// Calls body(i, lanes) for i = 0, N, 2N, ... below size; lanes is Whole, or First in a last vector that is not full.
template <typename Body>
inline void for_lanes(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + Vec::N <= size; i += Vec::N) body(i, Whole{});
  if (i < size) body(i, First{size - i});
}

// Sums K quantities over one row: terms(i, lanes) returns a Sums<K> of K vectors, which `keep` has cleared of lanes
// that do not exist.
//
// The additions form a tree: four accumulators, which hide the latency of an addition, are closed after 16 turns.
// So the error grows as 16 + size / (64 N) and not as size / N, which is what width-1 vectors would give.
template <int K>
struct Sums {
  Vec v[K];
};

template <int K, typename Terms>
inline void row_sums(int64_t size, float (&out)[K], Terms terms) {
  constexpr int64_t kTurn = 4 * Vec::N, kBlock = 16 * kTurn;
  Vec total[K];
  for (int k = 0; k < K; ++k) total[k] = Vec(0.0f);
  int64_t i = 0;
  while (i + kTurn <= size) {
    const int64_t end = i + kBlock < size ? i + kBlock : size;
    Sums<K> a = terms(i, Whole{}), b = terms(i + Vec::N, Whole{});
    Sums<K> c = terms(i + 2 * Vec::N, Whole{}), d = terms(i + 3 * Vec::N, Whole{});
    for (i += kTurn; i + kTurn <= end; i += kTurn) {
      const Sums<K> p = terms(i, Whole{}), q = terms(i + Vec::N, Whole{});
      const Sums<K> r = terms(i + 2 * Vec::N, Whole{}), s = terms(i + 3 * Vec::N, Whole{});
      for (int k = 0; k < K; ++k) {
        a.v[k] += p.v[k];
        b.v[k] += q.v[k];
        c.v[k] += r.v[k];
        d.v[k] += s.v[k];
      }
    }
    for (int k = 0; k < K; ++k) total[k] += (a.v[k] + b.v[k]) + (c.v[k] + d.v[k]);
  }
  for_lanes(size - i, [&](int64_t j, auto lanes) {
    const Sums<K> p = terms(i + j, lanes);
    for (int k = 0; k < K; ++k) total[k] += p.v[k];
  });
  for (int k = 0; k < K; ++k) out[k] = sum(total[k]);
}

// Calls whole(i) for each whole vector and tail(i, n) once for the n < N floats that are left: for_lanes for bodies
// that differ.
template <typename Whole, typename Tail>
inline void for_each_vec(int64_t size, Whole whole, Tail tail) {
  int64_t i = 0;
  for (; i + Vec::N <= size; i += Vec::N) whole(i);
  if (i < size) tail(i, size - i);
}

}  // namespace portlm::PORTLM_ISA
