// Intel's tile registers, AMX: whether they may be used, and how they are held while they are.
//
// Eight registers of 16 rows of 64 bytes hold sums, 16 x 16 of them, or operands of a product. They are state that the
// system saves only for processes which asked, at every switch of threads that left them in use; so a thread holds them for
// the length of a loop and then gives them back. The compiler does not know what _tile_loadd reads: a function that wrote it in
// the same breath puts a fence, __asm__ volatile("" : : : "memory"), between.
#pragma once

#include <cstdint>
#ifdef __AMX_TILE__
#include <immintrin.h>
#endif

namespace portlm {

// Whether this processor multiplies bytes and bfloat16 in tiles, and the system lets this process: on Linux it is asked once,
// and the answer holds for all threads, also those of forked children. False elsewhere, and where the system refuses.
bool amx_usable();

// Whether the kernels use them: amx_usable(), unless PORTLM_ISA names another instruction set than avx512_amx.
bool amx_in_use();

}  // namespace portlm

#if defined(__AMX_TILE__) && defined(PORTLM_ISA)
namespace portlm::PORTLM_ISA {

// While one lives, its thread has all eight tiles at their full size, zeros at first. Never two at a time on one thread. Loads
// and stores of tiles are invisible to sanitizers: see watched.h.
class HeldTiles {
 public:
  HeldTiles() {
    alignas(64) static constexpr Layout kAll = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {}, {16, 16, 16, 16, 16, 16, 16, 16}, {}};
    _tile_loadconfig(&kAll);
  }
  ~HeldTiles() { _tile_release(); }
  HeldTiles(const HeldTiles&) = delete;
  HeldTiles& operator=(const HeldTiles&) = delete;

 private:
  struct Layout {  // as LDTILECFG reads it
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[8], no_row_bytes[8];
    uint8_t rows[8], no_rows[8];
  };
  static_assert(sizeof(Layout) == 64);
};

}  // namespace portlm::PORTLM_ISA
#endif
