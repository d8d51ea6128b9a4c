// Follows shapes and types through the steps of a role, before any of them runs.
#include <algorithm>

#include "run/program.h"

namespace portlm::run {
namespace {

struct Wrong {
  std::string why;
};

void need(bool fine, const std::string& what) {
  if (!fine) throw Wrong{what};
}

// One step beside the values it takes; every question throws Wrong if the answer is not what the step needs.
class Call {
 public:
  Call(const Role& role, const Step& step) : role_(role), step_(step) {}

  void counts(size_t inputs, size_t outputs, size_t ints = 0, size_t reals = 0) const {
    need(step_.inputs.size() == inputs && step_.outputs.size() == outputs, "takes other values");
    need(step_.ints.size() == ints && step_.reals.size() == reals, "takes other numbers");
  }

  bool has(size_t i) const { return step_.inputs[i] != kNone; }

  const Value& value(size_t i) const {
    need(has(i), "lacks input " + std::to_string(i));
    return role_.values[step_.inputs[i]];
  }

  const Shape& shape(size_t i, Dtype dtype = Dtype::float32) const {
    const Value& found = value(i);
    need(found.kind != Kind::state && found.dtype == dtype, "cannot take " + found.name);
    return found.shape;
  }

  // A shape with a last axis of known size.
  const Shape& rowwise(size_t i) const {
    const Shape& found = shape(i);
    need(!found.empty() && found.back().symbols == 0, "needs columns in " + value(i).name);
    return found;
  }

  // The sizes of a matrix or vector that does not change from call to call.
  void fixed(size_t i, std::initializer_list<int64_t*> sizes, Dtype dtype = Dtype::float32) const {
    const Shape& found = shape(i, dtype);
    bool fits = found.size() == sizes.size();
    for (size_t k = 0; fits && k < found.size(); ++k) {
      int64_t& wanted = *sizes.begin()[k];
      fits = found[k].symbols == 0 && (wanted == 0 || wanted == found[k].size);
      wanted = found[k].size;
    }
    need(fits, "cannot take " + value(i).name + " " + text_of(found));
  }

  // A tensor (batch, sequence, W) of which columns [first, first + heads * width) are there; returns W.
  int64_t columns(size_t i, int64_t first, int64_t heads, int64_t width) const {
    const Shape& found = rowwise(i);
    need(found.size() == 3 && found[0].symbols == kBatch && found[1].symbols == kSequence, "needs tokens in " + value(i).name);
    const int64_t W = found[2].size;
    need(first >= 0 && first < W && heads >= 1 && width >= 1 && heads <= (W - first) / width,
         "reads columns that " + value(i).name + " does not have");
    return W;
  }

  void output(size_t i, const Shape& wanted, Dtype dtype = Dtype::float32) const {
    const Value& made = role_.values[step_.outputs[i]];
    need(made.dtype == dtype && made.shape == wanted, "makes " + made.name + " " + text_of(wanted) + ", not " + text_of(made.shape));
  }

  void output_columns(size_t i, const Shape& like, int64_t columns) const {
    Shape wanted = like;
    wanted.back() = {columns, 0};
    output(i, wanted);
  }

  int64_t number(size_t i, int64_t least, int64_t most) const {
    need(step_.ints[i] >= least && step_.ints[i] <= most, "has " + std::to_string(step_.ints[i]) + " where it cannot be");
    return step_.ints[i];
  }

  const Step& step() const { return step_; }

 private:
  const Role& role_;
  const Step& step_;
};

bool is_quantized(Dtype dtype) { return dtype == Dtype::int4 || dtype == Dtype::int8; }

// Whether linear maps read it: in panels, or of small numbers.
bool is_matrix(Dtype dtype) { return in_panels(dtype) || is_quantized(dtype); }

void embedding(const Call& call) {
  call.counts(2, 1);
  int64_t V = 0, C = 0;
  call.fixed(1, {&V, &C}, is_matrix(call.value(1).dtype) ? call.value(1).dtype : Dtype::float32);
  Shape wanted = call.shape(0, Dtype::int64);
  wanted.push_back({C, 0});
  call.output(0, wanted);
}

void add(const Call& call) {
  call.counts(2, 1);
  need(call.shape(0) == call.shape(1), "adds two shapes");
  call.output(0, call.shape(0));
}

// Constant factor and sorted symbols of the number of elements.
bool elements(const Shape& shape, int64_t& factor, std::vector<uint32_t>& symbols) {
  std::vector<int64_t> sizes;
  for (const Dim& dim : shape)
    if (dim.symbols)
      symbols.push_back(dim.symbols);
    else
      sizes.push_back(dim.size);
  std::sort(symbols.begin(), symbols.end());
  return multiply(sizes.data(), sizes.size(), factor);
}

void view(const Call& call, const Role& role) {
  call.counts(1, 1);
  const Value &from = call.value(0), &to = role.values[call.step().outputs[0]];
  int64_t before = 0, after = 0;
  std::vector<uint32_t> symbols, others;
  const bool known = elements(from.shape, before, symbols) && elements(to.shape, after, others);
  need(from.kind != Kind::state && from.kind != Kind::weight && known && before == after && symbols == others && from.dtype == to.dtype,
       "sees " + text_of(from.shape) + " as " + text_of(to.shape));
}

void slice(const Call& call, const Role& role) {
  call.counts(1, 1, 1);
  const Shape& x = call.rowwise(0);
  const Shape& y = role.values[call.step().outputs[0]].shape;
  need(y.size() == x.size() && y.back().symbols == 0, "makes another shape");
  const int64_t first = call.number(0, 0, x.back().size - 1), width = y.back().size;
  need(width <= x.back().size - first, "reads columns that are not there");
  call.output_columns(0, x, width);
}

void concat(const Call& call) {
  const size_t parts = call.step().inputs.size();
  need(parts >= 1, "takes nothing");
  call.counts(parts, 1);
  int64_t width = 0;
  for (size_t i = 0; i < parts; ++i) {
    Shape part = call.rowwise(i);
    width += part.back().size;
    part.back() = call.rowwise(0).back();
    need(part == call.rowwise(0), "joins shapes that differ");
  }
  call.output_columns(0, call.rowwise(0), width);
}

void rows(const Call& call) {
  call.counts(2, 1);
  const Shape x = call.rowwise(0), places = call.shape(1, Dtype::int64);
  call.columns(0, 0, 1, 1);
  need(places == Shape{{0, kKept}}, "needs places");
  call.output(0, {x[0], {0, kKept}, x[2]});
}

void linear(const Call& call, bool quantized) {
  call.counts(3, 1, 1);
  call.number(0, 0, 4);
  const Shape& x = call.rowwise(0);
  int64_t N = 0, K = x.back().size;
  const Dtype dtype = call.value(1).dtype;
  call.fixed(1, {&N, &K}, (quantized ? is_quantized(dtype) : is_matrix(dtype)) ? dtype : quantized ? Dtype::int8 : Dtype::panels);
  if (call.has(2)) call.fixed(2, {&N});
  call.output_columns(0, x, N);
}

void norm(const Call& call, bool has_bias, bool has_residual) {
  const size_t weight = has_residual ? 2 : 1;
  call.counts(weight + (has_bias ? 2 : 1), has_residual ? 2 : 1, 0, 1);
  const Shape& x = call.rowwise(0);
  int64_t C = x.back().size;
  call.fixed(weight, {&C});
  if (has_bias) call.fixed(weight + 1, {&C});
  call.output(0, x);
  if (!has_residual) return;
  need(call.shape(1) == x, "adds two shapes");
  call.output(1, x);
}

void swiglu(const Call& call) {
  if (call.step().inputs.size() == 2) {
    call.counts(2, 1);
    need(call.shape(0) == call.shape(1), "multiplies two shapes");
    return call.output(0, call.shape(0));
  }
  call.counts(1, 1);
  const int64_t width = call.rowwise(0).back().size;
  need(width % 2 == 0, "needs two halves");
  call.output_columns(0, call.shape(0), width / 2);
}

// The tables of a rotation (L, R / 2), and a position for each token; returns R.
int64_t rotation(const Call& call) {
  int64_t L = 0, half = 0;
  call.fixed(2, {&L, &half});
  call.fixed(3, {&L, &half});
  need(call.shape(1, Dtype::int64) == Shape{{0, kBatch}, {0, kSequence}}, "needs a position for each token");
  return 2 * half;
}

void rotary(const Call& call) {
  call.counts(4, 1, 2);
  const int64_t H = call.step().ints[0], D = rotation(call);
  call.columns(0, call.step().ints[1], H, D);
  call.output_columns(0, call.shape(0), H * D);
}

// ints: the width of a head, and for each part its heads, first column, columns from head to head and whether it is turned.
void heads(const Call& call) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const size_t count = call.step().ints.size();
  need(count % 4 == 1 && count > 1, "has no parts");
  call.counts(4, 1, count);
  const int64_t D = call.number(0, rotation(call), kMost), W = call.columns(0, 0, 1, 1);
  int64_t width = 0;
  for (size_t i = 1; i < count; i += 4) {
    const int64_t H = call.number(i, 1, kMost), first = call.number(i + 1, 0, kMost), stride = call.number(i + 2, D, kMost);
    call.number(i + 3, 0, 1);
    need((H - 1) * stride + first + D <= W, "reads columns that " + call.value(0).name + " does not have");
    width += H * D;  // at most W for each of few parts
  }
  call.output_columns(0, call.shape(0), width);
}

// A state (batch, K, past, D).
void expect_state(const Call& call, size_t i, Dtype dtype, int64_t K, int64_t D) {
  const Value& found = call.value(i);
  const bool fits = found.kind == Kind::state && found.dtype == dtype && found.shape[1].size == K && found.shape[3].size == D;
  need(fits, "cannot keep its slots in " + found.name);
}

// Queries, keys and values, then the states that take them, each of bytes with its scales, then a mask. A window and a soft cap
// come together, 0 for none.
void attention(const Call& call, bool quantized) {
  const bool bounded = call.step().ints.size() == 6;
  call.counts(quantized ? 8 : 6, 1, bounded ? 6 : 5, bounded ? 2 : 1);
  if (bounded) {
    call.number(5, 0, int64_t{1} << 31);
    need(call.step().reals[1] >= 0, "has a negative soft cap");
  }
  const Value& keys = call.value(3);
  need(keys.kind == Kind::state, "needs states");
  const int64_t K = keys.shape[1].size, D = keys.shape[3].size;
  for (size_t i = 3; i + 1 < call.step().inputs.size(); ++i) {
    const bool scales = quantized && i % 2 == 0;
    expect_state(call, i, quantized && !scales ? Dtype::bytes : Dtype::float32, K, scales ? 1 : D);
    for (size_t j = 3; j < i; ++j) need(call.step().inputs[i] != call.step().inputs[j], "needs states that differ");
  }
  const int64_t H = call.number(0, K, int64_t{1} << 31);
  call.number(1, K, K);
  need(H % K == 0, "shares heads unevenly");
  call.columns(0, call.step().ints[2], H, D);
  call.columns(1, call.step().ints[3], K, D);
  call.columns(2, call.step().ints[4], K, D);
  const size_t mask = quantized ? 7 : 5;
  if (call.has(mask))
    need(call.shape(mask, Dtype::int64) == Shape{{0, kBatch}, {0, kPast | kSequence}}, "needs a mask of all slots");
  call.output_columns(0, call.shape(0), H * D);
}

void check(const Role& role, const Step& step) {
  const Call call(role, step);
  switch (step.opcode) {
    case Opcode::embedding: return embedding(call);
    case Opcode::add: return add(call);
    case Opcode::view: return view(call, role);
    case Opcode::slice: return slice(call, role);
    case Opcode::concat: return concat(call);
    case Opcode::rows: return rows(call);
    case Opcode::linear: return linear(call, false);
    case Opcode::linear_a8: return linear(call, true);
    case Opcode::layer_norm: return norm(call, true, false);
    case Opcode::add_layer_norm: return norm(call, true, true);
    case Opcode::rms_norm: return norm(call, false, false);
    case Opcode::add_rms_norm: return norm(call, false, true);
    case Opcode::swiglu: return swiglu(call);
    case Opcode::rotary: return rotary(call);
    case Opcode::attention: return attention(call, false);
    case Opcode::quantized_attention: return attention(call, true);
    case Opcode::heads: return heads(call);
  }
  need(false, "is unknown");
}

}  // namespace

std::string misfit(const Role& role) {
  try {
    for (const Spec& state : role.states) {
      const Shape& shape = state.shape;
      const bool fits = (state.dtype == Dtype::float32 || state.dtype == Dtype::bytes) && shape.size() == 4 && shape[0].symbols == kBatch &&
                        shape[1].symbols == 0 && shape[2].symbols == kPast && shape[3].symbols == 0;
      need(fits, "state " + state.name + " is no cache of keys or values");
    }
    for (const Spec& input : role.inputs)
      for (const Dim& dim : input.shape)
        need(dim.symbols != kPast, "input " + input.name + " has as many elements as there are slots");
  } catch (const Wrong& wrong) {
    return wrong.why;
  }
  std::vector<bool> defined(role.values.size()), used(role.values.size());
  for (size_t v = 0; v < role.values.size(); ++v) defined[v] = role.values[v].kind != Kind::computed;
  for (size_t s = 0; s < role.steps.size(); ++s) {
    const Step& step = role.steps[s];
    try {
      for (const uint32_t value : step.inputs) {
        if (value == kNone) continue;
        need(defined[value], "reads " + role.values[value].name + ", which nothing before it computes");
        const bool state = role.values[value].kind == Kind::state;
        const bool attends = step.opcode == Opcode::attention || step.opcode == Opcode::quantized_attention;
        need(!state || (attends && !used[value]), "cannot take " + role.values[value].name);
        if (state) used[value] = true;
      }
      check(role, step);
      for (const uint32_t value : step.outputs) {
        need(!defined[value], "computes " + role.values[value].name + ", which is known already");
        defined[value] = true;
      }
    } catch (const Wrong& wrong) {
      return "step " + std::to_string(s) + " (" + step.name + ") " + wrong.why;
    }
  }
  for (size_t v = 0; v < role.values.size(); ++v) {
    if (!defined[v]) return "nothing computes " + role.values[v].name;
    if (role.values[v].kind == Kind::state && !used[v]) return "nothing reads the state " + role.values[v].name;
  }
  return "";
}

}  // namespace portlm::run
