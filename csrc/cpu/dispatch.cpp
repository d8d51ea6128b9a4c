// Chooses the instruction set once, at the first call, and counts the calls of every kernel, so that a test can tell a
// kernel that ran from a reference that gave the same answer.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/amx.h"
#include "cpu/kernels.h"
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace portlm {
namespace {

// The kernel `Member` of one instruction set with a counter in front: one relaxed addition beside a call that takes
// hundreds of times as long.
template <const Kernels& Table, auto Member>
struct Counted;
template <const Kernels& Table, typename R, typename... A, R (*Kernels::*Member)(A...)>
struct Counted<Table, Member> {
  static std::atomic<uint64_t> calls;
  static R call(A... arguments) {
    calls.fetch_add(1, std::memory_order_relaxed);
    return (Table.*Member)(arguments...);
  }
};
template <const Kernels& Table, typename R, typename... A, R (*Kernels::*Member)(A...)>
std::atomic<uint64_t> Counted<Table, Member>::calls{0};

template <const Kernels& Table>
constexpr Kernels kCounted = {
#define PORTLM_KERNEL(ret, name, ...) &Counted<Table, &Kernels::name>::call,
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
};

using Visit = void (*)(void* context, const char* name, const char* isa, uint64_t calls);

template <const Kernels& Table>
void visit_table(Visit visit, void* context, const char* isa) {
#define PORTLM_KERNEL(ret, name, ...) \
  visit(context, #name, isa, Counted<Table, &Kernels::name>::calls.load(std::memory_order_relaxed));
#include "cpu/kernels.def"
#undef PORTLM_KERNEL
}

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*usable)();
  void (*visit)(Visit visit, void* context, const char* isa);
};

template <const Kernels& Table>
constexpr Isa isa(const char* name, bool (*usable)()) {
  return {name, &kCounted<Table>, usable, visit_table<Table>};
}

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_amx() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16") && amx_usable(); }
#elif defined(__aarch64__)
bool has_neon_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Mac with this processor
#endif
}
#endif

// Narrowest first: the last usable one is the default.
const Isa kIsas[] = {
    isa<scalar::table>("scalar", always),
#ifdef PORTLM_HAVE_AVX2
    isa<avx2::table>("avx2", has_avx2),
#endif
#ifdef PORTLM_HAVE_AVX512
    isa<avx512::table>("avx512", has_avx512),
#endif
#ifdef PORTLM_HAVE_AVX512_VNNI
    isa<avx512_vnni::table>("avx512_vnni", has_avx512_vnni),
#endif
#ifdef PORTLM_HAVE_AVX512_AMX
    isa<avx512_amx::table>("avx512_amx", has_avx512_amx),
#endif
#ifdef PORTLM_HAVE_NEON
    isa<neon::table>("neon", always),
#endif
#ifdef PORTLM_HAVE_NEON_DOTPROD
    isa<neon_dotprod::table>("neon_dotprod", has_neon_dotprod),
#endif
};

const Isa& choose() {
  const char* wanted = std::getenv("PORTLM_ISA");
  const Isa* best = nullptr;
  std::string known;
  for (const Isa& isa : kIsas) {
    const bool usable = isa.usable();
    if (usable) known += std::string(known.empty() ? "" : ", ") + isa.name;
    if (usable && (!wanted || !*wanted || std::strcmp(wanted, isa.name) == 0)) best = &isa;
  }
  if (!best) throw std::runtime_error("PORTLM_ISA=" + std::string(wanted) + " cannot run here: choose one of " + known);
  return *best;
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const Kernels& kernels() { return *chosen().table; }

const char* isa_name() { return chosen().name; }

const char* const* usable_isas() {
  static const char* names[sizeof(kIsas) / sizeof(kIsas[0]) + 1] = {};
  int count = 0;
  for (const Isa& isa : kIsas)
    if (isa.usable()) names[count++] = isa.name;
  names[count] = nullptr;
  return names;
}

#ifdef PORTLM_HAVE_AVX512_AMX
namespace avx512_amx {
uint64_t products_in_tiles();  // packed_linear.cpp
}
#endif

void visit_calls(Visit visit, void* context) {
  for (const Isa& isa : kIsas) isa.visit(visit, context, isa.name);
#ifdef PORTLM_HAVE_AVX512_AMX
  visit(context, "packed_linear_tiles", "avx512_amx", avx512_amx::products_in_tiles());
#endif
}

}  // namespace portlm
