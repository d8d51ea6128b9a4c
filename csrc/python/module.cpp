// portlm._C: the kernels as Python functions that take addresses and sizes. Knows no PyTorch and no numpy.
//
// Every kernel of cpu/kernels.def and cuda/kernels.def is bound by its own signature, pointers as integers. The
// Python wrappers in portlm.ops check shapes and dtypes; nothing here does, so nothing else should call it.
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <type_traits>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "python/run.h"

namespace py = pybind11;

namespace {

// Python sees a pointer as an integer, 0 for nullptr, and every other argument as itself.
template <typename T>
using Argument = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <typename T>
T native(Argument<T> value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return value;
}

template <typename R, typename... A>
void bind(py::module_& m, const char* name, R (*kernel)(A...)) {
  m.def(
      name, [kernel](Argument<A>... args) -> R { return kernel(native<A>(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

void bind_cpu(py::module_& m, const portlm::Kernels& table) {
#define PORTLM_KERNEL(ret, name, ...) bind(m, #name, table.name);
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
}

// The CUDA kernels have no table to count in, so they count here, where every call comes through. A launch that throws
// does not count.
template <auto Kernel>
struct Launched;
template <typename... A, void (*Kernel)(A...)>
struct Launched<Kernel> {
  static std::atomic<uint64_t> calls;
  static void call(A... arguments) {
    Kernel(arguments...);
    calls.fetch_add(1, std::memory_order_relaxed);
  }
};
template <typename... A, void (*Kernel)(A...)>
std::atomic<uint64_t> Launched<Kernel>::calls{0};

void bind_cuda(py::module_& m) {
#define PORTLM_CUDA_KERNEL(name, ...) bind(m, #name, &Launched<&portlm::cuda::name>::call);
#include "cuda/kernels.def"
#undef PORTLM_CUDA_KERNEL
}

// {kernel: {instruction set, or "cuda": calls}}
py::dict kernel_calls() {
  py::dict counts;
  const auto add = [](void* context, const char* name, const char* where, uint64_t calls) {
    auto& counts = *static_cast<py::dict*>(context);
    if (!counts.contains(name)) counts[name] = py::dict();
    counts[name][where] = calls;
  };
  portlm::visit_calls(add, &counts);
#define PORTLM_CUDA_KERNEL(name, ...) \
  add(&counts, #name, "cuda", Launched<&portlm::cuda::name>::calls.load(std::memory_order_relaxed));
#include "cuda/kernels.def"
#undef PORTLM_CUDA_KERNEL
  return counts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of portlm: addresses and sizes in, nothing checked.";
  bind_cpu(m, portlm::kernels());
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels; each throws RuntimeError in a build without nvcc.");
  bind_cuda(cuda);
  cuda.def("architectures", &portlm::cuda::architectures, "Compute capabilities compiled for, '' for none.");
  m.def("isa", &portlm::isa_name,
        "Instruction set in use: scalar, avx2, avx512, avx512_vnni, avx512_amx, neon or neon_dotprod.");
  py::module_ run = m.def_submodule("run", "The runner of packed files.");
  bind_run(run);
  m.def("kernel_calls", &kernel_calls,
        "Calls since the process began, {kernel: {instruction set, or 'cuda': count}}, from Python and from TVM alike.");
  m.def(
      "set_threads",
      [](int count) {
        if (count < 1) throw py::value_error("[set_threads] count must be at least 1, got " + std::to_string(count));
        return portlm::set_threads(count);
      },
      "Set on how many threads kernels run when called from this thread; return what it was before.");
  m.def(
      "usable_isas",
      [] {
        py::list names;
        for (const char* const* n = portlm::usable_isas(); *n; ++n) names.append(*n);
        return names;
      },
      "Instruction sets that this build carries and this machine runs, narrowest first.");
}
