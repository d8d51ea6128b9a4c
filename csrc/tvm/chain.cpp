// Several functions of this folder in one call of TVM's virtual machine.
//
// A call of the virtual machine costs a shape, a tensor and two visits of its registers beside the kernel, more than a
// small kernel itself. A chain's inner values lie in memory of this thread that the next call takes again.
//
// chain(recipe, arguments...) runs the recipe's steps; what they return, not what they write, is the result. A recipe is
// text: "lead width:place width:place|function part part ...|...". The first two axes of argument number `lead` are those
// of the inner values, which are (B, T, width) each; those of one place share its memory. A part is $n, an argument; %n, an inner value; @n, what a step before
// returned; >n, the place of what this one returns; i7 or r0.5, a number.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tvm/call.h"

namespace portlm::tvm {
namespace {

constexpr int64_t kAlignment = 16;            // floats
constexpr int64_t kWorthKeeping = 1 << 20;    // floats of inner values; beyond, a chain gives its memory back
constexpr int64_t kMostColumns = int64_t{1} << 31;
constexpr size_t kMostParts = 32;

struct Part {
  char kind;
  int64_t index;
  Any number;
};

struct Step {
  Function function;
  std::vector<Part> parts;
  int64_t result = -1;
};

struct Recipe {
  int64_t lead = 0, arguments = 0;  // arguments: how many there must be
  std::vector<int64_t> widths, places;  // of inner values
  std::vector<int64_t> rooms;           // the largest width of each place
  std::vector<Step> steps;
  int64_t results = 0;
};

std::vector<std::string> split(std::string_view text, char at) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(at, begin), text.size());
    if (end > begin) parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

int64_t number(const Call& call, const std::string& text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end) call.fail("the recipe has '" + text + "' for a number");
  return value;
}

Part part(const Call& call, const std::string& text) {
  Part made{text[0], 0, {}};
  const std::string rest = text.substr(1);
  if (made.kind == 'r') {
    made.number.type_index = kDouble;
    made.number.real = std::strtod(rest.c_str(), nullptr);
  } else {
    made.index = made.number.integer = number(call, rest);
    made.number.type_index = kInteger;
    if (made.kind != 'i' && (made.index < 0 || made.index >= (1 << 20))) call.fail("the recipe has a place of " + rest);
  }
  return made;
}

// Everything that the recipe names exists, so that a call need not look again.
Recipe parse(const Call& call, std::string_view text) {
  Recipe made;
  const std::vector<std::string> lines = split(text, '|');
  if (lines.empty()) call.fail("the recipe is empty");
  const std::vector<std::string> head = split(lines[0], ' ');
  if (head.empty()) call.fail("the recipe has no lead");
  made.lead = number(call, head[0]);
  for (size_t i = 1; i < head.size(); ++i) {
    const std::vector<std::string> inner = split(head[i], ':');
    if (inner.size() != 2) call.fail("the recipe has the inner value " + head[i]);
    const int64_t width = number(call, inner[0]), place = number(call, inner[1]);
    if (width < 1 || width > kMostColumns || place < 0 || place > static_cast<int64_t>(made.rooms.size()))
      call.fail("the recipe has the inner value " + head[i]);
    if (place == static_cast<int64_t>(made.rooms.size())) made.rooms.push_back(0);
    int64_t& room = made.rooms[static_cast<size_t>(place)];
    room = std::max(room, width);
    made.widths.push_back(width), made.places.push_back(place);
  }
  made.arguments = made.lead + 1;
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::vector<std::string> words = split(lines[i], ' ');
    Step step{words.empty() ? nullptr : find_function(words[0].c_str()), {}, -1};
    if (!step.function) call.fail("there is no function " + (words.empty() ? "" : words[0]));
    for (size_t w = 1; w < words.size(); ++w) {
      const Part found = part(call, words[w]);
      switch (found.kind) {
        case '$': made.arguments = std::max(made.arguments, found.index + 1); break;
        case '%':
          if (found.index >= static_cast<int64_t>(made.widths.size())) call.fail("there is no inner value " + words[w]);
          break;
        case '@':
          if (found.index >= made.results) call.fail("nothing was returned as " + words[w]);
          break;
        case '>':
          if (found.index != made.results) call.fail("results are numbered in their order, got " + words[w]);
          step.result = made.results++;
          continue;
        case 'i':
        case 'r': break;
        default: call.fail("the recipe has the part " + words[w]);
      }
      step.parts.push_back(found);
    }
    if (step.parts.size() > kMostParts) call.fail("a step has too many parts");
    made.steps.push_back(std::move(step));
  }
  return made;
}

// Recipes are constants of a library, and there are a few for each.
const Recipe& recipe_of(const Call& call, std::string_view text) {
  static std::mutex mutex;
  static auto* const known = new std::unordered_map<std::string, std::unique_ptr<Recipe>>;
  thread_local std::unordered_map<std::string_view, const Recipe*> seen;
  if (const auto found = seen.find(text); found != seen.end()) return *found->second;
  const std::lock_guard<std::mutex> lock(mutex);
  auto place = known->find(std::string(text));
  if (place == known->end())
    place = known->emplace(std::string(text), std::make_unique<Recipe>(parse(call, text))).first;
  seen.emplace(place->first, place->second.get());
  return *place->second;
}

struct Memory {
  float* data = nullptr;
  int64_t floats = 0;
  ~Memory() { std::free(data); }
  void hold(int64_t wanted) {
    if (wanted <= floats) return;
    std::free(data);
    data = nullptr, floats = 0;
    data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(wanted) * sizeof(float)));
    if (!data) throw std::bad_alloc();
    floats = wanted;
  }
  void settle() {
    if (floats <= kWorthKeeping) return;
    std::free(data);
    data = nullptr, floats = 0;
  }
};

struct Inner {
  DLTensor tensor;
  int64_t shape[3];
};

// What steps returned: references that are given back unless they are handed over.
struct Results {
  std::vector<Any> values;
  ~Results() {
    for (const Any& value : values)
      if (value.type_index >= kFunctionObject && value.object) runtime().release(value.object);
  }
};

bool run(const Call& call, const Recipe& recipe, const Any* arguments, const Tensor& lead, Any* result) {
  thread_local Memory memory;
  thread_local std::vector<Inner> inner;
  const int64_t B = lead.size(0), T = lead.size(1), rows = B * T;
  thread_local std::vector<int64_t> begins;
  begins.clear();
  int64_t floats = 0;
  for (const int64_t room : recipe.rooms) {
    begins.push_back(floats);
    floats += (rows * room + kAlignment - 1) / kAlignment * kAlignment;
  }
  memory.hold(floats);
  inner.resize(std::max(inner.size(), recipe.widths.size()));
  for (size_t i = 0; i < recipe.widths.size(); ++i) {
    Inner& value = inner[i];
    value.shape[0] = B, value.shape[1] = T, value.shape[2] = recipe.widths[i];
    float* const data = memory.data + begins[static_cast<size_t>(recipe.places[i])];
    value.tensor = {data, {kCpu, 0}, 3, {kFloat, 32, 1}, value.shape, nullptr, 0};
  }
  Results results;
  results.values.resize(static_cast<size_t>(recipe.results));
  for (const Step& step : recipe.steps) {
    Any parts[kMostParts];
    for (size_t i = 0; i < step.parts.size(); ++i) {
      const Part& part = step.parts[i];
      switch (part.kind) {
        case '$': parts[i] = arguments[part.index]; break;
        case '%':
          parts[i] = {kDLTensorPointer, 0, {}};
          parts[i].pointer = &inner[static_cast<size_t>(part.index)].tensor;
          break;
        case '@': parts[i] = results.values[static_cast<size_t>(part.index)]; break;
        default: parts[i] = part.number;
      }
    }
    Any returned{};
    if (step.function(nullptr, parts, static_cast<int32_t>(step.parts.size()), &returned) != 0) return false;
    if (step.result >= 0) results.values[static_cast<size_t>(step.result)] = returned;
  }
  memory.settle();
  if (recipe.results == 0) return true;
  if (recipe.results == 1) {
    *result = std::exchange(results.values[0], Any{});
    return true;
  }
  Object* const make = runtime().make_array;
  if (!make) call.fail("the runtime's arrays are not known");
  const auto* cell = reinterpret_cast<const FunctionCell*>(make + 1);
  return cell->safe_call(make, results.values.data(), static_cast<int32_t>(recipe.results), result) == 0;
}

}  // namespace
}  // namespace portlm::tvm

PORTLM_TVM_FUNCTION(chain) {
  using namespace portlm::tvm;
  bool raised = false;
  const int code = guarded("chain", args, count, [&raised, args, count, result](const Call& call) {
    if (count < 1 || args[0].type_index != kStringObject) call.fail("the recipe must be text");
    const auto* text = reinterpret_cast<const BytesCell*>(args[0].object + 1);
    const Recipe& recipe = recipe_of(call, std::string_view(text->data, text->size));
    if (count - 1 < recipe.arguments) call.fail("the recipe takes " + std::to_string(recipe.arguments) + " arguments");
    const Tensor lead = call.any(1 + static_cast<int32_t>(recipe.lead), "lead");
    if (lead.ndim() < 2) call.fail("lead must have two axes or more");
    raised = !run(call, recipe, args + 1, lead, result);
  });
  return raised ? -1 : code;
}
