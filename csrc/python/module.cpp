// portlm._C: the kernels as Python functions that take addresses and sizes. Knows no PyTorch and no numpy.
//
// Every kernel of cpu/kernels.def and cuda/kernels.def is bound by its own signature, pointers as integers. The
// Python wrappers in portlm.ops check shapes and dtypes; nothing here does, so nothing else should call it.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

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

void bind_cuda([[maybe_unused]] py::module_& m) {
#define PORTLM_CUDA_KERNEL(name, ...) bind(m, #name, portlm::cuda::name);
#include "cuda/kernels.def"
#undef PORTLM_CUDA_KERNEL
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of portlm: addresses and sizes in, nothing checked.";
  bind_cpu(m, portlm::kernels());
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels; each throws RuntimeError in a build without nvcc.");
  bind_cuda(cuda);
  cuda.def("architectures", &portlm::cuda::architectures, "Compute capabilities compiled for, '' for none.");
  m.def("isa", &portlm::isa_name, "Instruction set in use: scalar, avx2, avx512 or neon.");
  m.def(
      "usable_isas",
      [] {
        py::list names;
        for (const char* const* n = portlm::usable_isas(); *n; ++n) names.append(*n);
        return names;
      },
      "Instruction sets that this build carries and this machine runs, narrowest first.");
}
