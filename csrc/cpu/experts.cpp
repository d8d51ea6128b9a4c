// A mixture of experts: each row goes through the few gated perceptrons that its router prefers, and their answers are added
// up. Rows are grouped by expert, so every matrix of an expert is read once, and multiplied by all rows that chose it.
//
// Experts come in order and a row is in a group once, so a row's sum is added up in the order of its experts whatever the
// number of threads is.
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/hidden.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {
namespace {

struct Mixture {
  int64_t rows, C, E, F, k;
  bool out_first;  // gate and up (E F, C) and down (C, E F); otherwise (C, E F) and (E F, C)

  Mixture(int64_t rows, int64_t C, int64_t E, int64_t N, int64_t top_k, bool out_first)
      : rows(rows), C(C), E(E), F(E > 0 ? N / E : 0), k(top_k < E ? top_k : E), out_first(out_first) {}

  // to (n, F) = from (n, C) times an expert's gate or up.
  Product into(int64_t e, const float* from, const float* matrix, float* to, int64_t n) const {
    return {from, matrix + (out_first ? e * F * C : e * F), nullptr, to, n, F, C, C, out_first ? C : E * F, F, false, out_first, false};
  }

  // to (n, C) = from (n, F) times an expert's down.
  Product out_of(int64_t e, const float* from, const float* matrix, float* to, int64_t n) const {
    return {from, matrix + (out_first ? e * F : e * F * C), nullptr, to, n, C, F, F, out_first ? E * F : C, C, false, out_first, false};
  }
};

// The k experts with the largest logits of each row, the first of equal ones, and their weights: of a softmax over all
// experts, or over the chosen.
void choose(const Mixture& m, const float* logits, int64_t* chosen, float* weights, bool normalize) {
  parallel_for(m.rows, kElementwiseGrain / (m.E * (m.k + 1) + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* const row = logits + r * m.E;
      int64_t* const places = chosen + r * m.k;
      const auto taken = [=](int64_t e, int64_t before) {
        for (int64_t j = 0; j < before; ++j)
          if (places[j] == e) return true;
        return false;
      };
      for (int64_t j = 0; j < m.k; ++j) {
        int64_t best = -1;
        for (int64_t e = 0; e < m.E; ++e)
          if (!taken(e, j) && (best < 0 || row[e] > row[best])) best = e;
        places[j] = best;
      }
      const double largest = row[places[0]];
      double total = 0.0;
      if (normalize)
        for (int64_t j = 0; j < m.k; ++j) total += std::exp(row[places[j]] - largest);
      else
        for (int64_t e = 0; e < m.E; ++e) total += std::exp(row[e] - largest);
      for (int64_t j = 0; j < m.k; ++j)
        weights[r * m.k + j] = static_cast<float>(std::exp(row[places[j]] - largest) / total);
    }
  });
}

int64_t* integers(Scratch& scratch, int64_t count) { return reinterpret_cast<int64_t*>(scratch.floats(2 * count)); }

// Which choices (row k + place among its experts) each expert got: those of expert e are slot[start[e]] and on, by row.
struct Groups {
  const int64_t* start;  // (E + 1)
  const int64_t* slot;   // (rows k)
};

Groups group(const Mixture& m, const int64_t* chosen, Scratch& scratch) {
  const int64_t count = m.rows * m.k;
  int64_t* const start = integers(scratch, m.E + 2 + count);
  int64_t* const slot = start + m.E + 2;
  for (int64_t e = 0; e < m.E + 2; ++e) start[e] = 0;
  for (int64_t i = 0; i < count; ++i) ++start[chosen[i] + 2];
  for (int64_t e = 2; e < m.E + 2; ++e) start[e] += start[e - 1];
  for (int64_t i = 0; i < count; ++i) slot[start[chosen[i] + 1]++] = i;  // moves each start to where it belongs
  return {start, slot};
}

void clear(float* p, int64_t n) {
  parallel_for(n, kElementwiseGrain, [=](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t j, auto lanes) { store(Vec(0.0f), p + begin + j, lanes); });
  });
}

// to (n, C) = the rows of x that some choices are of.
void gather(const Mixture& m, const float* x, const int64_t* slot, int64_t n, float* to) {
  parallel_for(n, kElementwiseGrain / (m.C + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* const row = x + slot[i] / m.k * m.C;
      for_lanes(m.C, [=](int64_t j, auto lanes) { store(load(row + j, lanes), to + i * m.C + j, lanes); });
    }
  });
}

// Adds them back to such rows; no two are of the same.
void scatter(const Mixture& m, const float* from, const int64_t* slot, int64_t n, float* y) {
  parallel_for(n, kElementwiseGrain / (m.C + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const row = y + slot[i] / m.k * m.C;
      for_lanes(m.C, [=](int64_t j, auto lanes) { store(load(row + j, lanes) + load(from + i * m.C + j, lanes), row + j, lanes); });
    }
  });
}

// Arrays (n, F) of one group.
struct Hidden {
  const float* gate;
  const float* up;
  float* value;  // silu(gate) up times the row's weight
  const float* weights;
  const int64_t* slot;
  int64_t F;
};

void activate(void* context, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Hidden& h = *static_cast<const Hidden*>(context);
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t at = i * h.F + j0;
    const Vec weight(h.weights[h.slot[i]]);
    for_lanes(j1 - j0, [=](int64_t j, auto lanes) {
      store(silu(load(h.gate + at + j, lanes)) * load(h.up + at + j, lanes) * weight, h.value + at + j, lanes);
    });
  }
}

// Of a group: grad (n, F), the gradient of the weighted hidden layer, becomes that of gate, and grad_up receives that of up,
// value the hidden layer itself, and dweights the gradient of each choice's weight.
void differentiate(const Hidden& h, float* grad, float* grad_up, float* dweights, int64_t n) {
  parallel_for(n, kElementwiseGrain / (8 * h.F + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *const gate = h.gate + i * h.F, *const up = h.up + i * h.F;
      float *const d = grad + i * h.F, *const dup = grad_up + i * h.F, *const value = h.value + i * h.F;
      float total[1];
      row_sums<1>(h.F, total, [=](int64_t j, auto lanes) {
        return Sums<1>{{keep(load(d + j, lanes) * silu(load(gate + j, lanes)) * load(up + j, lanes), lanes)}};
      });
      dweights[h.slot[i]] = total[0];
      const Vec weight(h.weights[h.slot[i]]);
      for_lanes(h.F, [=](int64_t j, auto lanes) {
        const Vec g = load(gate + j, lanes), u = load(up + j, lanes), upstream = load(d + j, lanes) * weight;
        // as in swiglu.cpp
        const Vec e = exp(Vec(0.0f) - g), s = Vec(1.0f) / (Vec(1.0f) + e), rest = min(Vec(3e38f), e) * s;
        store(upstream * u * s * fma(g, rest, Vec(1.0f)), d + j, lanes);
        store(upstream * g * s, dup + j, lanes);
        store(g * s * u * weight, value + j, lanes);
      });
    }
  });
}

// dlogits (rows, E) from the gradients (rows, k) of the chosen experts' weights.
void differentiate_choice(const Mixture& m, const float* logits, const int64_t* chosen, const float* weights,
                          const float* dweights, float* dlogits, bool normalize) {
  parallel_for(m.rows, kElementwiseGrain / (m.E + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *const row = logits + r * m.E, *const w = weights + r * m.k, *const dw = dweights + r * m.k;
      const int64_t* const places = chosen + r * m.k;
      float* const d = dlogits + r * m.E;
      double mean = 0.0, total = 0.0;
      for (int64_t j = 0; j < m.k; ++j) mean += static_cast<double>(dw[j]) * w[j];
      if (normalize) {
        for (int64_t e = 0; e < m.E; ++e) d[e] = 0.0f;
        for (int64_t j = 0; j < m.k; ++j) d[places[j]] = static_cast<float>(w[j] * (dw[j] - mean));
        continue;
      }
      const double largest = row[places[0]];
      for (int64_t e = 0; e < m.E; ++e) total += std::exp(row[e] - largest);
      for (int64_t e = 0; e < m.E; ++e) d[e] = static_cast<float>(-mean * std::exp(row[e] - largest) / total);
      for (int64_t j = 0; j < m.k; ++j) d[places[j]] = static_cast<float>(w[j] * (dw[j] - mean));
    }
  });
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

void experts_fwd(const float* x, const float* router, const float* gate, const float* up, const float* down, float* y,
                 float* logits, int64_t* chosen, float* weights, float* pre, int out_first, int64_t rows, int64_t C, int64_t E,
                 int64_t N, int64_t top_k, int normalize) {
  const Mixture m(rows, C, E, N, top_k, out_first != 0);
  clear(y, rows * C);
  if (rows <= 0 || m.k <= 0) return;
  thread_local Scratch routing, choices, places, layers;
  const int64_t count = rows * m.k, most = smaller(rows, chunk_rows(m.F));
  float* const room = routing.floats(rows * E + count);
  if (!logits) logits = room;
  if (!weights) weights = room + rows * E;
  if (!chosen) chosen = integers(choices, count);
  multiply({x, router, nullptr, logits, rows, E, C, C, C, E, false, true, false});
  choose(m, logits, chosen, weights, normalize != 0);
  const Groups groups = group(m, chosen, places);
  float* const inputs = layers.floats(most * (2 * C + 3 * m.F));
  float* const answers = inputs + most * C;
  float* const value = answers + most * C;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t i = groups.start[e]; i < groups.start[e + 1]; i += most) {
      const int64_t n = smaller(most, groups.start[e + 1] - i);
      float* const to = pre ? pre + i * m.F : value + most * m.F;
      float* const up_to = pre ? pre + (count + i) * m.F : value + 2 * most * m.F;
      gather(m, x, groups.slot + i, n, inputs);
      multiply(m.into(e, inputs, gate, to, n));
      Hidden h{to, up_to, value, weights, groups.slot + i, m.F};
      multiply(m.into(e, inputs, up, up_to, n), activate, &h);
      multiply(m.out_of(e, value, down, answers, n));
      scatter(m, answers, groups.slot + i, n, y);
    }
  }
}

void experts_bwd(const float* dy, const float* x, const float* router, const float* gate, const float* up, const float* down,
                 const float* logits, const int64_t* chosen, const float* weights, const float* pre, float* dx,
                 float* drouter, float* dgate, float* dup, float* ddown, int64_t rows, int64_t C, int64_t E, int64_t N,
                 int64_t top_k, int normalize) {
  const Mixture m(rows, C, E, N, top_k, true);
  thread_local Scratch routing, places, layers;
  const int64_t count = rows * m.k, most = smaller(rows, chunk_rows(m.F)), F = m.F;
  float* const dweights = routing.floats(count + rows * E);
  float* const dlogits = dweights + count;
  const Groups groups = group(m, chosen, places);
  float* const inputs = layers.floats(most * (3 * C + 3 * F));
  float* const upstream = inputs + most * C;
  float* const answers = upstream + most * C;
  float* const grad = answers + most * C;
  float* const grad_up = grad + most * F;
  float* const value = grad_up + most * F;
  if (dx) clear(dx, rows * C);
  for (int64_t e = 0; e < E; ++e) {
    const int64_t first = groups.start[e], last = groups.start[e + 1];
    int64_t i = first;
    do {  // once even for an expert without rows, which makes its gradients zero
      const int64_t n = smaller(most, last - i);
      const bool more = i > first;
      gather(m, x, groups.slot + i, n, inputs);
      gather(m, dy, groups.slot + i, n, upstream);
      multiply({upstream, down + e * F, nullptr, grad, n, F, C, C, E * F, F, false, false, false});
      differentiate({pre + i * F, pre + (count + i) * F, value, weights, groups.slot + i, F}, grad, grad_up, dweights, n);
      if (ddown) multiply({upstream, value, nullptr, ddown + e * F, C, F, n, C, F, E * F, true, false, more});
      if (dgate) multiply({grad, inputs, nullptr, dgate + e * F * C, F, C, n, F, C, C, true, false, more});
      if (dup) multiply({grad_up, inputs, nullptr, dup + e * F * C, F, C, n, F, C, C, true, false, more});
      if (dx) {
        multiply({grad, gate + e * F * C, nullptr, answers, n, C, F, F, C, C, false, false, false});
        multiply({grad_up, up + e * F * C, nullptr, answers, n, C, F, F, C, C, false, false, true});
        scatter(m, answers, groups.slot + i, n, dx);
      }
      i += n;
    } while (i < last);
  }
  if (!dx && !drouter) return;
  differentiate_choice(m, logits, chosen, weights, dweights, dlogits, normalize != 0);
  if (drouter) multiply({dlogits, x, nullptr, drouter, E, C, rows, E, C, C, true, false, false});
  if (dx) multiply({dlogits, router, nullptr, dx, rows, C, E, E, C, C, false, false, true});
}

}  // namespace portlm::PORTLM_ISA
