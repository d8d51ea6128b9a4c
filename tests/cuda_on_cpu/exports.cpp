// Every kernel of cuda/kernels.def as a C function, which returns nullptr or what went wrong.
#include <exception>
#include <string>

#include "cuda/kernels.h"
#include "emulator.h"

namespace {

template <typename Body>
const char* said(Body body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <auto Kernel>
struct Called;
template <typename... A, void (*Kernel)(A...)>
struct Called<Kernel> {
  static const char* call(A... arguments) {
    return said([&] { Kernel(arguments...); });
  }
};

}  // namespace

// The functions have their kernels' parameters, which no macro can name: they are handed out as addresses.
extern "C" __attribute__((visibility("default"))) const void* cuda_on_cpu_kernel(const char* wanted) {
  const std::string name = wanted;
#define PORTLM_CUDA_KERNEL(kernel, ...) \
  if (name == #kernel) return reinterpret_cast<const void*>(&Called<&portlm::cuda::kernel>::call);
#include "cuda/kernels.def"
#undef PORTLM_CUDA_KERNEL
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_order(unsigned order) { cuda_on_cpu::choose_order(order); }
