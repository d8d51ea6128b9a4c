// The loop of generation: a token for every row, and again, until one of them ends, the time is up or there are enough.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "run/program.h"

namespace portlm::run {

// How a row's tokens are chosen, as core/ops/token_selection.py defines it.
struct Choice {
  double temperature;
  int64_t top_k;
  double top_p, min_p;
  uint64_t seed, stream, step;  // step counts the tokens of this row
  bool operator==(const Choice& other) const {
    return temperature == other.temperature && top_k == other.top_k && top_p == other.top_p && min_p == other.min_p &&
           (temperature == 0 || step == other.step);
  }
};

struct Limits {
  int64_t vocabulary;         // ids from here on stand for no token
  std::vector<int64_t> ends;  // ids that end a row, sorted
  int64_t tokens;             // of a row, at most
  double seconds;             // after which no further token is begun
};

class Generator {
 public:
  // nullptr if the role is no decoder that gives logits for token ids alone, and why.
  static std::unique_ptr<Generator> make(Program& program, Status& status);

  // Goes on with B rows.
  //
  // lengths (B) tokens that each row has read, tokens (B) the next one to read, choices (B); all three move on. made
  // receives how many tokens each row got, tokens_out (made, B) these. The last of them have not been read. If the logits
  // of a row are no numbers, bad is that row, and all is as before that step but for tokens; otherwise bad is -1.
  Status run(Cache& cache, int64_t* lengths, int64_t* tokens, std::vector<Choice>& choices, const Limits& limits,
             int64_t* tokens_out, int64_t& made, int64_t& bad);

  // (B, V) of the last step, if a row of it was bad. Where every row takes the largest logit, no step leaves them otherwise.
  const float* logits() const { return logits_.data(); }
  int64_t width() const { return width_; }

 private:
  Generator(Program& program) : program_(program) {}
  bool prepare();
  const int64_t* mask(const Cache& cache, const int64_t* lengths);
  void choose(std::vector<Choice>& choices, int64_t* tokens);
  bool take_largest(int64_t rows, int64_t* tokens);

  Program& program_;
  int64_t width_ = 0;
  // Places of the inputs; kNone if there is none.
  uint32_t ids_ = kNone, mask_ = kNone, positions_ = kNone, kept_ = kNone;
  bool mask_grows_ = false;
  std::vector<float> logits_;
  std::vector<double> largest_;  // (B, 4), of a head that is asked for no more
  std::vector<int64_t> marks_;  // the mask's memory
};

}  // namespace portlm::run
