// Every CPU kernel, once per instruction set, and the table that the rest of the program calls.
//
// kernels.def lists each signature once. From that list come the declarations per instruction set, the dispatch
// table and the Python bindings, so a new kernel is one line there and one file beside its neighbours.
//
// Conventions: pointers address contiguous row-major float32 unless the name says otherwise; sizes are int64_t;
// outputs never alias inputs unless the comment in kernels.def allows it; a size of zero does nothing.
#pragma once

#include <cstdint>

namespace portlm {

struct Kernels {
#define PORTLM_KERNEL(ret, name, ...) ret (*name)(__VA_ARGS__);
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
};

// The kernels for this machine, each of which counts its calls: the widest instruction set that it and this build both have, or the one that the
// environment variable PORTLM_ISA names. Throws std::runtime_error if that one is unknown or unusable here.
const Kernels& kernels();

// Name of the instruction set that kernels() chose: "scalar", "avx2", "avx512", "avx512_vnni", "avx512_amx", "neon" or
// "neon_dotprod".
const char* isa_name();

// Names of all instruction sets that this build carries and this machine can run, narrowest first; ends with nullptr.
const char* const* usable_isas();

// Calls visit(context, name, instruction set, calls) for every kernel and every instruction set of this build: how often
// the kernel was called through kernels() since the process began.
void visit_calls(void (*visit)(void* context, const char* name, const char* isa, uint64_t calls), void* context);

// Sets on how many threads the kernels run when called from this thread, at least 1, and returns what it was before. Without
// OpenMP that is always 1.
int set_threads(int count);

#define PORTLM_DECLARE_ISA(isa)                              \
  namespace isa {                                            \
  extern const Kernels table;                                \
  }
PORTLM_DECLARE_ISA(scalar)
PORTLM_DECLARE_ISA(avx2)
PORTLM_DECLARE_ISA(avx512)
PORTLM_DECLARE_ISA(avx512_vnni)
PORTLM_DECLARE_ISA(avx512_amx)
PORTLM_DECLARE_ISA(neon)
PORTLM_DECLARE_ISA(neon_dotprod)
#undef PORTLM_DECLARE_ISA

// Inside a kernel file: the declarations of this compilation's own instruction set. One that only adds products of bytes to
// another, PORTLM_BASE_ISA, has kernels for these of its own and shares all others.
#ifdef PORTLM_BASE_ISA
namespace PORTLM_BASE_ISA {
#define PORTLM_KERNEL(ret, name, ...) ret name(__VA_ARGS__);
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
}  // namespace PORTLM_BASE_ISA
namespace PORTLM_ISA {
#define PORTLM_KERNEL(ret, name, ...)
#define PORTLM_DOT_KERNEL(ret, name, ...) ret name(__VA_ARGS__);
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
}  // namespace PORTLM_ISA
#elif defined(PORTLM_ISA)
namespace PORTLM_ISA {
#define PORTLM_KERNEL(ret, name, ...) ret name(__VA_ARGS__);
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
}  // namespace PORTLM_ISA
#endif

}  // namespace portlm
