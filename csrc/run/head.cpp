#include "run/head.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "run/state.h"

namespace portlm::run {
namespace {

constexpr int64_t kRows = 512;       // that share a reading of the matrix
constexpr int64_t kIds = 1024;       // of a part: with that many rows, reading x again does not matter, and 2 MB are written
constexpr int64_t kIdsOfFew = 4096;  // where nothing but the largest is asked for, mostly of one row: 16 KB of it
constexpr int64_t kEqual = 24;       // parts are a multiple of this, so that most numbers of threads get equal shares
constexpr int64_t kWork = 1 << 19;   // products below which a second thread costs more than it brings

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The vocabulary in parts that are as equal as can be.
struct Parts {
  int64_t ids, panels, count;

  int64_t begin(int64_t part) const { return std::min(panels * part / count * kPanelIds, ids); }
  int64_t widest() const { return ceil_div(panels, count) * kPanelIds; }
};

// The order of sums depends on the parts, so threads may decide about them only where nothing is added up.
Parts parts_of(int64_t ids, bool sums, int64_t threads) {
  const int64_t panels = ceil_div(ids, kPanelIds), wanted = ceil_div(ids, sums ? kIds : kIdsOfFew);
  const int64_t multiple = sums ? kEqual : threads;
  return {ids, panels, std::min(panels, wanted == 1 && sums ? 1 : ceil_div(wanted, multiple) * multiple)};
}

// Makes of what parts of the vocabulary say what all of it says: the parts of one row are `stride` numbers apart.
void combine(const double* parts, int64_t count, int64_t stride, bool scored, double* whole) {
  double largest = -INFINITY, id = -1.0;
  for (int64_t i = 0; i < count; ++i) {
    const double* const part = parts + i * stride;
    if (std::isnan(part[0])) {
      largest = part[0], id = -1.0;
      break;
    }
    if (part[0] > largest) largest = part[0], id = part[1];
  }
  whole[0] = largest, whole[1] = id;
  if (!scored) return;
  double total = 0.0, target = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    const double* const part = parts + i * stride;
    if (part[2] > 0.0 && id >= 0.0) total += part[2] * std::exp(part[0] - largest);
    target = part[3] > target || std::isnan(part[3]) ? part[3] : target;
  }
  whole[2] = total, whole[3] = target;
}

}  // namespace

void Matrix::multiply(const float* x, int64_t rows, int64_t first, int64_t count, float* y) const {
  const Kernels& k = kernels();
  const float* const b = bias ? bias + first : nullptr;
  if (dtype == Dtype::panels)
    return k.panel_linear(x, static_cast<const float*>(data) + first * K, b, y, rows, count, K, activation);
  if (is_half(dtype))
    return k.half_linear(x, static_cast<const uint16_t*>(data) + first * K, b, y, rows, count, K,
                         dtype == Dtype::bfloat16_panels, activation);
  const int64_t bits = dtype == Dtype::int4 ? 4 : 8;
  const int64_t before = first ? k.packed_size(first, K, group, bits, has_zeros) : 0;
  const auto packed_linear = rounds_to_bytes ? k.packed_linear_a8 : k.packed_linear;
  packed_linear(x, static_cast<const uint8_t*>(data) + before, b, y, rows, count, K, group, bits, has_zeros, activation);
}

Head::~Head() { std::free(logits_); }

Status Head::answer(const Matrix& matrix, const float* x, int64_t rows, const Question& question) {
  const bool scored = question.targets != nullptr;
  const int64_t ids = std::min(matrix.N, question.vocabulary), chunks = ceil_div(rows, kRows);
  const int64_t at_once = ceil_div(rows, chunks);
  const int64_t useful = ids * matrix.K * (at_once + 1) / 32 / (kWork / 32);
  const int64_t most = std::clamp<int64_t>(useful, 1, threads_here());
  const Parts parts = parts_of(ids, scored, most);
  const int64_t threads = std::min(most, parts.count), room = at_once * parts.widest();
  if (floats_ < threads * room) {
    std::free(logits_);
    logits_ = allocate_floats(threads * room);
    floats_ = logits_ ? threads * room : 0;
    if (!logits_) return Status::failed("no memory for the logits of " + std::to_string(at_once) + " tokens");
  }
  parts_.resize(static_cast<size_t>(parts.count * at_once * 4));
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t n = std::min(at_once, rows - row);
    const auto work = [&](int64_t id, int64_t count) {
      float* const logits = logits_ + id * room;
      for (int64_t part = parts.count * id / count; part < parts.count * (id + 1) / count; ++part) {
        const int64_t begin = parts.begin(part), width = parts.begin(part + 1) - begin;
        matrix.multiply(x + row * matrix.K, n, begin, width, logits);
        kernels().score_logits(logits, n, width, begin, scored ? question.targets + row : nullptr,
                               parts_.data() + part * n * 4);
      }
    };
    if (threads == 1)
      work(0, 1);
    else
      run_parts(static_cast<int>(threads),
                [](const void* body, int64_t id, int64_t count) { (*static_cast<const decltype(work)*>(body))(id, count); },
                &work);
    for (int64_t r = 0; r < n; ++r)
      combine(parts_.data() + 4 * r, parts.count, 4 * n, scored, question.parts + 4 * (row + r));
  }
  return {};
}

}  // namespace portlm::run
