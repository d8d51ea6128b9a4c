#include "run/program.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace portlm::run {
namespace {

constexpr int64_t kAlignment = 16;            // floats
constexpr int64_t kWorthKeeping = 1 << 22;    // floats of an arena that is kept although most of it is not needed

int64_t aligned(int64_t floats) { return (floats + kAlignment - 1) / kAlignment * kAlignment; }

// Gives parts of the arena away and takes them back: always the lowest place that is free and large enough.
class Places {
 public:
  int64_t take(int64_t floats) {
    floats = aligned(floats);
    int64_t begin = 0;
    size_t i = 0;
    for (; i < taken_.size() && taken_[i].begin - begin < floats; ++i) begin = taken_[i].end;
    taken_.insert(taken_.begin() + static_cast<std::ptrdiff_t>(i), {begin, begin + floats});
    most_ = std::max(most_, begin + floats);
    return begin;
  }
  void give_back(int64_t begin) {
    for (size_t i = 0; i < taken_.size(); ++i)
      if (taken_[i].begin == begin) {
        taken_.erase(taken_.begin() + static_cast<std::ptrdiff_t>(i));
        return;
      }
  }
  int64_t most() const { return most_; }

 private:
  struct Part {
    int64_t begin, end;
  };
  std::vector<Part> taken_;  // in order
  int64_t most_ = 0;
};

Status too_large(const Extents& extents) {
  return Status::failed("no memory for a call of " + std::to_string(extents.batch) + " rows with " +
                        std::to_string(extents.sequence) + " tokens");
}

Status bad_index(const std::string& what, int64_t index, int64_t limit) {
  return Status::failed(what + " must be from 0 to " + std::to_string(limit - 1) + ", got " + std::to_string(index));
}

// Copies columns [first, first + width) of `rows` rows, from one distance between rows to another.
void copy_columns(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t width, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(to + row * to_stride, from + row * from_stride, static_cast<size_t>(width) * sizeof(float));
}

// What attention may have beside its scale, 0 for none.
int64_t window(const Step& step) { return step.ints.size() > 5 ? step.ints[5] : 0; }
float softcap(const Step& step) { return step.reals.size() > 1 ? static_cast<float>(step.reals[1]) : 0.0f; }

}  // namespace

std::unique_ptr<Program> Program::make(const PackedFile& file, size_t role, Status& status) {
  try {
    if (role >= file.roles.size()) {
      status = Status::failed("there is no such role");
      return nullptr;
    }
    std::unique_ptr<Program> program(new Program(file, file.roles[role]));
    return program->prepare(status) ? std::move(program) : nullptr;
  } catch (const std::bad_alloc&) {
    status = Status::failed("out of memory");
    return nullptr;
  }
}

Program::~Program() { std::free(arena_); }

bool Program::prepare(Status& status) {
  if (const std::string problem = misfit(role_); !problem.empty()) {
    status = Status::failed(problem);
    return false;
  }
  const size_t values = role_.values.size();
  for (const Spec& state : role_.states)
    heads_.push_back({state.shape[1].size, state.shape[3].size, state.dtype == Dtype::bytes ? 1 : 4});
  root_.resize(values);
  for (size_t v = 0; v < values; ++v) root_[v] = static_cast<uint32_t>(v);
  last_use_.assign(values, 0);
  for (size_t s = 0; s < role_.steps.size(); ++s) {
    const Step& step = role_.steps[s];
    if (step.opcode == Opcode::view) root_[step.outputs[0]] = root_[step.inputs[0]];
    for (const std::vector<uint32_t>* list : {&step.inputs, &step.outputs})
      for (const uint32_t value : *list)
        if (value != kNone) last_use_[root_[value]] = s;
  }
  output_of_.assign(values, kNone);
  for (size_t i = 0; i < role_.outputs.size(); ++i) {
    const uint32_t root = root_[role_.outputs[i].value];
    if (output_of_[root] == kNone) output_of_[root] = static_cast<uint32_t>(i);
  }
  pointers_.assign(values, nullptr);
  for (size_t v = 0; v < values; ++v)
    if (role_.values[v].kind == Kind::weight) pointers_[v] = const_cast<void*>(file_.tensors[role_.values[v].tensor].data);
  counts_.assign(values, 0);
  scratch_.assign(role_.steps.size(), 0);
  find_head();
  return true;
}

void Program::find_head() {
  size_t s = role_.steps.size();
  while (s > 0 && role_.steps[s - 1].opcode == Opcode::view) --s;
  if (s == 0 || role_.outputs.size() != 1) return;
  const Opcode opcode = role_.steps[s - 1].opcode;
  if (opcode != Opcode::linear && opcode != Opcode::linear_a8) return;
  const uint32_t made = role_.steps[s - 1].outputs[0], output = role_.outputs[0].value;
  if (root_[output] == made && last(output) == last(made)) head_step_ = s - 1;
}

int64_t Program::size(const Dim& dim, const Extents& extents) const {
  return dim.size + (dim.symbols & kBatch ? extents.batch : 0) + (dim.symbols & kSequence ? extents.sequence : 0) +
         (dim.symbols & kPast ? extents.past : 0) + (dim.symbols & kKept ? extents.kept : 0);
}

bool Program::elements(const Spec& spec, const Extents& extents, int64_t& count) const {
  int64_t sizes[kMaxRank];
  for (size_t i = 0; i < spec.shape.size(); ++i) sizes[i] = size(spec.shape[i], extents);
  return multiply(sizes, spec.shape.size(), count);
}

// Finds a place in the arena for every computed value, which is free again after the value's last use.
Status Program::plan(const Extents& extents) {
  planned_ = {0, 0, 0, 0};
  for (size_t v = 0; v < role_.values.size(); ++v) {
    const Value& value = role_.values[v];
    int64_t sizes[kMaxRank];
    if (value.kind == Kind::state) continue;
    for (size_t i = 0; i < value.shape.size(); ++i) sizes[i] = size(value.shape[i], extents);
    if (!multiply(sizes, value.shape.size(), counts_[v])) return too_large(extents);
  }
  Places places;
  std::vector<int64_t> begins(role_.values.size(), -1);
  for (size_t s = 0; s < role_.steps.size(); ++s) {
    const Step& step = role_.steps[s];
    if (step.opcode != Opcode::view)
      for (const uint32_t value : step.outputs)
        if (output_of_[value] == kNone) begins[value] = places.take(count(value));
    const bool gathers = step.opcode == Opcode::attention || step.opcode == Opcode::quantized_attention;
    if (gathers && extents.batch * extents.sequence > 1) {
      scratch_[s] = places.take(count(step.outputs[0]));
      places.give_back(scratch_[s]);
    }
    for (const std::vector<uint32_t>* list : {&step.inputs, &step.outputs})
      for (const uint32_t value : *list) {
        const uint32_t root = value == kNone ? kNone : root_[value];
        if (root == kNone || begins[root] < 0 || last_use_[root] != s || pointers_[root] == this) continue;
        places.give_back(begins[root]);
        pointers_[root] = this;  // a mark: given back, and not twice
      }
  }
  if (places.most() > arena_floats_ || (arena_floats_ > kWorthKeeping && places.most() < arena_floats_ / 4)) {
    std::free(arena_);
    arena_floats_ = 0;
    arena_ = allocate_floats(places.most());
    if (!arena_) return too_large(extents);
    arena_floats_ = places.most();
  }
  for (size_t v = 0; v < begins.size(); ++v)
    if (begins[v] >= 0) pointers_[v] = arena_ + begins[v];
  planned_ = extents;
  return {};
}

Status Program::run(const Extents& extents, const void* const* inputs, void* const* outputs, Cache& cache,
                    const Question* question) {
  const Extents& e = extents;
  if (e.batch < 1 || e.sequence < 1 || e.kept < 1 || e.batch != cache.rows() || e.past != cache.past() ||
      e.past > file_.context - e.sequence)
    return Status::failed("a call of " + std::to_string(e.batch) + " rows with " + std::to_string(e.sequence) +
                          " tokens does not fit a state of " + std::to_string(cache.rows()) + " rows with " +
                          std::to_string(cache.past()) + " slots");
  if (question && !has_head()) return Status::failed(role_.name + " has no head that could answer");
  const OwnThreads own;
  question_ = question;
  try {
    if (e.batch != planned_.batch || e.sequence != planned_.sequence || e.kept != planned_.kept)
      if (Status status = plan(e); !status.ok()) return status;
    if (!heads_.empty())
      if (Status status = cache.reserve(e.past + e.sequence, file_.context); !status.ok()) return status;
    for (size_t i = 0; i < role_.inputs.size(); ++i) pointers_[i] = const_cast<void*>(inputs[i]);
    for (size_t i = 0; i < role_.outputs.size(); ++i) {
      const uint32_t root = root_[role_.outputs[i].value];
      if (output_of_[root] == i && role_.values[root].kind == Kind::computed) pointers_[root] = outputs[i];
    }
    for (size_t s = 0; s < role_.steps.size(); ++s)
      if (Status status = least_.empty() ? execute(role_.steps[s], s, e, cache) : timed(s, e, cache); !status.ok())
        return status;
    for (size_t i = 0; i < role_.outputs.size() && !question; ++i) {
      const uint32_t value = role_.outputs[i].value;
      const size_t item = role_.values[value].dtype == Dtype::float32 ? sizeof(float) : sizeof(int64_t);
      if (pointers_[root_[value]] != outputs[i])
        std::memcpy(outputs[i], pointers_[root_[value]], static_cast<size_t>(count(value)) * item);
    }
    if (!heads_.empty()) cache.grow(e.sequence);
    return {};
  } catch (const std::bad_alloc&) {  // of a kernel's own memory
    return too_large(e);
  }
}

Status Program::timed(size_t index, const Extents& extents, Cache& cache) {
  const auto begin = std::chrono::steady_clock::now();
  Status status = execute(role_.steps[index], index, extents, cache);
  const int64_t taken = std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
  least_[index] = least_[index] ? std::min(least_[index], taken) : taken;
  return status;
}

Status Program::execute(const Step& step, size_t index, const Extents& extents, Cache& cache) {
  const Kernels& k = kernels();
  const std::vector<uint32_t>&in = step.inputs, &out = step.outputs;
  const auto epsilon = [&step] { return static_cast<float>(step.reals[0]); };
  const auto width = [this](uint32_t value) { return last(value); };
  const auto rows = [this](uint32_t value) { return count(value) / last(value); };
  switch (step.opcode) {
    case Opcode::embedding: return embed(step);
    case Opcode::add: {
      const float *a = floats(in[0]), *b = floats(in[1]);
      float* const y = floats(out[0]);
      for (int64_t i = 0, n = count(out[0]); i < n; ++i) y[i] = a[i] + b[i];
      break;
    }
    case Opcode::view: break;
    case Opcode::slice:
      copy_columns(floats(in[0]) + step.ints[0], width(in[0]), floats(out[0]), width(out[0]), width(out[0]), rows(out[0]));
      break;
    case Opcode::concat: {
      int64_t first = 0;
      for (const uint32_t part : in) {
        copy_columns(floats(part), width(part), floats(out[0]) + first, width(out[0]), width(part), rows(out[0]));
        first += width(part);
      }
      break;
    }
    case Opcode::rows:
      for (int64_t j = 0; j < extents.kept; ++j) {
        const int64_t at = integers(in[1])[j], C = width(in[0]);
        if (at < 0 || at >= extents.sequence) return bad_index(role_.values[in[1]].name, at, extents.sequence);
        copy_columns(floats(in[0]) + at * C, extents.sequence * C, floats(out[0]) + j * C, extents.kept * C, C, extents.batch);
      }
      break;
    case Opcode::linear:
    case Opcode::linear_a8: {
      const Matrix m = matrix(step);
      if (question_ && index == head_step_) return head_.answer(m, floats(in[0]), map_rows(step), *question_);
      m.multiply(floats(in[0]), map_rows(step), 0, m.N, floats(out[0]));
      break;
    }
    case Opcode::layer_norm:
      k.layer_norm_fwd(floats(in[0]), nullptr, floats(in[1]), floats(in[2]), epsilon(), floats(out[0]), nullptr, nullptr,
                       nullptr, rows(in[0]), width(in[0]));
      break;
    case Opcode::add_layer_norm:
      k.layer_norm_fwd(floats(in[0]), floats(in[1]), floats(in[2]), floats(in[3]), epsilon(), floats(out[0]), floats(out[1]),
                       nullptr, nullptr, rows(in[0]), width(in[0]));
      break;
    case Opcode::rms_norm:
      k.rms_norm_fwd(floats(in[0]), nullptr, floats(in[1]), epsilon(), floats(out[0]), nullptr, nullptr, rows(in[0]),
                     width(in[0]));
      break;
    case Opcode::add_rms_norm:
      k.rms_norm_fwd(floats(in[0]), floats(in[1]), floats(in[2]), epsilon(), floats(out[0]), floats(out[1]), nullptr,
                     rows(in[0]), width(in[0]));
      break;
    case Opcode::swiglu:
      if (in.size() == 1)
        k.swiglu_halves(floats(in[0]), floats(out[0]), rows(out[0]), width(out[0]));
      else
        k.swiglu_fwd(floats(in[0]), floats(in[1]), floats(out[0]), count(out[0]));
      break;
    case Opcode::rotary: return rotate(step, extents);
    case Opcode::heads: return gather_heads(step, extents);
    case Opcode::attention: return attend(step, arena_ + scratch_[index], extents, cache);
    case Opcode::quantized_attention: return attend_to_bytes(step, arena_ + scratch_[index], extents, cache);
  }
  return {};
}

// Rows of a table that is float32, in panels, or of small numbers.
Status Program::embed(const Step& step) {
  const Kernels& k = kernels();
  const Value& table = role_.values[step.inputs[1]];
  const int64_t* const ids = integers(step.inputs[0]);
  const void* const data = pointers_[root_[step.inputs[1]]];
  const int64_t n = count(step.inputs[0]), V = table.shape[0].size, C = table.shape[1].size;
  float* const y = floats(step.outputs[0]);
  int64_t wrong = -1;
  if (table.dtype == Dtype::float32) {
    wrong = k.embedding_fwd(ids, static_cast<const float*>(data), y, n, V, C);
  } else if (table.dtype == Dtype::panels) {
    wrong = k.panel_rows(ids, static_cast<const float*>(data), y, n, V, C);
  } else if (is_half(table.dtype)) {
    wrong = k.half_rows(ids, static_cast<const uint16_t*>(data), y, n, V, C, table.dtype == Dtype::bfloat16_panels);
  } else {
    const Tensor& tensor = file_.tensors[table.tensor];
    wrong = k.packed_rows(ids, static_cast<const uint8_t*>(data), y, n, V, C, tensor.group,
                          table.dtype == Dtype::int4 ? 4 : 8, tensor.has_zeros);
  }
  return wrong >= 0 ? bad_index(role_.values[step.inputs[0]].name, ids[wrong], V) : Status();
}

Matrix Program::matrix(const Step& step) const {
  const Value& value = role_.values[step.inputs[1]];
  const Tensor& tensor = file_.tensors[value.tensor];
  return {value.dtype,
          pointers_[step.inputs[1]],
          maybe(step.inputs[2]),
          last(step.outputs[0]),
          last(step.inputs[0]),
          tensor.group,
          tensor.has_zeros,
          step.opcode == Opcode::linear_a8,
          static_cast<int>(step.ints[0])};
}

// Of a step whose tables of a rotation are its inputs 2 and 3.
Status Program::check_positions(const Step& step, int64_t tokens) const {
  const int64_t* const positions = integers(step.inputs[1]);
  const int64_t limit = role_.values[step.inputs[2]].shape[0].size;
  for (int64_t i = 0; i < tokens; ++i)
    if (positions[i] < 0 || positions[i] >= limit) return bad_index(role_.values[step.inputs[1]].name, positions[i], limit);
  return {};
}

Status Program::rotate(const Step& step, const Extents& extents) {
  const int64_t tokens = extents.batch * extents.sequence;
  if (Status status = check_positions(step, tokens); !status.ok()) return status;
  kernels().rotary_fwd(floats(step.inputs[0]) + step.ints[1], last(step.inputs[0]), floats(step.inputs[2]),
                       floats(step.inputs[3]), integers(step.inputs[1]), floats(step.outputs[0]), tokens, tokens, step.ints[0],
                       2 * last(step.inputs[2]), 0);
  return {};
}

// Queries and keys of all tokens side by side, turned on the way, and values where they do not lie so already.
Status Program::gather_heads(const Step& step, const Extents& extents) {
  const int64_t tokens = extents.batch * extents.sequence, D = step.ints[0], R = 2 * last(step.inputs[2]);
  if (Status status = check_positions(step, tokens); !status.ok()) return status;
  float* y = floats(step.outputs[0]);
  for (size_t i = 1; i < step.ints.size(); i += 4) {
    const int64_t* const part = step.ints.data() + i;  // heads, first, stride, turned
    kernels().rotary_heads(floats(step.inputs[0]) + part[1], last(step.inputs[0]), part[2], floats(step.inputs[2]),
                           floats(step.inputs[3]), integers(step.inputs[1]), y, last(step.outputs[0]), tokens, part[0], D,
                           part[3] ? R : 0);
    y += part[0] * D;
  }
  return {};
}

// Writes the new keys and values behind those that are there, and lets the queries look at all of them.
Status Program::attend(const Step& step, float* gathered, const Extents& extents, Cache& cache) {
  const auto [B, T, P, kept] = extents;
  const size_t first_state = role_.inputs.size();
  const size_t tensors[] = {step.inputs[3] - first_state, step.inputs[4] - first_state};
  const auto [K, D, item] = heads_[tensors[0]];
  const int64_t H = step.ints[0], batch_stride = cache.row_stride(tensors[0]), head_stride = cache.head_stride(tensors[0]);
  for (size_t i = 0; i < 2; ++i) {
    const int64_t W = last(step.inputs[1 + i]);
    const float* const source = floats(step.inputs[1 + i]) + step.ints[3 + i];
    float* const to = cache.floats(tensors[i]);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t k = 0; k < K; ++k)
        copy_columns(source + b * T * W + k * D, W, to + b * batch_stride + k * head_stride + P * D, D, D, T);
  }
  const float* const q = queries(step, gathered, extents, H * D);
  const int64_t* const mask = step.inputs[5] == kNone ? nullptr : integers(step.inputs[5]);
  kernels().cached_attention(q, cache.floats(tensors[0]), cache.floats(tensors[1]), batch_stride, head_stride, mask,
                             static_cast<float>(step.reals[0]), floats(step.outputs[0]), B, T, P + T, H, K, D, window(step),
                             softcap(step));
  return {};
}

// The same for states of bytes, each followed by its scales.
Status Program::attend_to_bytes(const Step& step, float* gathered, const Extents& extents, Cache& cache) {
  const auto [B, T, P, kept] = extents;
  size_t tensors[4];
  for (size_t i = 0; i < 4; ++i) tensors[i] = step.inputs[3 + i] - role_.inputs.size();
  const auto [K, D, item] = heads_[tensors[0]];
  const int64_t H = step.ints[0];
  const int64_t row = cache.row_stride(tensors[0]), head = cache.head_stride(tensors[0]);
  const int64_t scales_row = cache.row_stride(tensors[1]), scales_head = cache.head_stride(tensors[1]);
  for (size_t i = 0; i < 2; ++i)
    kernels().append_bytes(floats(step.inputs[1 + i]) + step.ints[3 + i], last(step.inputs[1 + i]), cache.bytes(tensors[2 * i]),
                           row, head, cache.floats(tensors[2 * i + 1]), scales_row, scales_head, B, K, P, T, D);
  const int64_t* const mask = step.inputs[7] == kNone ? nullptr : integers(step.inputs[7]);
  kernels().quantized_attention(queries(step, gathered, extents, H * D), cache.bytes(tensors[0]), cache.floats(tensors[1]),
                                cache.bytes(tensors[2]), cache.floats(tensors[3]), row, head, scales_row, scales_head, mask,
                                static_cast<float>(step.reals[0]), floats(step.outputs[0]), B, T, P + T, H, K, D, window(step),
                                softcap(step));
  return {};
}

// The queries of all tokens side by side, as kernels want them.
const float* Program::queries(const Step& step, float* gathered, const Extents& extents, int64_t width) const {
  const int64_t W = last(step.inputs[0]), rows = extents.batch * extents.sequence;
  const float* const q = floats(step.inputs[0]) + step.ints[2];
  if (W == width || rows == 1) return q;
  copy_columns(q, W, gathered, width, width, rows);
  return gathered;
}

}  // namespace portlm::run
