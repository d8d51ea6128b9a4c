// What this machine allows, measured with the same threads and registers as the kernels: memory bandwidth and
// arithmetic. Benchmarks print it beside what they reach; nothing else uses it.
#include "cpu/probe.h"

#include "cpu/gemm_bf16.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

// Each page of an array is touched first by the thread that will use it.
void touch(float* p, int64_t n) {
  parallel_for(n, 1, [p](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t i, auto lanes) { store(Vec(1.0f), p + begin + i, lanes); });
  });
}

// The sum of n floats, read as so many streams, each of which is asked for `ahead` floats before it is read, if not 0.
template <int kStreams, int kAhead>
float sum_streams(const float* p, int64_t n) {
  constexpr int kTurn = 8 / kStreams;
  constexpr int64_t kLine = 16;  // floats
  constexpr int64_t kStep = kTurn * Vec::N > kLine ? kTurn * Vec::N : kLine;
  const int64_t each = n / kStreams / kStep * kStep;
  Vec total[kStreams][kTurn];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s)
#pragma GCC unroll 8
    for (int k = 0; k < kTurn; ++k) total[s][k] = Vec(0.0f);
  for (int64_t i = 0; i < each; i += kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const float* const from = p + s * each + i;
      if constexpr (kAhead > 0)
        for (int64_t j = 0; j < kStep; j += kLine) __builtin_prefetch(from + j + kAhead, 0, 2);
      for (int64_t j = 0; j < kStep; j += kTurn * Vec::N)
#pragma GCC unroll 8
        for (int k = 0; k < kTurn; ++k) total[s][k] += Vec::load(from + j + k * Vec::N);
    }
  }
  Vec all(0.0f);
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s)
#pragma GCC unroll 8
    for (int k = 0; k < kTurn; ++k) all += total[s][k];
  for_lanes(n - kStreams * each, [&](int64_t i, auto lanes) { all += load(p + kStreams * each + i, lanes); });
  return sum(all);
}

}  // namespace

double probe_bandwidth(int64_t bytes) {
  // One stream is what the processor foresees best; with four, and asking, cores differ less. The fastest is the limit.
  float (*const ways[])(const float* p, int64_t n) = {sum_streams<1, 0>, sum_streams<4, 0>, sum_streams<4, 256>};
  const int64_t n = bytes / 4;
  const FreshPages memory(bytes);
  touch(memory.floats(), n);
  double best = 0.0;
  for (const auto way : ways) {
    const double seconds = best_seconds([n, way, p = memory.floats()] {
      parallel_for(n, 1, [p, way](int64_t begin, int64_t end) { keep_result(way(p + begin, end - begin)); });
    });
    const double rate = static_cast<double>(4 * n) / seconds;
    best = rate > best ? rate : best;
  }
  return best;
}

double probe_triad(int64_t bytes) {
  const int64_t n = bytes / 12;
  const FreshPages x(4 * n), y(4 * n), z(4 * n);
  touch(x.floats(), n);
  touch(y.floats(), n);
  touch(z.floats(), n);
  const double seconds = best_seconds([&] {
    parallel_for(n, 1, [x = x.floats(), y = y.floats(), z = z.floats()](int64_t begin, int64_t end) {
      for_lanes(end - begin, [=](int64_t j, auto lanes) {
        const int64_t i = begin + j;
        store(fma(load(y + i, lanes), Vec(0.5f), load(x + i, lanes)), z + i, lanes);
      });
    });
  });
  keep_result(n > 0 ? z.floats()[0] : 0.0f);
  return static_cast<double>(12 * n) / seconds;
}

double probe_flops(int64_t turns) {
  // 12 chains: more than latency times throughput of any core so far, and few enough for 16 registers.
  constexpr int kChains = 12;
  const int64_t each = turns / kPasses;
  const int threads = probe_threads();
  const double seconds = best_seconds([=] {
    parallel_for(threads, 1, [=](int64_t, int64_t) {
      Vec chain[kChains];
      for (int k = 0; k < kChains; ++k) chain[k] = Vec(static_cast<float>(k));
      const Vec a(0.999f), b(0.001f);
      for (int64_t turn = 0; turn < each; ++turn) {
#pragma GCC unroll 12
        for (int k = 0; k < kChains; ++k) chain[k] = fma(chain[k], a, b);
      }
      Vec total(0.0f);
      for (int k = 0; k < kChains; ++k) total += chain[k];
      keep_result(sum(total));
    });
  });
  return 2.0 * kChains * Vec::N * static_cast<double>(each) * threads / seconds;
}

double probe_bf16(int64_t turns) {
  const Bf16Tiles& tiles = bf16_tiles();
  const int64_t each = turns / kPasses;
  const int threads = probe_threads();
  const double seconds = best_seconds([&] {
    parallel_for(threads, 1, [&](int64_t, int64_t) {
      const HeldBf16Tiles held(tiles);
      keep_result(tiles.chains(each));
    });
  });
  return tiles.turn_flops * static_cast<double>(each) * threads / seconds;
}

}  // namespace portlm::PORTLM_ISA
