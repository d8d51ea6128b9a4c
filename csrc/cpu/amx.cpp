// Asks processor and system for tile registers. Intel's manual, volume 1, chapter 18; Linux, Documentation/arch/x86/xstate.
#include "cpu/amx.h"

#include <cstring>

#include "cpu/kernels.h"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace portlm {
namespace {

#if defined(__x86_64__) && defined(__linux__)

// Tiles of at least 16 rows of 64 bytes, eight of them, and products of both kinds.
bool processor_has_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;  // of leaf 7, edx
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  if (!__get_cpuid_count(0x1D, 1, &a, &b, &c, &d)) return false;  // palette 1
  return (b & 0xFFFF) >= 64 && (b >> 16) >= 8 && (c & 0xFFFF) >= 16;
}

// Whether the system saves the tiles' configuration and data: bits 17 and 18 of XCR0.
bool system_saves_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}

bool ask() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return processor_has_tiles() && system_saves_tiles() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool ask() { return false; }

#endif

}  // namespace

bool amx_usable() {
  static const bool usable = ask();
  return usable;
}

bool amx_in_use() {
  static const bool use = std::strcmp(isa_name(), "avx512_amx") == 0;
  return use;
}

}  // namespace portlm
