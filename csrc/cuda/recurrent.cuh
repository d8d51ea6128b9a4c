// What the recurrent layers and cells share. Of a layer: one kernel per step, which multiplies the state by the weights and goes on in registers with
// what follows of it, and the steps in their order.
//
// The products are small and their weights, which every step reads again, stay in the L2 cache. Float32 throughout, and each
// sum in the order of its terms: results depend on nothing but the input.
#pragma once

#include "cuda/common.cuh"

namespace portlm::cuda {

// Sizes of one layer of one direction: B rows, T tokens, H units.
struct Layer {
  int64_t B, T, H;
  bool reverse;
  // The token that step s reads.
  __host__ __device__ int64_t token(int64_t s) const { return reverse ? T - 1 - s : s; }
};

// Whether the mask (B, T), or nullptr, hides a token.
__device__ inline bool hidden(const Layer& layer, const int64_t* mask, int64_t b, int64_t t) {
  return mask && mask[b * layer.T + t] == 0;
}

// The state before step s of row b: y (B, T, H) holds those after each token.
__device__ inline const float* state_before(const Layer& layer, const float* h0, const float* y, int64_t b, int64_t s) {
  return s == 0 ? h0 + b * layer.H : y + (b * layer.T + layer.token(s - 1)) * layer.H;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// --- a tile of a product ------------------------------------------------------------------------------------------

constexpr int kTile = 32;     // units of a block, and terms that it adds at once; a warp is as wide
constexpr int kTileRows = 8;  // threads that share a unit
constexpr int kRowsEach = 2;
constexpr int kRows = kTileRows * kRowsEach;  // of a block

// What block (x, y) of (kTile, kTileRows) threads computes: units from kTile * x on, rows from kRows * y on.
__device__ inline int64_t my_unit() { return int64_t{blockIdx.x} * kTile + threadIdx.x; }
__device__ inline int64_t my_row(int r) { return int64_t{blockIdx.y} * kRows + threadIdx.y + r * kTileRows; }

inline dim3 tiles(const Layer& layer) {
  return dim3(static_cast<unsigned>((layer.H + kTile - 1) / kTile), static_cast<unsigned>((layer.B + kRows - 1) / kRows));
}

// sum[r][g] = row my_row(r) of x (B, K), rows x_stride floats apart, times the weights of unit my_unit() and gate g. fill(k0,
// columns) puts those for terms [k0, k0 + kTile) of all units of the block into columns, zeros beyond the last. All threads
// of the block must call it.
template <int G, typename Fill>
__device__ inline void tile_product(const float* x, int64_t x_stride, int64_t B, int64_t K, Fill fill,
                                    float (&sum)[kRowsEach][G]) {
  __shared__ float rows[kRows][kTile];
  __shared__ float columns[G][kTile][kTile + 1];  // (gate, unit, term)
#pragma unroll
  for (int r = 0; r < kRowsEach; ++r)
#pragma unroll
    for (int g = 0; g < G; ++g) sum[r][g] = 0.0f;
  for (int64_t k0 = 0; k0 < K; k0 += kTile) {
    const int64_t k = k0 + threadIdx.x;
    __syncthreads();  // the last tiles have been read
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r)
      rows[threadIdx.y + r * kTileRows][threadIdx.x] = my_row(r) < B && k < K ? x[my_row(r) * x_stride + k] : 0.0f;
    fill(k0, columns);
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < kTile; ++i) {
      float w[G];
#pragma unroll
      for (int g = 0; g < G; ++g) w[g] = columns[g][threadIdx.x][i];
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r)
#pragma unroll
        for (int g = 0; g < G; ++g) sum[r][g] = fmaf(rows[threadIdx.y + r * kTileRows][i], w[g], sum[r][g]);
    }
  }
}

// Of weight (G * H, H), whose row g * H + u belongs to unit u: neighbouring threads read neighbouring terms.
template <int G>
struct FillRows {
  const float* weight;
  int64_t H;
  __device__ void operator()(int64_t k0, float (&columns)[G][kTile][kTile + 1]) const {
    const int64_t k = k0 + threadIdx.x;
#pragma unroll
    for (int g = 0; g < G; ++g)
      for (int u = threadIdx.y; u < kTile; u += kTileRows) {
        const int64_t unit = int64_t{blockIdx.x} * kTile + u;
        columns[g][u][threadIdx.x] = unit < H && k < H ? weight[(g * H + unit) * H + k] : 0.0f;
      }
  }
};

// Of weight (K, H), whose column u belongs to unit u: neighbouring threads read neighbouring units.
struct FillColumns {
  const float* weight;
  int64_t K, H;
  __device__ void operator()(int64_t k0, float (&columns)[1][kTile][kTile + 1]) const {
    for (int i = threadIdx.y; i < kTile; i += kTileRows) {
      const int64_t k = k0 + i;
      columns[0][threadIdx.x][i] = my_unit() < H && k < K ? weight[k * H + my_unit()] : 0.0f;
    }
  }
};

// --- the steps ----------------------------------------------------------------------------------------------------

// For each row and unit of step s: done(layer, b, t, s, unit, sums, before), where sums holds weight (G * H, H) times the
// state before, gate by gate, and `before` points to this row's state before. done writes the state y (B, T, H).
template <int G, typename Done>
__global__ void forward_step(Layer layer, int64_t s, const float* weight, const float* h0, const float* y, Done done) {
  const float* const before = s == 0 ? h0 : y + layer.token(s - 1) * layer.H;
  const int64_t stride = s == 0 ? layer.H : layer.T * layer.H;
  float sum[kRowsEach][G];
  tile_product<G>(before, stride, layer.B, layer.H, FillRows<G>{weight, layer.H}, sum);
  if (my_unit() >= layer.H) return;
#pragma unroll
  for (int r = 0; r < kRowsEach; ++r)
    if (my_row(r) < layer.B) done(layer, my_row(r), layer.token(s), s, my_unit(), sum[r], before + my_row(r) * stride);
}

template <int G, typename Done>
void forward_steps(const Layer& layer, const float* weight, const float* h0, const float* y, Done done, uintptr_t stream) {
  if (layer.B <= 0 || layer.H <= 0) return;
  for (int64_t s = 0; s < layer.T; ++s)
    launch(forward_step<G, Done>, tiles(layer), dim3(kTile, kTileRows), 0, stream, layer, s, weight, h0, y, done);
}

// For each row and unit, what comes back from step s + 1: grads (B, T, K), which that step wrote, times weight (K, H), added
// to what dh (B, H) holds, past its product. first(layer, b, t, s, unit, h) turns it into the gradient of step s's sums, in
// grads, and returns what goes past its product, for dh. Before the first step dh receives it as it is.
template <typename First>
__global__ void backward_step(Layer layer, int64_t s, const float* weight, int64_t K, const float* grads, float* dh,
                              First first) {
  const bool last = s + 1 >= layer.T;  // nothing comes back
  float sum[kRowsEach][1];
  tile_product<1>(last ? nullptr : grads + layer.token(s + 1) * K, layer.T * K, layer.B, last ? 0 : K,
                  FillColumns{weight, K, layer.H}, sum);
  const int64_t unit = my_unit();
  if (unit >= layer.H) return;
#pragma unroll
  for (int r = 0; r < kRowsEach; ++r) {
    const int64_t b = my_row(r);
    if (b >= layer.B) continue;
    const float h = last ? 0.0f : dh[b * layer.H + unit] + sum[r][0];
    dh[b * layer.H + unit] = s < 0 ? h : first(layer, b, layer.token(s), s, unit, h);
  }
}

// The steps backwards. K is the number of gates times H.
template <typename First>
void backward_steps(const Layer& layer, const float* weight, int64_t K, const float* grads, float* dh, First first,
                    uintptr_t stream) {
  if (layer.B <= 0 || layer.H <= 0) return;
  for (int64_t s = layer.T - 1; s >= -1; --s)
    launch(backward_step<First>, tiles(layer), dim3(kTile, kTileRows), 0, stream, layer, s, weight, K, grads, dh, first);
}

// --- one step behind its products ---------------------------------------------------------------------------------

// done(b, unit) for each of `rows` rows and H units.
template <typename Done>
__global__ void every_unit(int64_t rows, int64_t H, Done done) {
  const int64_t turn = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * H; i += turn) done(i / H, i % H);
}

template <typename Done>
void for_units(int64_t rows, int64_t H, Done done, uintptr_t stream) {
  constexpr int64_t kThreads = 256;
  if (rows * H > 0) launch(every_unit<Done>, row_blocks((rows * H + kThreads - 1) / kThreads), kThreads, 0, stream, rows, H, done);
}

}  // namespace portlm::cuda
