// CUDA kernels. Pointers are device addresses of contiguous row-major data; `stream` is a cudaStream_t as an integer.
//
// kernels.def lists each signature once. Without nvcc the same functions are linked from no_cuda.cpp and throw, so
// callers hold no #ifdef.
#pragma once

#include <cstdint>

namespace portlm::cuda {

#define PORTLM_CUDA_KERNEL(name, ...) void name(__VA_ARGS__, uintptr_t stream);
#include "cuda/kernels.def"
#undef PORTLM_CUDA_KERNEL

// "80;90" and the like, or "" when this build carries no CUDA code.
const char* architectures();

}  // namespace portlm::cuda
