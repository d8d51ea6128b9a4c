// Tensor cores of compute capability 8.0 and newer, as instructions of a warp: products of bfloat16 added up in float32, and
// what brings operands to them. tests/cuda_on_cpu/cuda/mma.cuh is the same where there is no GPU.
//
// Lane l of the warp is (g, t) = (l / 4, l % 4). Of A (16, 16) it holds in a[i] the element (g + 8 (i % 2), 2 t + 8 (i / 2)) and
// the one right of it; of B (16, 8) in b[i] (2 t + 8 i, g) and the one below it; of C (16, 8) in c[i] (g + 8 (i / 2), 2 t + i % 2).
#pragma once

#include "cuda/common.cuh"

namespace portlm::cuda {

// C += A B.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices (8, 8) from shared memory. Lane l says where row l % 8 of matrix l / 8 begins, aligned to 16 bytes; r[i] receives
// of matrix i (g, 2 t) and the element right of it,
__device__ inline void load_matrices(uint32_t (&r)[4], const bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// or (2 t, g) and the element below it.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Starts a copy of 16 bytes to shared memory, both ends aligned to as many; zeros if there is nothing to be copied.
__device__ inline void copy_async(bfloat16* to, const bfloat16* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(present ? 16 : 0)
               : "memory");
}

// Ends a group of copies of this thread,
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// and waits for all groups but the last `Under`. Others see what was copied behind a barrier.
template <int Under>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Under) : "memory");
}

// 2^x, to 2 units in the last place; 0 instead of what is subnormal.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers side by side, the first in the lower half.
__device__ inline uint32_t pack_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

}  // namespace portlm::cuda
