// Cross-entropy of a linear head without the (N, V) logits: loss and both gradients, a chunk of rows at a time.
//
// Compute bound: three products of 2 N C V operations each. So the logits are computed once, not again for the
// gradients, and a chunk has enough rows to outweigh the two readings of the weight and the update of its gradient
// that each chunk costs. A chunk's logits lie transposed, (V, rows): then each product takes the weight, its gradient
// and the logits as they lie, packs little but x, and the softmax runs along vectors, one lane per row of x.
//
// The vocabulary is cut into slabs that a thread keeps in its L2 cache. Exponentials are taken against the largest
// logit of the slab and corrected by a factor per slab once the largest of all is known (Milakov and Gimelshein 2018),
// so each logit costs one exponential. Chunks, slabs and the order of all sums depend on the sizes alone: results are
// the same, bit for bit, for every number of threads.
//
// With operands rounded to bfloat16 the exponentials of a chunk are kept that way, too, which is half the memory; their sums,
// the loss and the probability of the target, from which 1 is taken, are of float32.
#include <algorithm>
#include <limits>
#include <memory>

#include "cpu/gemm_bf16.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {
namespace {

constexpr int64_t kLogits = 1 << 18;   // floats of logits at a time, 1 MB, unless the rows would be fewer than
constexpr int64_t kLeastRows = 128;    // these,
constexpr int64_t kManyRows = 256;     // or these, if four chunks or more remain: 6 % faster for 50257 x 768
constexpr int64_t kMostRows = 1024;    // beyond, nothing is gained
constexpr int64_t kSlab = 1 << 16;     // floats of logits in a slab
constexpr int64_t kSlabs = 4;          // slabs are a multiple of this, so that few threads get equal shares
constexpr int64_t kLane = 16;          // rows are padded to whole vectors of the widest instruction set
constexpr int64_t kBlock = 64;         // terms added up before they join the total, which bounds the rounding error

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a problem is cut.
struct Plan {
  int64_t rows;   // of x in a chunk
  int64_t ld;     // floats between two rows of the transposed logits
  int64_t slab;   // rows of the weight in a slab
  int64_t slabs;
};

// Twice as many rows, in the same memory, if `half`: products that take half the time pack as much. Where they take much less,
// twice as many again, and two chunks are enough: what is left is reading the weight and its gradient.
Plan plan(int64_t N, int64_t V, bool half) {
  const bool fast = half && bf16_tiles().rate > 128;
  const int64_t least = std::clamp(N / (fast ? 2 : 4), kLeastRows, (fast ? 4 : half ? 2 : 1) * kManyRows);
  const int64_t most = std::clamp((half ? 2 : 1) * kLogits / V, least, kMostRows);
  Plan p;
  p.rows = std::min(N, ceil_div(ceil_div(N, ceil_div(N, most)), 2 * kLane) * 2 * kLane);
  p.ld = kLane * (ceil_div(p.rows, kLane) | 1);  // an odd number of cache lines: columns do not fall into few sets
  const int64_t slabs = ceil_div(V, std::max<int64_t>((half ? 2 : 1) * kSlab / p.ld, 1));
  p.slab = ceil_div(V, slabs == 1 ? 1 : ceil_div(slabs, kSlabs) * kSlabs);
  p.slabs = ceil_div(V, p.slab);
  return p;
}

// Calls body(slab, first row of the weight, number of rows) for every slab: a slab per thread at a time or, if there
// are fewer slabs than threads, one after the other with all threads on each.
template <typename Body>
void for_slabs(const Plan& p, int64_t V, Body body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) body(s, s * p.slab, std::min(p.slab, V - s * p.slab));
  };
  if (p.slabs < threads_for(INT64_MAX, 1))
    run(0, p.slabs);
  else
    parallel_for(p.slabs, 1, run);
}

// For K vectors of columns of a slab (count, ld): the largest logit of each column and the sum of e^(logit - largest).
// With Keep the logits become those exponentials.
template <int K, bool Keep, typename Lanes>
inline void exponentials(float* logits, int64_t count, int64_t ld, Lanes lanes, float* largest, float* total) {
  // Not -inf as the start: a column of -inf then gives exponentials of 0, and not of -inf + inf.
  Vec most[K], sum[K];
  for (int k = 0; k < K; ++k) most[k] = Vec(std::numeric_limits<float>::lowest()), sum[k] = Vec(0.0f);
  for (int64_t v = 0; v < count; ++v)
    for (int k = 0; k < K; ++k) most[k] = max(load(logits + v * ld + k * Vec::N, lanes), most[k]);
  for (int64_t block = 0; block < count; block += kBlock) {
    Vec part[K];
    for (int k = 0; k < K; ++k) part[k] = Vec(0.0f);
    for (int64_t v = block; v < std::min(block + kBlock, count); ++v)
      for (int k = 0; k < K; ++k) {
        float* const at = logits + v * ld + k * Vec::N;
        const Vec e = exp(load(at, lanes) - most[k]);  // NaN stays NaN, although max passed over it
        if (Keep) store(e, at, lanes);
        part[k] += e;
      }
    for (int k = 0; k < K; ++k) sum[k] += part[k];
  }
  for (int k = 0; k < K; ++k) {
    store(most[k], largest + k * Vec::N, lanes);
    store(sum[k], total + k * Vec::N, lanes);
  }
}

template <bool Keep>
void exponentials_of_slab(float* logits, int64_t count, int64_t ld, int64_t rows, float* largest, float* total) {
  constexpr int64_t kWide = 4 * Vec::N;  // four columns of vectors hide the latency of one exponential
  parallel_for(ceil_div(rows, kWide), kElementwiseGrain / (count * kWide) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t j = begin * kWide; j < std::min(end * kWide, rows); j += kWide) {
      if (j + kWide <= rows) {
        exponentials<4, Keep>(logits + j, count, ld, Whole{}, largest + j, total + j);
      } else {
        for_lanes(rows - j, [=](int64_t i, auto lanes) {
          exponentials<1, Keep>(logits + j + i, count, ld, lanes, largest + j + i, total + j + i);
        });
      }
    }
  });
}

// Turns the slabs' statistics (slabs, ld) into the loss of each row, which replaces the logit of its target, and
// `largest` into the factors that make probabilities * scale of the exponentials.
void combine(const Plan& p, int64_t rows, float scale, float* largest, const float* total, float* correct) {
  for_lanes(rows, [=](int64_t j, auto lanes) {
    Vec most(std::numeric_limits<float>::lowest()), sum(0.0f);
    for (int64_t s = 0; s < p.slabs; ++s) most = max(load(largest + s * p.ld + j, lanes), most);
    for (int64_t s = 0; s < p.slabs; ++s) {
      const Vec shift = exp(load(largest + s * p.ld + j, lanes) - most);
      sum = fma(load(total + s * p.ld + j, lanes), shift, sum);
      store(shift, largest + s * p.ld + j, lanes);
    }
    const Vec factor = Vec(scale) / sum;
    for (int64_t s = 0; s < p.slabs; ++s)
      store(load(largest + s * p.ld + j, lanes) * factor, largest + s * p.ld + j, lanes);
    store(log(sum) + (most - load(correct + j, lanes)), correct + j, lanes);
  });
}

// `rows` rows of x (rows, C) with their targets, whose gradients go to dx (rows, C) and are added to dweight (V, C), or
// make it if `first`. Either may be nullptr. Scratch: logits (V, ld), not used if there are no gradients; largest and
// total (slabs, ld); correct (ld). With operands rounded to bfloat16, rounded_x (rows, C) and halves (V, ld) for the logits,
// and else nullptr.
struct Chunk {
  const float* x;
  const int64_t* targets;
  float* dx;
  float* dweight;
  float *logits, *largest, *total, *correct;
  uint16_t *rounded_x, *halves;
  int64_t rows;
  bool first;
  char *columns_of_x, *rows_of_x;  // rounded_x packed, for the logits and for the weight's gradient
};

// Returns the sum of the chunk's losses. `scale` is the factor of the gradients.
double run(const Chunk& c, const Plan& p, const float* weight, int64_t C, int64_t V, float scale) {
  const bool gradients = c.dx || c.dweight;
  for_slabs(p, V, [&](int64_t s, int64_t v0, int64_t count) {
    thread_local Scratch scratch;
    float* const logits = gradients ? c.logits + v0 * p.ld : scratch.floats(p.slab * p.ld);
    multiply({weight + v0 * C, c.x, nullptr, logits, count, c.rows, C, C, C, p.ld, false, true, false});
    for (int64_t r = 0; r < c.rows; ++r)
      if (c.targets[r] >= v0 && c.targets[r] < v0 + count) c.correct[r] = logits[(c.targets[r] - v0) * p.ld + r];
    float *const largest = c.largest + s * p.ld, *const total = c.total + s * p.ld;
    if (gradients)
      exponentials_of_slab<true>(logits, count, p.ld, c.rows, largest, total);
    else
      exponentials_of_slab<false>(logits, count, p.ld, c.rows, largest, total);
  });
  combine(p, c.rows, scale, c.largest, c.total, c.correct);
  double loss = 0.0;
  for (int64_t r = 0; r < c.rows; ++r) loss += static_cast<double>(c.correct[r]);
  if (!gradients) return loss;
  for_slabs(p, V, [&](int64_t s, int64_t v0, int64_t count) {
    float* const logits = c.logits + v0 * p.ld;
    const float* const factor = c.largest + s * p.ld;
    parallel_for(count, kElementwiseGrain / c.rows + 1, [=](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v)
        for_lanes(c.rows, [=](int64_t j, auto lanes) {
          store(load(logits + v * p.ld + j, lanes) * load(factor + j, lanes), logits + v * p.ld + j, lanes);
        });
    });
    for (int64_t r = 0; r < c.rows; ++r)
      if (c.targets[r] >= v0 && c.targets[r] < v0 + count) logits[(c.targets[r] - v0) * p.ld + r] -= scale;
    if (c.dweight)
      multiply({logits, c.x, nullptr, c.dweight + v0 * C, count, C, c.rows, p.ld, C, C, false, false, !c.first});
  });
  if (c.dx) multiply({c.logits, weight, nullptr, c.dx, c.rows, C, V, p.ld, C, C, true, false, false});
  return loss;
}

// The same with operands rounded to bfloat16.
double run_bf16(const Chunk& c, const Plan& p, const float* weight, int64_t C, int64_t V, float scale) {
  const Bf16Tiles& tiles = bf16_tiles();
  const bool gradients = c.dx || c.dweight;
  parallel_for(c.rows, kElementwiseGrain / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    tiles.round(c.x + begin * C, c.rounded_x + begin * C, (end - begin) * C);
  });
  pack_bf16(turned(c.rounded_x, C), C, c.rows, c.columns_of_x);
  if (c.dweight) pack_bf16(rows_of(c.rounded_x, C), c.rows, C, c.rows_of_x);
  for_slabs(p, V, [&](int64_t s, int64_t v0, int64_t count) {
    thread_local Scratch scratch;
    float* const logits = scratch.floats(p.slab * p.ld);
    multiply_bf16({rows_of(weight + v0 * C, C), turned(c.rounded_x, C), nullptr, logits, count, c.rows, C, p.ld, false, nullptr,
                   c.columns_of_x});
    for (int64_t r = 0; r < c.rows; ++r)
      if (c.targets[r] >= v0 && c.targets[r] < v0 + count) c.correct[r] = logits[(c.targets[r] - v0) * p.ld + r];
    float *const largest = c.largest + s * p.ld, *const total = c.total + s * p.ld;
    if (!gradients) return exponentials_of_slab<false>(logits, count, p.ld, c.rows, largest, total);
    exponentials_of_slab<true>(logits, count, p.ld, c.rows, largest, total);
    for (int64_t v = 0; v < count; ++v) tiles.round(logits + v * p.ld, c.halves + (v0 + v) * p.ld, c.rows);
  });
  combine(p, c.rows, scale, c.largest, c.total, c.correct);
  double loss = 0.0;
  for (int64_t r = 0; r < c.rows; ++r) loss += static_cast<double>(c.correct[r]);
  if (!gradients) return loss;
  // from here on what the gradient is at the target: (probability - 1) scale
  for_lanes(c.rows, [&](int64_t j, auto lanes) {
    store((exp(Vec(0.0f) - load(c.correct + j, lanes)) - Vec(1.0f)) * Vec(scale), c.correct + j, lanes);
  });
  for_slabs(p, V, [&](int64_t s, int64_t v0, int64_t count) {
    uint16_t* const halves = c.halves + v0 * p.ld;
    const float* const factor = c.largest + s * p.ld;
    parallel_for(count, kElementwiseGrain / c.rows + 1, [&](int64_t begin, int64_t end) {
      float row[kMostRows];
      for (int64_t v = begin; v < end; ++v) {
        widen(halves + v * p.ld, row, c.rows);
        for_lanes(c.rows, [&](int64_t j, auto lanes) { store(load(row + j, lanes) * load(factor + j, lanes), row + j, lanes); });
        tiles.round(row, halves + v * p.ld, c.rows);
      }
    });
    for (int64_t r = 0; r < c.rows; ++r)
      if (c.targets[r] >= v0 && c.targets[r] < v0 + count)
        tiles.round(c.correct + r, halves + (c.targets[r] - v0) * p.ld + r, 1);
    if (c.dweight)
      multiply_bf16({rows_of(halves, p.ld), rows_of(c.rounded_x, C), nullptr, c.dweight + v0 * C, count, C, c.rows, C, !c.first,
                     nullptr, c.rows_of_x});
  });
  if (c.dx) multiply_bf16({turned(c.halves, p.ld), rows_of(weight, C), nullptr, c.dx, c.rows, C, V, C, false});
  return loss;
}

int64_t cross_entropy(bool half, const float* x, const float* weight, const int64_t* targets, float* loss, float* dx,
                      float* dweight, int64_t N, int64_t C, int64_t V, int64_t ignore_index, int mean) {
  // Not a vector: its growth is a template of the standard library, of which the linker would keep one copy for all
  // instruction sets.
  const std::unique_ptr<int64_t[]> kept(new int64_t[N]);  // the first `count` are the rows that count
  int64_t count = 0;
  for (int64_t i = 0; i < N; ++i) {
    if (targets[i] == ignore_index) continue;
    if (targets[i] < 0 || targets[i] >= V) return i;
    kept[count++] = i;
  }
  if (dx && count < N) std::fill(dx, dx + N * C, 0.0f);
  if (dweight && count == 0) std::fill(dweight, dweight + V * C, 0.0f);
  const float scale = mean ? 1.0f / static_cast<float>(count) : 1.0f;
  double total = 0.0;
  if (count > 0) {
    const Plan p = plan(count, V, half);
    const bool gather = count < N;  // leave out the rows that do not count: they would cost as much as the others
    const int64_t kept_logits = dx || dweight ? V * p.ld : 0, statistics = p.slabs * p.ld;
    const int64_t logits = half ? kLane * ceil_div(kept_logits, 2 * kLane) : kept_logits;
    const int64_t rounded = half ? kLane * ceil_div(p.rows * C, 2 * kLane) : 0;
    const int64_t gathered = gather ? p.rows * C : 0;
    const int64_t columns = half ? packed_bytes_bf16(C, p.rows) / 4 : 0, deep = half ? packed_bytes_bf16(p.rows, C) / 4 : 0;
    thread_local Scratch scratch, packed;
    float* const memory = scratch.floats(logits + 2 * statistics + p.ld + rounded + 2 * gathered);
    char* const packed_x = reinterpret_cast<char*>(packed.floats(columns + deep));
    float* const largest = memory + logits;
    float* const correct = largest + 2 * statistics;
    float* const rounded_x = correct + p.ld;
    float *const some_x = rounded_x + rounded, *const some_dx = some_x + gathered;
    const std::unique_ptr<int64_t[]> some_targets(new int64_t[gather ? p.rows : 0]);
    for (int64_t begin = 0; begin < count; begin += p.rows) {
      const int64_t rows = std::min(p.rows, count - begin);
      Chunk c{x + begin * C, targets + begin, dx ? dx + begin * C : nullptr, dweight, memory, largest,
              largest + statistics, correct, reinterpret_cast<uint16_t*>(rounded_x), reinterpret_cast<uint16_t*>(memory), rows,
              begin == 0, packed_x, packed_x + 4 * columns};
      if (gather) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = kept[begin + r];
          std::copy(x + row * C, x + (row + 1) * C, some_x + r * C);
          some_targets[r] = targets[row];
        }
        c.x = some_x, c.targets = some_targets.get(), c.dx = dx ? some_dx : nullptr;
      }
      total += half ? run_bf16(c, p, weight, C, V, scale) : run(c, p, weight, C, V, scale);
      if (gather && dx)
        for (int64_t r = 0; r < rows; ++r) std::copy(some_dx + r * C, some_dx + (r + 1) * C, dx + kept[begin + r] * C);
    }
  }
  *loss = static_cast<float>(mean ? total / static_cast<double>(count) : total);  // the mean of nothing is NaN
  return -1;
}

}  // namespace

int64_t linear_cross_entropy(const float* x, const float* weight, const int64_t* targets, float* loss, float* dx,
                             float* dweight, int64_t N, int64_t C, int64_t V, int64_t ignore_index, int mean) {
  return cross_entropy(false, x, weight, targets, loss, dx, dweight, N, C, V, ignore_index, mean);
}

int64_t linear_cross_entropy_bf16(const float* x, const float* weight, const int64_t* targets, float* loss, float* dx,
                                  float* dweight, int64_t N, int64_t C, int64_t V, int64_t ignore_index, int mean) {
  return cross_entropy(true, x, weight, targets, loss, dx, dweight, N, C, V, ignore_index, mean);
}

}  // namespace portlm::PORTLM_ISA
