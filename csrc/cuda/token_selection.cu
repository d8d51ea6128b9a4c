// Choosing the next token. core/ops/token_selection.py is the definition; this gives the same token, bit for bit.
//
// Weights are whole numbers, so their sums are exact in any order, and nothing is sorted: the k-th largest logit and the edge
// of the nucleus are the same search, for the largest logit from which upwards there is enough, of tokens or of weight. It
// finds four bits of an order-preserving key in each pass over the row. A row is shared by as many blocks as it has chunks;
// what a pass finds is added up in the beginning of the next one, by each block for itself.
#include "cuda/kernels.h"
#include "cuda/logits.cuh"

namespace portlm::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int64_t kChunk = 4096;  // tokens of a block, or a multiple of them: there are at most kThreads chunks
constexpr int kDigits = 16, kPasses = 8;

// How far a search has come: the answer's upper bits, what is above them, and how much is sought.
struct Search {
  uint32_t key;
  int64_t above, enough;
};
static_assert(sizeof(Search) == 3 * sizeof(int64_t));

struct Settings {
  double temperature, top_p, min_p;
  int64_t top_k;
  uint64_t step;
  int scale;  // the largest weight is 2^scale
};

// The rows, and working space of each.
struct Rows {
  const float* logits;
  int64_t V, chunks, length;
  unsigned long long* best;  // (rows, chunks), a candidate of each chunk
  int64_t* sums;             // (2, rows, chunks, kDigits) of a pass, and of the one before
  Search* searches;          // (2, rows, kPasses + 1) of top_k and of top_p, before each pass and after the last
  int64_t* mass;             // (rows, chunks), what is kept
  int64_t* weights;          // (rows, V)

  __device__ const float* row(int64_t r) const { return logits + r * V; }
  __device__ int64_t end(int64_t chunk) const { return (chunk + 1) * length < V ? (chunk + 1) * length : V; }
  __device__ int64_t* sums_of(int pass, int64_t r, int64_t chunk) const {
    return sums + ((int64_t{pass % 2} * gridDim.y + r) * chunks + chunk) * kDigits;
  }
  __device__ Search& search(int which, int64_t r, int pass) const {
    return searches[(int64_t{which} * gridDim.y + r) * (kPasses + 1) + pass];
  }
};

// All kernels run in blocks (chunk, row).

template <int V>
__global__ void survey(Rows rows) {
  const int64_t r = blockIdx.y, chunk = blockIdx.x, end = rows.end(chunk);
  uint64_t found = kNoCandidate;
  for (int64_t i = chunk * rows.length + int64_t{threadIdx.x} * V; i < end; i += kThreads * V) {
    float x[V];
    load(rows.row(r) + i, x);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const uint64_t other = candidate(x[k], i + k);
      found = other > found ? other : found;
    }
  }
  found = block_largest(found);
  if (threadIdx.x == 0) rows.best[r * rows.chunks + chunk] = found;
}

// The largest logit of row r, in every thread.
__device__ inline Largest largest(const Rows& rows, int64_t r) {
  const unsigned long long* const best = rows.best + r * rows.chunks;
  return largest_of(block_largest(threadIdx.x < rows.chunks ? best[threadIdx.x] : kNoCandidate));
}

__global__ void greedy(Rows rows, int64_t* tokens) {
  const Largest top = largest(rows, blockIdx.y);
  if (threadIdx.x == 0) tokens[blockIdx.y] = top.id;
}

// w = rint(2^scale e^((logit - largest) / temperature))
__global__ void weigh(Rows rows, Settings settings) {
  const int64_t r = blockIdx.y, chunk = blockIdx.x, end = rows.end(chunk);
  const Largest top = largest(rows, r);
  if (top.id < 0) return;
  const double high = top.value;
  for (int64_t i = chunk * rows.length + threadIdx.x; i < end; i += kThreads) {
    const double quotient = __ddiv_rn(__dsub_rn(static_cast<double>(rows.row(r)[i]), high), settings.temperature);
    rows.weights[r * rows.V + i] = static_cast<int64_t>(rint(scaled_exp(quotient > -64.0 ? quotient : -64.0, settings.scale)));
  }
}

// The search after `pass` passes, from what it was before the last of them and what that one found.
__device__ inline Search continued(const Rows& rows, int which, int64_t r, int pass, const Settings& settings) {
  __shared__ int64_t parts[kThreads / kDigits][kDigits], totals[kDigits];
  const unsigned digit = threadIdx.x % kDigits, slice = threadIdx.x / kDigits;
  int64_t sum = 0;
  for (int64_t chunk = slice; chunk < rows.chunks; chunk += kThreads / kDigits) sum += rows.sums_of(pass - 1, r, chunk)[digit];
  __syncthreads();  // the other search's totals have been read
  parts[slice][digit] = sum;
  __syncthreads();
  if (threadIdx.x < kDigits) {
    for (unsigned s = 1; s < kThreads / kDigits; ++s) sum += parts[s][digit];
    totals[digit] = sum;
  }
  __syncthreads();
  Search search{0, 0, settings.top_k};
  if (pass > 1) search = rows.search(which, r, pass - 1);
  if (pass == 1 && which == 1) {
    int64_t all = 0;
    for (int d = 0; d < kDigits; ++d) all += totals[d];
    search.enough = static_cast<int64_t>(ceil(__dmul_rn(settings.top_p, static_cast<double>(all))));
  }
  int value = kDigits - 1;
  while (value > 0 && search.above + totals[value] < search.enough) search.above += totals[value--];
  search.key |= static_cast<uint32_t>(value) << (32 - 4 * pass);
  return search;
}

// The key of the smallest logit that a search keeps, after all passes; 0 keeps all.
__device__ inline uint32_t smallest(const Rows& rows, int which, int64_t r, const Settings& settings) {
  const bool sought = which == 0 ? settings.top_k > 0 && settings.top_k < rows.V : settings.top_p < 1.0;
  return sought ? rows.search(which, r, kPasses).key : 0;
}

// One pass of search `which`, 0 for top_k and 1 for top_p among what that left; after the last one what it found.
__global__ void narrow(Rows rows, Settings settings, int which, int pass) {
  __shared__ int64_t shares[kDigits][kThreads];
  const int64_t r = blockIdx.y, chunk = blockIdx.x, end = rows.end(chunk);
  if (largest(rows, r).id < 0) return;
  const Search search = pass > 0 ? continued(rows, which, r, pass, settings) : Search{0, 0, 0};
  if (pass > 0 && chunk == 0 && threadIdx.x == 0) rows.search(which, r, pass) = search;
  if (pass == kPasses) return;
  const uint32_t least = which == 1 ? smallest(rows, 0, r, settings) : 0;
  const int shift = 28 - 4 * pass;
  int64_t sums[kDigits] = {};
  for (int64_t i = chunk * rows.length + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = key_of(rows.row(r)[i]);
    if (key < least || (pass > 0 && (key ^ search.key) >> shift >> 4)) continue;
    const int64_t weight = which == 1 ? rows.weights[r * rows.V + i] : 1;
    const int digit = static_cast<int>(key >> shift & (kDigits - 1));
#pragma unroll
    for (int d = 0; d < kDigits; ++d) sums[d] += d == digit ? weight : 0;
  }
#pragma unroll
  for (int d = 0; d < kDigits; ++d) shares[d][threadIdx.x] = sums[d];
  __syncthreads();
  const unsigned digit = threadIdx.x / kDigits, lane = threadIdx.x % kDigits;
  int64_t sum = 0;
  for (unsigned t = lane; t < kThreads; t += kDigits) sum += shares[digit][t];
  __syncthreads();
  shares[digit][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= kDigits) return;
  sum = 0;
  for (int l = 0; l < kDigits; ++l) sum += shares[threadIdx.x][l];
  rows.sums_of(pass, r, chunk)[threadIdx.x] = sum;
}

// What of a row may be drawn.
struct Kept {
  uint32_t key;
  int64_t weight;

  __device__ Kept(const Rows& rows, int64_t r, const Settings& settings) : key(smallest(rows, 0, r, settings)) {
    const uint32_t edge = smallest(rows, 1, r, settings);
    key = edge > key ? edge : key;
    weight = static_cast<int64_t>(ceil(settings.min_p * static_cast<double>(int64_t{1} << settings.scale)));
  }
  __device__ int64_t of(const Rows& rows, int64_t r, int64_t i) const {
    const int64_t w = rows.weights[r * rows.V + i];
    return w < weight || key_of(rows.row(r)[i]) < key ? 0 : w;
  }
};

// The sum of x over the threads up to this one.
__device__ inline int64_t running_sum(int64_t x) {
  __shared__ int64_t sums[kThreads];
  __syncthreads();  // the previous sums have been read
  sums[threadIdx.x] = x;
  for (unsigned distance = 1; distance < kThreads; distance *= 2) {
    __syncthreads();
    const int64_t other = threadIdx.x >= distance ? sums[threadIdx.x - distance] : 0;
    __syncthreads();
    sums[threadIdx.x] = x += other;
  }
  return x;
}

__global__ void measure(Rows rows, Settings settings) {
  const int64_t r = blockIdx.y, chunk = blockIdx.x, end = rows.end(chunk);
  if (largest(rows, r).id < 0) return;
  const Kept kept(rows, r, settings);
  int64_t sum = 0;
  for (int64_t i = chunk * rows.length + threadIdx.x; i < end; i += kThreads) sum += kept.of(rows, r, i);
  sum = running_sum(sum);
  if (threadIdx.x == kThreads - 1) rows.mass[r * rows.chunks + chunk] = sum;
}

// First word of Philox4x64-10 (Salmon et al. 2011) for key (seed, 0) and counter (step, row, 0, 0), as u in [0, 1).
__device__ inline double random_unit(uint64_t seed, uint64_t row, uint64_t step) {
  constexpr uint64_t kFirst = 0xD2E7470EE14C6C93u, kSecond = 0xCA5A826395121157u;
  uint64_t c0 = step, c1 = row, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t high0 = __umul64hi(kFirst, c0), low0 = kFirst * c0, high1 = __umul64hi(kSecond, c2), low1 = kSecond * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  return static_cast<double>(c0 >> 11) * 0x1p-53;
}

// The first token whose running sum exceeds u times the whole; one block per row.
__global__ void draw(Rows rows, Settings settings, const uint64_t* seeds, const uint64_t* streams, int64_t* tokens) {
  __shared__ int64_t found[2], total;  // where it is, and what of u times the whole is left there
  const int64_t r = blockIdx.y;
  if (largest(rows, r).id < 0) {
    if (threadIdx.x == 0) tokens[r] = -1;
    return;
  }
  const int64_t mine = threadIdx.x < rows.chunks ? rows.mass[r * rows.chunks + threadIdx.x] : 0, upto = running_sum(mine);
  if (threadIdx.x == kThreads - 1) total = upto;
  __syncthreads();
  const auto target = static_cast<int64_t>(__dmul_rn(random_unit(seeds[r], streams[r], settings.step), static_cast<double>(total)));
  if (upto - mine <= target && target < upto) {
    found[0] = threadIdx.x;
    found[1] = target - (upto - mine);
  }
  __syncthreads();
  const int64_t chunk = found[0], left = found[1], each = rows.length / kThreads, end = rows.end(chunk);
  const int64_t first = chunk * rows.length + threadIdx.x * each, last = first + each < end ? first + each : end;
  const Kept kept(rows, r, settings);
  int64_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += kept.of(rows, r, i);
  const int64_t behind = running_sum(sum);
  if (behind - sum > left || left >= behind) return;
  int64_t rest = left - (behind - sum), i = first;
  for (int64_t w = kept.of(rows, r, i); w <= rest; w = kept.of(rows, r, ++i)) rest -= w;
  tokens[r] = i;
}

}  // namespace

void select_tokens(const float* logits, int64_t rows, int64_t V, double temperature, int64_t top_k, double top_p, double min_p,
                   const uint64_t* seeds, const uint64_t* streams, uint64_t step, int64_t* tokens, int64_t* work,
                   uintptr_t stream) {
  if (V >> 32) throw std::runtime_error("select_tokens: more tokens than ids are counted");
  const int64_t turns = (V + kChunk * kThreads - 1) / (kChunk * kThreads), length = kChunk * turns;
  const int64_t chunks = (V + length - 1) / length, most = 65535;
  Settings settings{temperature, top_p, min_p, top_k, step, 52};
  while ((int64_t{1} << (52 - settings.scale)) < V) --settings.scale;
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t n = rows - begin < most ? rows - begin : most;
    int64_t* const sums = work + n * chunks;
    int64_t* const searches = sums + 2 * n * chunks * kDigits;
    int64_t* const mass = searches + 2 * n * (kPasses + 1) * 3;
    const Rows part{logits + begin * V, V, chunks, length, reinterpret_cast<unsigned long long*>(work), sums,
                    reinterpret_cast<Search*>(searches), mass, mass + n * chunks};
    const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(n)), row(1, grid.y);
    with_float_access(V, {logits}, [&](auto access) {
      constexpr int Width = decltype(access)::V;
      launch(survey<Width>, grid, kThreads, 0, stream, part);
    });
    if (temperature == 0.0) {
      launch(greedy, row, kThreads, 0, stream, part, tokens + begin);
      continue;
    }
    launch(weigh, grid, kThreads, 0, stream, part, settings);
    for (int which = 0; which < 2; ++which) {
      const bool sought = which == 0 ? top_k > 0 && top_k < V : top_p < 1.0;
      for (int pass = 0; sought && pass < kPasses; ++pass) launch(narrow, grid, kThreads, 0, stream, part, settings, which, pass);
      if (sought) launch(narrow, row, kThreads, 0, stream, part, settings, which, int{kPasses});
    }
    launch(measure, grid, kThreads, 0, stream, part, settings);
    launch(draw, row, kThreads, 0, stream, part, settings, seeds + begin, streams + begin, tokens + begin);
  }
}

}  // namespace portlm::cuda
