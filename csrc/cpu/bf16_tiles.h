// What a product of matrices rounded to bfloat16 is made of: panels, tiles, rounding. gemm_bf16.cpp puts them together.
//
// The definition, which every instruction set computes up to the order of its additions:
//   - operands are rounded to bfloat16: to the nearest, ties to even; NaN stays NaN, what overflows becomes infinite, and
//     what is below the smallest normal number, 2^-126, counts as a zero of its sign.
//   - products of two of them are exact in float32, and added up in float32.
// Where there is an instruction for it, AVX512_BF16's VDPBF16PS, it multiplies and adds two products at a time: it rounds to
// nearest even once per product, whatever MXCSR says, and flushes sums below 2^-126 to zero. AMX's TDPBF16PS takes 32 products
// of each sum at a time: it adds up those of even and of odd k apart, each product rounded into its sum once, then adds the two
// and adds that to what was there, to nearest even, and reads and leaves zeros for what is below 2^-126. Elsewhere the rounded
// operands are widened again and go through the float32 tiles of gemm_tile.h. In each of these trees of additions a product
// takes part in at most K + 2 roundings, so two instruction sets differ by float32's rounding of the same sums, K 2^-24
// sum |a b| at most, and by K 2^-126.
//
// This header belongs to no instruction set: tiles of one namespace are called from another.
#pragma once

#include <cstdint>

namespace portlm {

// A matrix in memory: float32, or bfloat16 as its upper 16 bits. ld: elements from row to row, of the matrix or, if
// transposed, of what it is the transpose of.
struct Bf16Operand {
  const void* data;
  int64_t ld;
  bool transposed;
  bool half;
};

// Where a tile puts its sums: C (rows, columns) = sums + bias (or nullptr), or C += the same.
struct Bf16Target {
  float* C;
  int64_t ldc, columns;
  const float* bias;
  bool accumulate;
};

struct Bf16Tiles {
  int64_t native;    // 0 widened; on the processor's own instruction: 1 VDPBF16PS, 2 TDPBF16PS
  int64_t rows;      // of C in a tile, at most
  int64_t row_step;  // that cost as much as fewer: strips have a multiple of so many where they can
  int64_t columns;   // of C in a tile, at most
  int64_t depth;     // products that are added up before they join C, at most
  int64_t rate;      // products per cycle of a core, roughly
  // A thread calls hold before its first tile and release after its last: what tiles need of the processor is its own so long.
  void (*hold)();
  void (*release)();
  // Bytes of a packed strip of `rows` rows of A, and of a panel of `columns` columns of B, of K products.
  int64_t (*strip_bytes)(int64_t K, bool transposed);
  int64_t (*panel_bytes)(int64_t K);
  int64_t panel_step;       // bytes from product to product, K even, in a panel
  int64_t transposed_step;  // bytes from product to product, K even, in a strip of a transposed A
  // Packs rows [0, count) of A (., K), and columns [0, count) of B (K, .); the others of the panel become zeros.
  void (*pack_strip)(const Bf16Operand& A, int64_t count, int64_t K, void* strip);
  void (*pack_panel)(const Bf16Operand& B, int64_t count, int64_t K, void* panel);
  // `transposed` is that of the operand the strip was packed from. 1 <= R <= rows.
  void (*tile)(int64_t R, int64_t K, const void* strip, bool transposed, const void* panel, const Bf16Target& to);
  void (*round)(const float* from, uint16_t* to, int64_t count);
  // As many independent chains of `turns` multiply-adds of whole registers as hide their latency, for the probe;
  // `turn_flops` each turn of all.
  float (*chains)(int64_t turns);
  double turn_flops;
};

}  // namespace portlm
