// Products of stored weights, unsigned bytes or nibbles, with whole activations, for Vec::N rows of weights at a time.
//
// An activation is a whole number X, |X| <= kLargestActivation. Of one byte it has 7 bits and a sign: one product per
// weight. Of two it has 15 bits (rather less) and a sign: instruction sets multiply bytes by bytes, so most of them take it
// as X = 128 h + l with l in -64 .. 63 and h in -127 .. 127, two products per weight. All sums are exact. Each dots_*.h
// defines
//   Ints             Vec::N 32-bit integers: from one, + - *, to_float; bytes(p) and half(p) read Vec::N bytes or float16
//   store_int16      the integers that a Vec holds, and anything for NaN
//   Dots<bits, width> for weights of 4 or 8 bits and activations of 1 or 2 bytes:
//     kOffset        what it takes away from every stored weight, which the caller has to make good
//     kWords         of memory for the activations of 4 columns
//     Weights        of Vec::N rows, 4 weights each; unpack() reads those of the rows in one line of the packed matrix
//     Activations    of 4 columns, the same for all rows, from memory that arrange() fills for 16 columns
//     Sum            start() with any integers, add() products, carry() after every 32 columns, total(); add() is told which
//                    of unpack()'s weights it is given
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

template <int width>
constexpr float kLargestActivation = width == 1 ? 127.0f : 16319.0f;  // 128 * 127 + 63

// What all Dots say of themselves.
template <int bits, int width>
struct DotsOf {
  static constexpr int kBits = bits, kWidth = width;
};

}  // namespace portlm::PORTLM_ISA

#if defined(PORTLM_ISA_AVX512) || defined(PORTLM_ISA_AVX2)
#include "cpu/dots_x86.h"
#elif defined(PORTLM_ISA_NEON)
#include "cpu/dots_neon.h"
#else
#include "cpu/dots_scalar.h"
#endif
