// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace portlm {
namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*usable)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Narrowest first: the last usable one is the default.
const Isa kIsas[] = {
    {"scalar", &scalar::table, always},
#ifdef PORTLM_HAVE_AVX2
    {"avx2", &avx2::table, has_avx2},
#endif
#ifdef PORTLM_HAVE_AVX512
    {"avx512", &avx512::table, has_avx512},
#endif
#ifdef PORTLM_HAVE_NEON
    {"neon", &neon::table, always},
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

}  // namespace portlm
