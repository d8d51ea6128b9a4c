// The last product of a decoder, whose many outputs are logits: what is asked of them is taken while they are in cache, a
// part of the vocabulary after the other, and they are never in memory together.
#pragma once

#include <cstdint>
#include <vector>

#include "run/packed_file.h"
#include "run/status.h"

namespace portlm::run {

// y = activation(x W^T + bias) for W (N, K) in panels or of 4 or 8 bits.
struct Matrix {
  Dtype dtype;
  const void* data;
  const float* bias;  // or nullptr
  int64_t N, K, group;
  bool has_zeros;
  bool rounds_to_bytes;  // activations, of a matrix of 4 or 8 bits: packed_linear_a8
  int activation;

  // Columns [first, first + count) of y for `rows` rows of x; first is a multiple of kPanelIds. Each of them is the same, bit
  // for bit, whatever is beside it.
  void multiply(const float* x, int64_t rows, int64_t first, int64_t count, float* y) const;
};

constexpr int64_t kPanelIds = 64;

// What a call wants to know of its logits, if it wants none of them.
struct Question {
  const int64_t* targets;  // a token for each row, or nullptr if only the largest logit is asked for
  int64_t vocabulary;      // ids from here on are not looked at
  double* parts;           // (rows, 4), as of score_logits in cpu/kernels.def, of the whole vocabulary
};

class Head {
 public:
  Head() = default;
  ~Head();
  Head(const Head&) = delete;
  Head& operator=(const Head&) = delete;

  // The answer for each row of x: the same, bit for bit, for any number of threads, and whatever rows are beside it.
  Status answer(const Matrix& matrix, const float* x, int64_t rows, const Question& question);

  // Floats of the memory that logits are in.
  int64_t scratch() const { return floats_; }

 private:
  float* logits_ = nullptr;
  int64_t floats_ = 0;
  std::vector<double> parts_;
};

}  // namespace portlm::run
