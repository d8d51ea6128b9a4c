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

// Gives the calling thread all eight tiles, zeros at first, or takes them from it. They are of full size, but for products that are
// less than 64 bytes deep: tiles 4 and 5 then have rows of so many, and 6 and 7 a row for every four. Loads and stores of tiles are
// invisible to sanitizers: see watched.h.
template <int kDepth = 64>
inline void hold_tiles() {
  struct Layout {  // as LDTILECFG reads it
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[8], no_row_bytes[8];
    uint8_t rows[8], no_rows[8];
  };
  static_assert(sizeof(Layout) == 64);
  alignas(64) static constexpr Layout kLayout = {
      1, 0, {}, {64, 64, 64, 64, kDepth, kDepth, 64, 64}, {}, {16, 16, 16, 16, 16, 16, kDepth / 4, kDepth / 4}, {}};
  _tile_loadconfig(&kLayout);
}
inline void release_tiles() { _tile_release(); }

// Tiles are held while one lives. Never two at a time on one thread.
template <int kDepth = 64>
class HeldTiles {
 public:
  HeldTiles() { hold_tiles<kDepth>(); }
  ~HeldTiles() { release_tiles(); }
  HeldTiles(const HeldTiles&) = delete;
  HeldTiles& operator=(const HeldTiles&) = delete;
};

}  // namespace portlm::PORTLM_ISA
#endif
