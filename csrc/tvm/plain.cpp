// Plain calls as TVM-FFI functions, outputs last (destination passing): what each takes is said in kernels.def, and one
// kernel gets it as it is.
//
// PORTLM_TVM_CALL(function, kernel, "x (rows... C), weight (C), eps, y (rows... C)") lists the arguments: tensors with
// their sizes, and numbers. A size is called alike wherever it has to be equal, 4H is four times that; one with dots is any
// number of axes in front, and their product. The kernel's parameters get the argument or the size of their name, and 0 or nullptr if
// there is none.
#include <algorithm>
#include <array>
#include <cctype>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "tvm/call.h"

namespace portlm::tvm {
namespace {

constexpr size_t kMostSizes = 8;
using Bound = std::array<int64_t, kMostSizes>;  // what the sizes are in one call, kAny before they are known

enum class Kind { kFloats, kIntegers, kInteger, kReal };

union Value {
  void* pointer;
  int64_t integer;
  double real;
};

template <typename T>
constexpr Kind kind_of() {
  if constexpr (std::is_pointer_v<T>)
    return std::is_same_v<std::remove_const_t<std::remove_pointer_t<T>>, float> ? Kind::kFloats : Kind::kIntegers;
  else
    return std::is_floating_point_v<T> ? Kind::kReal : Kind::kInteger;
}

template <typename T>
T as(const Value& value) {
  if constexpr (std::is_pointer_v<T>)
    return static_cast<T>(value.pointer);
  else if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(value.real);
  else
    return static_cast<T>(value.integer);
}

// The names in a text, without what is between them.
std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> found(1);
  for (const char c : text + " ") {
    if (std::isalnum(static_cast<unsigned char>(c)) || c == '_')
      found.back() += c;
    else if (!found.back().empty())
      found.emplace_back();
  }
  found.pop_back();
  return found;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

// How the arguments of a function become the parameters of its kernel.
class Plan {
 public:
  Plan(const char* text, const char* signature, std::vector<Kind> kinds) : kinds_(std::move(kinds)) {
    for (const std::string& part : split(text)) {
      const size_t open = part.find('(');
      Argument argument{words(part.substr(0, open)).at(0), open != std::string::npos, part.find("...") != std::string::npos,
                        0, {}, {}};
      if (argument.tensor)
        for (const std::string& size : words(part.substr(open))) {
          const size_t name = size.find_first_not_of("0123456789");
          argument.times.push_back(name == 0 ? 1 : std::stol(size.substr(0, name)));
          argument.sizes.push_back(place(size.substr(name)));
        }
      arguments_.push_back(argument);
    }
    std::vector<std::string> parameters;
    for (const std::string& part : split(signature)) parameters.push_back(words(part).back());
    const auto parameter = [&parameters](const std::string& name) {
      return static_cast<size_t>(std::find(parameters.begin(), parameters.end(), name) - parameters.begin());
    };
    for (Argument& argument : arguments_) {
      argument.parameter = parameter(argument.name);
      if (argument.parameter == parameters.size()) throw std::logic_error("the kernel has no parameter " + argument.name);
    }
    for (const std::string& size : sizes_) size_parameters_.push_back(parameter(size));
  }

  // Checks every argument; `values` has one element for each parameter, all zero.
  void bind(const Call& call, Value* values) const {
    call.expect_count(static_cast<int32_t>(arguments_.size()));
    Bound bound;
    bound.fill(kAny);
    const DLTensor* front = nullptr;  // the first tensor with any number of axes in front
    int32_t front_axes = 0;
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const Argument& argument = arguments_[i];
      const auto index = static_cast<int32_t>(i);
      const char* const name = argument.name.c_str();
      const Kind kind = kinds_[argument.parameter];
      Value& value = values[argument.parameter];
      if (!argument.tensor) {
        if (kind == Kind::kReal)
          value.real = call.real(index, name);
        else
          value.integer = call.integer(index, name);
        continue;
      }
      const auto named = static_cast<int32_t>(argument.sizes.size()) - argument.many;
      const int32_t rank = argument.many ? kAny : named;
      const Tensor tensor = kind == Kind::kIntegers ? call.i64(index, name, rank) : call.f32(index, name, rank);
      const int32_t axes = tensor.ndim() - named;
      bool fits = axes >= 0;
      if (fits && argument.many) {
        const int64_t* const extents = tensor.raw().shape;
        if (!front) {
          front = &tensor.raw();
          front_axes = axes;
          int64_t& product = bound[argument.sizes[0]] = 1;
          for (int32_t k = 0; k < axes; ++k) product *= extents[k];
        }
        fits = axes == front_axes && std::equal(extents, extents + axes, front->shape);
      }
      for (int32_t k = 0; fits && k < named; ++k) {
        int64_t& size = bound[argument.sizes[k + argument.many]];
        const int64_t times = argument.times[k + argument.many];
        if (size == kAny) size = tensor.size(axes + k) / times;
        fits = tensor.size(axes + k) == times * size;
      }
      if (!fits) call.fail(wanted(argument, bound) + ", got " + shape_text(tensor.raw().shape, tensor.ndim()));
      value.pointer = tensor.data<void>();
    }
    for (size_t s = 0; s < sizes_.size(); ++s)
      if (size_parameters_[s] < kinds_.size()) values[size_parameters_[s]].integer = bound[s];
  }

 private:
  struct Argument {
    std::string name;
    bool tensor;
    bool many;  // its first size is of any number of axes
    size_t parameter;
    std::vector<size_t> sizes;
    std::vector<int64_t> times;  // how often each is taken
  };

  size_t place(const std::string& size) {
    const auto found = std::find(sizes_.begin(), sizes_.end(), size);
    if (found != sizes_.end()) return static_cast<size_t>(found - sizes_.begin());
    if (sizes_.size() == kMostSizes) throw std::logic_error("too many sizes");
    sizes_.push_back(size);
    return sizes_.size() - 1;
  }

  // "weight must be (C) with C 8"
  std::string wanted(const Argument& argument, const Bound& bound) const {
    std::string shape, known;
    for (size_t k = 0; k < argument.sizes.size(); ++k) {
      const size_t s = argument.sizes[k];
      const std::string times = argument.times[k] == 1 ? "" : std::to_string(argument.times[k]);
      shape += (shape.empty() ? "" : ", ") + times + sizes_[s] + (argument.many && k == 0 ? "..." : "");
      if (bound[s] != kAny) known += (known.empty() ? " with " : ", ") + sizes_[s] + " " + std::to_string(bound[s]);
    }
    return argument.name + " must be (" + shape + ")" + known;
  }

  std::vector<Kind> kinds_;  // of the kernel's parameters
  std::vector<Argument> arguments_;
  std::vector<std::string> sizes_;
  std::vector<size_t> size_parameters_;  // the number of parameters where none has the name
};

template <typename... A>
Plan plan(const char* text, const char* signature, void (*)(A...)) {
  return Plan(text, signature, {kind_of<A>()...});
}

template <typename... A, size_t... I>
void run(const Plan& plan, const Call& call, void (*kernel)(A...), std::index_sequence<I...>) {
  Value values[sizeof...(A)] = {};
  plan.bind(call, values);
  kernel(as<A>(values[I])...);
}

template <typename... A>
void run(const Plan& plan, const Call& call, void (*kernel)(A...)) {
  run(plan, call, kernel, std::index_sequence_for<A...>());
}

// The parameters of every kernel as text, by its name.
namespace signature {
#define PORTLM_KERNEL(ret, name, ...) [[maybe_unused]] constexpr char name[] = #__VA_ARGS__;
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
}  // namespace signature

}  // namespace
}  // namespace portlm::tvm

#define PORTLM_KERNEL(ret, name, ...)
#define PORTLM_TVM_CALL(function, kernel, text)                                                        \
  PORTLM_TVM_FUNCTION(function) {                                                                      \
    using namespace portlm::tvm;                                                                       \
    return guarded(#function, args, count, [](const Call& call) {                                      \
      static const Plan made = plan(text, signature::kernel, portlm::kernels().kernel);                \
      run(made, call, portlm::kernels().kernel);                                                       \
    });                                                                                                \
  }
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
