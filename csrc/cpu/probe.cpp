// What this machine allows, measured with the same threads and registers as the kernels: memory bandwidth and
// arithmetic. Benchmarks print it beside what they reach; nothing else uses it.
#include <chrono>
#include <cstddef>
#include <memory>
#include <vector>

#include "cpu/gemm_bf16.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int kPasses = 4;  // the best of these counts: whatever disturbs a pass only makes it slower

template <typename Pass>
double best_seconds(Pass pass) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (int i = 0; i < kPasses; ++i) {
    const auto start = Clock::now();
    pass();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = seconds < best ? seconds : best;
  }
  return best;
}

// An array whose pages each thread touched first where it will use them.
std::unique_ptr<float[]> touched(int64_t n) {
  std::unique_ptr<float[]> memory(new float[static_cast<size_t>(n)]);
  parallel_for(n, 1, [p = memory.get()](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t i, auto lanes) { store(Vec(1.0f), p + begin + i, lanes); });
  });
  return memory;
}

int threads() { return threads_for(int64_t{1} << 40, 1); }

// Keeps a result alive that nothing reads.
volatile float g_sink;

}  // namespace

double probe_bandwidth(int64_t bytes) {
  const int64_t n = bytes / 4;
  const auto memory = touched(n);
  std::vector<float> sums(static_cast<size_t>(threads()));
  const double seconds = best_seconds([&] {
    parallel_for(n, 1, [&sums, n, p = memory.get()](int64_t begin, int64_t end) {
      float total[1];
      row_sums<1>(end - begin, total, [p = p + begin](int64_t i, auto lanes) { return Sums<1>{{load(p + i, lanes)}}; });
      sums[static_cast<size_t>((begin * static_cast<int64_t>(sums.size()) + n - 1) / n)] = total[0];  // by thread
    });
    g_sink = sums[0];
  });
  return static_cast<double>(4 * n) / seconds;
}

double probe_triad(int64_t bytes) {
  const int64_t n = bytes / 12;
  const auto x = touched(n), y = touched(n), z = touched(n);
  const double seconds = best_seconds([&] {
    parallel_for(n, 1, [x = x.get(), y = y.get(), z = z.get()](int64_t begin, int64_t end) {
      for_lanes(end - begin, [=](int64_t j, auto lanes) {
        const int64_t i = begin + j;
        store(fma(load(y + i, lanes), Vec(0.5f), load(x + i, lanes)), z + i, lanes);
      });
    });
    g_sink = z[0];
  });
  return static_cast<double>(12 * n) / seconds;
}

double probe_flops(int64_t turns) {
  // 12 chains: more than latency times throughput of any core so far, and few enough for 16 registers.
  constexpr int kChains = 12;
  const int count = threads();
  std::vector<float> sums(static_cast<size_t>(count));
  const double seconds = best_seconds([&] {
    parallel_for(count, 1, [&sums, turns](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        Vec chain[kChains];
        for (int k = 0; k < kChains; ++k) chain[k] = Vec(static_cast<float>(k));
        const Vec a(0.999f), b(0.001f);
        for (int64_t turn = 0; turn < turns / kPasses; ++turn) {
#pragma GCC unroll 12
          for (int k = 0; k < kChains; ++k) chain[k] = fma(chain[k], a, b);
        }
        Vec total(0.0f);
        for (int k = 0; k < kChains; ++k) total += chain[k];
        sums[static_cast<size_t>(t)] = sum(total);
      }
    });
    g_sink = sums[0];
  });
  return 2.0 * kChains * Vec::N * static_cast<double>(turns / kPasses) * count / seconds;
}

double probe_bf16(int64_t turns) {
  const int count = threads();
  const Bf16Tiles& tiles = bf16_tiles();
  std::vector<float> sums(static_cast<size_t>(count));
  const double seconds = best_seconds([&] {
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) sums[static_cast<size_t>(t)] = tiles.chains(turns / kPasses);
    });
    g_sink = sums[0];
  });
  return tiles.turn_flops * static_cast<double>(turns / kPasses) * count / seconds;
}

}  // namespace portlm::PORTLM_ISA
