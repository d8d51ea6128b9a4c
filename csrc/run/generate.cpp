#include "run/generate.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <new>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace portlm::run {
namespace {

const Shape kTokens{{0, kBatch}, {0, kSequence}};
const Shape kSlots{{0, kBatch}, {0, kPast | kSequence}};
const Shape kPlaces{{0, kKept}};

}  // namespace

std::unique_ptr<Generator> Generator::make(Program& program, Status& status) {
  try {
    std::unique_ptr<Generator> made(new Generator(program));
    if (made->prepare()) return made;
    status = Status::failed(program.role().name + " gives no logits for token ids alone");
  } catch (const std::bad_alloc&) {
    status = Status::failed("out of memory");
  }
  return nullptr;
}

bool Generator::prepare() {
  const Role& role = program_.role();
  for (size_t i = 0; i < role.inputs.size(); ++i) {
    const Spec& input = role.inputs[i];
    const auto place = static_cast<uint32_t>(i);
    if (input.dtype != Dtype::int64) return false;
    if (input.name == "input_ids" && input.shape == kTokens)
      ids_ = place;
    else if (input.name == "attention_mask" && (input.shape == kSlots || input.shape == kTokens))
      mask_ = place, mask_grows_ = input.shape == kSlots;
    else if (input.name == "position_ids" && input.shape == kTokens)
      positions_ = place;
    else if (input.name == "logits_to_keep" && input.shape == kPlaces)
      kept_ = place;
    else
      return false;
  }
  if (role.outputs.size() != 1 || role.states.empty() || ids_ == kNone) return false;
  const Spec& output = role.outputs[0];
  const uint32_t places = kept_ == kNone ? kSequence : kKept;
  const bool fits = output.name == "logits" && output.dtype == Dtype::float32 && output.shape.size() == 3 &&
                    output.shape[0].symbols == kBatch && output.shape[1].symbols == places && output.shape[2].symbols == 0;
  if (fits) width_ = output.shape[2].size;
  return fits;
}

// A row sees its own slots, which are the last ones.
const int64_t* Generator::mask(const Cache& cache, const int64_t* lengths) {
  const int64_t B = cache.rows(), S = mask_grows_ ? cache.past() + 1 : 1;
  const size_t size = static_cast<size_t>(B * S);
  if (marks_.size() < size) marks_.resize(2 * size);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t padding = mask_grows_ ? S - (lengths[b] + 1) : 0;
    int64_t* const row = marks_.data() + b * S;
    std::fill(row, row + padding, 0);
    std::fill(row + padding, row + S, 1);
  }
  return marks_.data();
}

// Rows of like settings are chosen for together, and the rest one by one.
void Generator::choose(std::vector<Choice>& choices, int64_t* tokens) {
  const size_t rows = choices.size();
  size_t together = rows;
  for (const Choice& choice : choices)
    if (!(choice == choices[0])) together = 1;
  uint64_t seeds[64], streams[64];
  for (size_t b = 0; b < rows;) {
    const Choice& first = choices[b];
    const size_t count = std::min<size_t>({together, rows - b, 64});
    for (size_t i = 0; i < count; ++i) seeds[i] = choices[b + i].seed, streams[i] = choices[b + i].stream;
    kernels().select_tokens(logits_.data() + static_cast<int64_t>(b) * width_, static_cast<int64_t>(count), width_,
                            first.temperature, first.top_k, first.top_p, first.min_p, seeds, streams,
                            first.temperature == 0 ? 0 : first.step, tokens + b);
    b += count;
  }
}

// The tokens of the head's answer; false, and none, if a row has none.
bool Generator::take_largest(int64_t rows, int64_t* tokens) {
  for (int64_t b = 0; b < rows; ++b)
    if (largest_[static_cast<size_t>(4 * b + 1)] < 0) return false;
  for (int64_t b = 0; b < rows; ++b) tokens[b] = static_cast<int64_t>(largest_[static_cast<size_t>(4 * b + 1)]);
  return true;
}

Status Generator::run(Cache& cache, int64_t* lengths, int64_t* tokens, std::vector<Choice>& choices, const Limits& limits,
                      int64_t* tokens_out, int64_t& made, int64_t& bad) {
  using Clock = std::chrono::steady_clock;
  const int64_t B = cache.rows(), zero = 0;
  made = 0, bad = -1;
  const OwnThreads own;
  try {
    bool greedy = program_.has_head();
    for (const Choice& choice : choices) greedy = greedy && choice.temperature == 0;
    greedy ? largest_.resize(static_cast<size_t>(B * 4)) : logits_.resize(static_cast<size_t>(B * width_));
    const Question question{nullptr, limits.vocabulary, largest_.data()};
    if (mask_ != kNone) marks_.resize(static_cast<size_t>(B * (cache.past() + limits.tokens)));  // of all steps to come
    const void* inputs[4] = {};
    void* outputs[1] = {logits_.data()};
    inputs[ids_] = tokens;
    if (positions_ != kNone) inputs[positions_] = lengths;
    if (kept_ != kNone) inputs[kept_] = &zero;
    const auto begin = Clock::now();
    while (made < limits.tokens) {
      if (mask_ != kNone) inputs[mask_] = mask(cache, lengths);
      const Status status = program_.run({B, 1, cache.past(), 1}, inputs, outputs, cache, greedy ? &question : nullptr);
      if (!status.ok()) return status;
      if (greedy && !take_largest(B, tokens)) {  // the same step once more, so that what is wrong can be seen
        cache.grow(-1);
        greedy = false;
        logits_.resize(static_cast<size_t>(B * width_));
        outputs[0] = logits_.data();
        continue;
      }
      if (!greedy) {
        if (limits.vocabulary < width_)
          for (int64_t b = 0; b < B; ++b)
            std::fill(logits_.begin() + b * width_ + limits.vocabulary, logits_.begin() + (b + 1) * width_,
                      -std::numeric_limits<float>::infinity());
        choose(choices, tokens);
      }
      bool ended = false;
      for (int64_t b = 0; b < B; ++b) {
        if (tokens[b] < 0) {
          bad = b;
          cache.grow(-1);
          return {};
        }
        ended = ended || std::binary_search(limits.ends.begin(), limits.ends.end(), tokens[b]);
        tokens_out[made * B + b] = tokens[b];
        ++lengths[b];
        ++choices[static_cast<size_t>(b)].step;
      }
      ++made;
      if (ended || std::chrono::duration<double>(Clock::now() - begin).count() > limits.seconds) break;
    }
    return {};
  } catch (const std::bad_alloc&) {
    return Status::failed("out of memory");
  }
}

}  // namespace portlm::run
