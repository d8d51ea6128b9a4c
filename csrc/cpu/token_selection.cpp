// Choosing the next token. core/ops/token_selection.py is the definition; this gives the same token, bit for bit.
//
// Weights are whole numbers whose sums are exact, so they may be added in any order, and nothing is sorted: the k-th
// largest logit comes from a buffer with a rising bound, the edge of the nucleus from a radix selection over three
// digits of an order-preserving key. O(V) whatever the logits; compute bound by the exponential.
#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/logits.h"
#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kBlock = 1024;            // tokens whose weight is taken together
constexpr int64_t kSpan = 64;               // tokens skipped together when all lie below a bound
constexpr int64_t kGrain = 1 << 15;         // logits below which a second thread costs more than it brings
constexpr int kDigitShift[] = {21, 10, 0};  // 11, 11 and 10 bits
constexpr uint32_t kDigitMask[] = {2047, 2047, 1023};
__extension__ typedef unsigned __int128 uint128;

// Larger for larger floats; the same for -0 and +0. value_of undoes it.
uint32_t key_of(float x) {
  const auto bits = bits_of<uint32_t>(x + 0.0f);
  return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}
float value_of(uint32_t key) { return bits_of<float>(key ^ ((0u - (1u - (key >> 31))) | 0x80000000u)); }

// First word of Philox4x64-10 (Salmon et al. 2011) for key (seed, 0) and counter (step, row, 0, 0), as u in [0, 1).
double random_unit(uint64_t seed, uint64_t row, uint64_t step) {
  uint64_t c0 = step, c1 = row, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint128 p0 = uint128{0xD2E7470EE14C6C93u} * c0, p1 = uint128{0xCA5A826395121157u} * c2;
    c0 = static_cast<uint64_t>(p1 >> 64) ^ c1 ^ k0;
    c1 = static_cast<uint64_t>(p1);
    c2 = static_cast<uint64_t>(p0 >> 64) ^ c3 ^ k1;
    c3 = static_cast<uint64_t>(p0);
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  return static_cast<double>(c0 >> 11) * 0x1p-53;
}

// w[i] = rint(2^scale exp((row[i] - top) / temperature)). Adding 2^52 rounds, and leaves the number in the low bits.
void weigh(const float* row, int64_t n, float top, double temperature, int scale, int64_t* w) {
  constexpr double kWhole = 0x1p52;
  const double high = top;
  double x[kExpBlock];
  for (int64_t begin = 0; begin < n; begin += kExpBlock) {
    const int64_t size = std::min(kExpBlock, n - begin);
    for (int64_t i = 0; i < size; ++i) {
      const double quotient = (static_cast<double>(row[begin + i]) - high) / temperature;
      x[i] = quotient > -64.0 ? quotient : -64.0;
    }
    for (int64_t i = 0; i < size; ++i)
      w[begin + i] = bits_of<int64_t>(scaled_exp(x[i], scale) + kWhole) - bits_of<int64_t>(kWhole);
  }
}

// Calls visit(i) for every i with row[i] >= bound(), in ascending order; skips what lies below a span at a time.
template <typename Bound, typename Visit>
void visit_at_least(const float* row, int64_t V, Bound bound, Visit visit) {
  for (int64_t begin = 0; begin < V; begin += kSpan) {
    const int64_t size = std::min(kSpan, V - begin);
    Vec most(-kInf);
    float m = -kInf;
    for_each_vec(
        size, [&](int64_t i) { most = max(Vec::load(row + begin + i), most); },
        [&](int64_t i, int64_t n) {
          for (int64_t j = begin + i; j < begin + i + n; ++j) m = std::max(m, row[j]);
        });
    if (std::max(m, hmax(most)) < bound()) continue;
    for (int64_t i = begin; i < begin + size; ++i)
      if (row[i] >= bound()) visit(i);
  }
}

// The k-th largest of V >= k logits. buffer holds V floats. Each time it has k more than it needs it is cut to the k
// largest, which raises the bound for those to come: O(V) whatever the order.
float kth_largest(const float* row, int64_t V, int64_t k, float* buffer) {
  const int64_t capacity = std::min(V, 2 * k + kBlock);
  int64_t n = 0;
  float bound = -kInf;
  const auto keep_largest = [&] {
    std::nth_element(buffer, buffer + k - 1, buffer + n, [](float a, float b) { return a > b; });
    bound = buffer[k - 1];
    n = k;
  };
  visit_at_least(row, V, [&] { return bound; }, [&](int64_t i) {
    buffer[n++] = row[i];
    if (n == capacity) keep_largest();
  });
  keep_largest();
  return bound;
}

// The smallest logit in the nucleus: taken from the largest down, weights add up to `enough` when it is reached.
// open lists the n candidates, and is overwritten with those that share ever more digits of the answer.
float nucleus_edge(const float* logits, const int64_t* w, int64_t* open, int64_t n, int64_t enough) {
  int64_t taken = 0;
  uint32_t key = 0;
  for (int digit = 0; digit < 3; ++digit) {
    int64_t weight[2048] = {};
    const int shift = kDigitShift[digit];
    const uint32_t mask = kDigitMask[digit];
    for (int64_t i = 0; i < n; ++i) weight[(key_of(logits[open[i]]) >> shift) & mask] += w[open[i]];
    uint32_t value = mask;
    while (value > 0 && taken + weight[value] < enough) taken += weight[value--];
    key |= value << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      open[kept] = open[i];
      kept += ((key_of(logits[open[i]]) >> shift) & mask) == value;
    }
    n = kept;
  }
  return value_of(key);
}

// Scratch of one thread. Not initialised: every element is written before it is read.
struct Scratch {
  explicit Scratch(int64_t V) : weights(new int64_t[V]), open(new int64_t[V]), ids(new int64_t[V]), logits(new float[V]) {}
  std::unique_ptr<int64_t[]> weights, open, ids;
  std::unique_ptr<float[]> logits;
};

int64_t sample(const float* row, int64_t V, float top, double temperature, int64_t top_k, double top_p, double min_p,
               double u, Scratch& s) {
  int scale = 52;
  while ((int64_t{1} << (52 - scale)) < V) --scale;
  const float* logits = row;  // of the n tokens still in the running, whose ids are s.ids if top_k chose them
  int64_t n = V;
  const bool chosen = top_k > 0 && top_k < V;
  if (chosen) {
    const float bound = kth_largest(row, V, top_k, s.logits.get());
    n = 0;
    visit_at_least(row, V, [=] { return bound; }, [&](int64_t i) { s.ids[n] = i, s.logits[n++] = row[i]; });
    logits = s.logits.get();
  }
  int64_t* w = s.weights.get();
  weigh(logits, n, top, temperature, scale, w);
  if (top_p < 1.0) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += w[i];
    // Weights are whole numbers, so reaching top_p * total is reaching the next whole number.
    const auto enough = static_cast<int64_t>(std::ceil(top_p * static_cast<double>(total)));
    // All tokens lighter than 1/n of what may stay outside are outside together.
    const int64_t heavy = (total - enough + n - 1) / n;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      s.open[count] = i;
      count += w[i] >= heavy;
    }
    const float edge = nucleus_edge(logits, w, s.open.get(), count, enough);
    for (int64_t i = 0; i < n; ++i) w[i] = logits[i] < edge ? 0 : w[i];
  }
  if (min_p > 0.0) {
    const auto least = static_cast<int64_t>(std::ceil(min_p * static_cast<double>(int64_t{1} << scale)));
    for (int64_t i = 0; i < n; ++i) w[i] = w[i] < least ? 0 : w[i];
  }
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += w[i];
  auto target = static_cast<int64_t>(u * static_cast<double>(total));
  int64_t i = 0;
  for (; i + kBlock < n; i += kBlock) {
    int64_t block = 0;
    for (int64_t j = i; j < i + kBlock; ++j) block += w[j];
    if (block > target) break;
    target -= block;
  }
  while (w[i] <= target) target -= w[i++];
  return chosen ? s.ids[i] : i;
}

}  // namespace

void select_tokens(const float* logits, int64_t rows, int64_t V, double temperature, int64_t top_k, double top_p,
                   double min_p, const uint64_t* seeds, const uint64_t* streams, uint64_t step, int64_t* tokens) {
  parallel_for(rows, kGrain / V + 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(temperature > 0.0 ? V : 0);
    for (int64_t r = begin; r < end; ++r) {
      const float* row = logits + r * V;
      const Largest top = largest(row, V);
      tokens[r] = top.id < 0 || temperature == 0.0
                      ? top.id
                      : sample(row, V, top.value, temperature, top_k, top_p, min_p, random_unit(seeds[r], streams[r], step), scratch);
    }
  });
}

}  // namespace portlm::PORTLM_ISA
