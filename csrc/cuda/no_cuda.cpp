// Linked instead of the CUDA kernels where nvcc was not found: every kernel says so.
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace portlm::cuda {

namespace {
[[noreturn]] void absent(const char* name) {
  throw std::runtime_error(std::string(name) + ": this build of portlm has no CUDA kernels: install nvcc and build it again");
}
}  // namespace

// The signatures are those of the kernels, names included, and none of the arguments is looked at.
#pragma GCC diagnostic ignored "-Wunused-parameter"
#define PORTLM_CUDA_KERNEL(name, ...) \
  void name(__VA_ARGS__, uintptr_t) { absent(#name); }
#include "cuda/kernels.def"
#undef PORTLM_CUDA_KERNEL

const char* architectures() { return ""; }

}  // namespace portlm::cuda
