// What the attention kernels share: the description of a call, which keys a query sees, and what makes a score of a product.
#pragma once

#include <cmath>

#include "cuda/common.cuh"

namespace portlm::cuda {

constexpr int kMostHeadWidth = 256;
constexpr int64_t kFewQueries = 16;  // up to which keys are cut into parts, and queries are not put into tiles

// Elements from batch to batch, row to row and head to head; those of a head lie side by side.
struct HeadStrides {
  int64_t batch, row, head;
};

// Queries (B, T, H, D) against keys and values (B, S, K, D), float32 or bfloat16. Query t stands at position S - T + t: if
// causal it sees no key behind that, and with a window that is not 0 none that is so far before it.
struct Attention {
  const void *q, *k, *v;
  HeadStrides q_at, k_at, v_at;
  int B, T, S, H, K, D;
  float scale, softcap;  // softcap 0 for none
  bool causal;
  int window;
  const int64_t* mask;  // (B, S), 0 hides a key, or nullptr
  const void* bias;     // (T, S) without gaps for each row of the batch and head, or nullptr
  int64_t bias_batch, bias_head;
  bool is_bfloat16;

  // The keys [begin, end) that some of the queries [t0, t1) sees, but for the mask.
  __host__ __device__ int begin(int t0) const { return window && S - T + t0 >= window ? S - T + t0 - window + 1 : 0; }
  __host__ __device__ int end(int t1) const { return causal && t1 < T ? S - T + t1 : S; }
  // And the queries [first, last) that see some of the keys [j0, j1).
  __host__ __device__ int first(int j0) const { return causal && j0 > S - T ? j0 - (S - T) : 0; }
  __host__ __device__ int last(int j1) const {
    const int64_t seen = int64_t{j1} - 1 + window - (S - T);  // what stands there or later sees none
    return !window || seen > T ? T : seen < 0 ? 0 : static_cast<int>(seen);
  }
};

// Raises std::runtime_error if a size does not fit an int.
inline int size_of(int64_t n) {
  if (n < 0 || n >= int64_t{1} << 31) throw std::runtime_error("attention: a size that is negative or above 2^31 - 1");
  return static_cast<int>(n);
}

// strides as cpu/kernels.def has them: of q, k and v.
inline Attention attention_of(const void* q, const void* k, const void* v, const int64_t* strides, int64_t B, int64_t T, int64_t S,
                              int64_t H, int64_t K, int64_t D, float scale, bool is_bfloat16) {
  Attention a = {};
  a.q = q, a.k = k, a.v = v;
  a.q_at = {strides[0], strides[1], strides[2]};
  a.k_at = {strides[3], strides[4], strides[5]};
  a.v_at = {strides[6], strides[7], strides[8]};
  a.B = size_of(B), a.T = size_of(T), a.S = size_of(S), a.H = size_of(H), a.K = size_of(K), a.D = size_of(D);
  a.scale = scale;
  a.is_bfloat16 = is_bfloat16;
  return a;
}

// Whether every row of D elements may be read, or written, V at a time.
inline bool rows_allow(int V, const Attention& a, std::initializer_list<const void*> arrays,
                       std::initializer_list<HeadStrides> strides) {
  bool allowed = a.D % V == 0;
  for (const void* p : arrays) allowed = allowed && reinterpret_cast<uintptr_t>(p) % (V * (a.is_bfloat16 ? 2u : 4u)) == 0;
  for (const HeadStrides& s : strides) allowed = allowed && s.batch % V == 0 && s.row % V == 0 && s.head % V == 0;
  return allowed;
}

// What the queries of head h of row b see.
template <typename T>
struct View {
  const Attention& a;
  const int64_t* mask;
  const T* bias;

  __device__ View(const Attention& a, int b, int h)
      : a(a), mask(a.mask ? a.mask + int64_t{b} * a.S : nullptr),
        bias(a.bias ? static_cast<const T*>(a.bias) + b * a.bias_batch + h * a.bias_head : nullptr) {}

  __device__ bool sees(int t, int j) const {
    if (t >= a.T || j >= a.S) return false;
    const int place = a.S - a.T + t;
    if (a.causal && j > place) return false;
    if (a.window && place - j >= a.window) return false;
    return !mask || mask[j] != 0;
  }
  // Of a query and a key that it sees, and their product.
  __device__ float score(float product, int t, int j) const {
    float s = product * a.scale;
    if (a.softcap != 0.0f) s = a.softcap * tanhf(s / a.softcap);
    if (bias) s += to_float(bias[int64_t{t} * a.S + j]);
    return s;
  }
  // The score's derivative by product * scale.
  __device__ float slope(float score) const {
    if (a.softcap == 0.0f) return 1.0f;
    const float share = score / a.softcap;
    return 1.0f - share * share;
  }
};

// What a sum of exponentials relative to `before` is times, to be relative to `now`. Without the test, a query that has seen
// nothing would give NaN.
__device__ inline float shrunk(float before, float now) { return before == -INFINITY ? 0.0f : expf(before - now); }

// Attention in tiles of queries and keys (Dao et al. 2022). out (B, T, H, D); stats (B, H, T, 2), or nullptr, receives each
// query's largest score, and the inverse of the sum of exponentials relative to it. A query that sees nothing gives 0.
void attend_in_tiles(const Attention& a, void* out, float* stats, uintptr_t stream);

// The same for few queries, whose keys are cut into `parts` parts that blocks of their own take. partial (B, T, H, parts, D + 2)
// is room for what each found, or nullptr if parts is 1.
void attend_in_parts(const Attention& a, void* out, float* partial, int64_t parts, uintptr_t stream);

// The gradients of attend_in_tiles. delta (B, H, T) is working space. dbias (B, H, T, S), or (1, H, T, S) if dbias_batch is 0,
// receives those of the scores, added to what is there, or is nullptr.
struct Gradients {
  const void *dout, *out;
  const float* stats;
  void *dq, *dk, *dv;
  HeadStrides dq_at, dk_at, dv_at;
  float *delta, *dbias;
  int64_t dbias_batch;
};
void differentiate_in_tiles(const Attention& a, const Gradients& g, uintptr_t stream);

inline unsigned tile_blocks(int64_t n) {
  if (n >= int64_t{1} << 31) throw std::runtime_error("attention: more tiles than one launch can address");
  return static_cast<unsigned>(n);
}

}  // namespace portlm::cuda
