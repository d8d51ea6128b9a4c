// What this build was compiled for.
#include "cuda/kernels.h"


namespace portlm::cuda {

const char* architectures() { return PORTLM_CUDA_ARCHITECTURES; }

}  // namespace portlm::cuda
