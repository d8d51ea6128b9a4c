// The dispatch table of one instruction set: the functions of this compilation, in the order of kernels.def.
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {

const Kernels table = {
#define PORTLM_KERNEL(ret, name, ...) name,
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
};

}  // namespace portlm::PORTLM_ISA
