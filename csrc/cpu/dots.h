// Products of stored weights, unsigned bytes or nibbles, with whole activations, for Vec::N rows of weights at a time.
//
// An activation is a whole number X of at most 15 bits and a sign, |X| <= kLargestActivation. Instruction sets multiply
// bytes by bytes, so most of them take it as X = 128 h + l with l in -64 .. 63 and h in -127 .. 127: two products per
// weight, the accuracy of one with 15 bits. All sums are exact. Each dots_*.h defines
//   Ints             Vec::N 32-bit integers: from one, + - *, to_float; bytes(p) and half(p) read Vec::N bytes or float16
//   store_int16      the integers that a Vec holds, and anything for NaN
//   Dots<bits>       for weights of 4 or 8 bits:
//     kOffset        what it takes away from every stored weight, which the caller has to make good
//     Weights        of Vec::N rows, 4 weights each; unpack() reads those of the rows in one line of the packed matrix
//     Activations    of 4 columns, the same for all rows: two words of memory, which arrange() fills for 16 columns
//     Sum            start() with any integers, add() products, carry() after every 32 columns, total()
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

constexpr float kLargestActivation = 16319.0f;  // 128 * 127 + 63

}  // namespace portlm::PORTLM_ISA

#if defined(PORTLM_ISA_AVX512) || defined(PORTLM_ISA_AVX2)
#include "cpu/dots_x86.h"
#elif defined(PORTLM_ISA_NEON)
#include "cpu/dots_neon.h"
#else
#include "cpu/dots_scalar.h"
#endif
