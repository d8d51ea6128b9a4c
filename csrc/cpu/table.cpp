// The dispatch table of one instruction set: the functions of this compilation, in the order of kernels.def, or those of
// the instruction set that this one only adds some to.
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {

const Kernels table = {
#ifdef PORTLM_BASE_ISA
#define PORTLM_KERNEL(ret, name, ...) PORTLM_BASE_ISA::name,
#define PORTLM_DOT_KERNEL(ret, name, ...) name,
#else
#define PORTLM_KERNEL(ret, name, ...) name,
#endif
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
};

}  // namespace portlm::PORTLM_ISA
