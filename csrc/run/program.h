// One role of a packed file, ready to run: its steps as calls of kernels, over memory that is planned once per size.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "run/head.h"
#include "run/packed_file.h"
#include "run/state.h"
#include "run/status.h"

namespace portlm::run {

// How large the symbols are in one call.
struct Extents {
  int64_t batch, sequence, past, kept;
};

// Says in one line which step does not fit what it is given, or "". Whatever passes this cannot make a kernel leave its
// memory, as long as inputs and outputs are as large as their specs say.
std::string misfit(const Role& role);

// Runs one call at a time: who has several threads takes turns.
class Program {
 public:
  // The file must outlive it; nullptr if a step does not fit what it is given, and why.
  static std::unique_ptr<Program> make(const PackedFile& file, size_t role, Status& status);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const Role& role() const { return role_; }
  const std::vector<Heads>& heads() const { return heads_; }

  // Elements of an input or output; false if they are more than memory holds.
  bool elements(const Spec& spec, const Extents& extents, int64_t& count) const;

  // Runs every step. The cache grows by extents.sequence slots, or is as before if this fails.
  // inputs and outputs are in the order of the specs; an input that attention alone reads as its mask may be nullptr,
  // for a mask of ones. With a question (only if has_head()), its answer is written in place of the one output, which may be
  // nullptr.
  Status run(const Extents& extents, const void* const* inputs, void* const* outputs, Cache& cache,
             const Question* question = nullptr);

  // Whether the one output is what a linear map gives that nothing reads. Elements of a row of it, and of its scratch memory.
  bool has_head() const { return head_step_ < role_.steps.size(); }
  int64_t head_width() const { return has_head() ? last(role_.outputs[0].value) : 0; }
  int64_t head_scratch() const { return head_.scratch(); }

  // From now on each step's time is taken, the least of all calls: nanoseconds by step, 0 before the first call.
  void watch() { least_.assign(role_.steps.size(), 0); }
  const std::vector<int64_t>& least() const { return least_; }

 private:
  Program(const PackedFile& file, const Role& role) : file_(file), role_(role) {}
  bool prepare(Status& status);
  Status plan(const Extents& extents);
  Status execute(const Step& step, size_t index, const Extents& extents, Cache& cache);
  Status timed(size_t index, const Extents& extents, Cache& cache);
  int64_t size(const Dim& dim, const Extents& extents) const;
  int64_t count(uint32_t value) const { return counts_[value]; }
  int64_t last(uint32_t value) const { return role_.values[value].shape.back().size; }
  float* floats(uint32_t value) const { return static_cast<float*>(pointers_[root_[value]]); }
  const float* maybe(uint32_t value) const { return value == kNone ? nullptr : floats(value); }
  const int64_t* integers(uint32_t value) const { return static_cast<const int64_t*>(pointers_[root_[value]]); }
  Status embed(const Step& step);
  void find_head();
  Matrix matrix(const Step& step) const;
  int64_t map_rows(const Step& step) const { return count(step.inputs[0]) / last(step.inputs[0]); }
  Status attend(const Step& step, float* gathered, const Extents& extents, Cache& cache);
  Status attend_to_bytes(const Step& step, float* gathered, const Extents& extents, Cache& cache);
  const float* queries(const Step& step, float* gathered, const Extents& extents, int64_t width) const;
  Status check_positions(const Step& step, int64_t tokens) const;
  Status rotate(const Step& step, const Extents& extents);
  Status gather_heads(const Step& step, const Extents& extents);

  const PackedFile& file_;
  const Role& role_;
  std::vector<Heads> heads_;             // of the states
  std::vector<uint32_t> root_;           // the value whose memory a value has: its own, or that of what it is a view of
  std::vector<size_t> last_use_;         // by root: the step after which its memory is free
  std::vector<uint32_t> output_of_;      // by root: the output that has its memory, or kNone
  std::vector<void*> pointers_;          // by root
  std::vector<int64_t> counts_;          // elements, by value
  std::vector<int64_t> scratch_;         // by step: where its own memory is in the arena
  std::vector<int64_t> least_;           // by step, if they are watched
  size_t head_step_ = SIZE_MAX;
  Head head_;
  const Question* question_ = nullptr;   // of the call that runs
  Extents planned_{0, 0, 0, 0};
  float* arena_ = nullptr;
  int64_t arena_floats_ = 0;
};

}  // namespace portlm::run
