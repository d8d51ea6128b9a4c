// Matrix product for the kernels of this folder, and the scratch memory they share it with.
//
// Every element of C is computed by one thread, and the order of its additions depends on the shape (M, N, K) alone.
// So results are the same, bit for bit, for any number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace portlm::PORTLM_ISA {

// C (M, N) = op(A) (M, K) op(B) (K, N) + bias (N, or nullptr), or C += the same if accumulate. lda, ldb and ldc are the
// distances in floats between rows in memory: rows of A (M, K) or, transposed, of A (K, M), and of B likewise.
struct Product {
  const float* A;
  const float* B;
  const float* bias;
  float* C;
  int64_t M, N, K, lda, ldb, ldc;
  bool transpose_a, transpose_b, accumulate;
};

// Called for each part of C (rows [i0, i1), columns [j0, j1)) as soon as it is complete, by the thread that computed it
// and still has it in its cache. Parts do not overlap and cover C; which ones there are depends on the threads.
using PartDone = void (*)(void* context, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

// Runs on all threads, or on the calling one alone if that already is one of several at work.
void multiply(const Product& product, PartDone done = nullptr, void* context = nullptr);

// out[j] = sum over the rows i of x (rows, N), ld floats apart, of x[i][j]; or += that.
void sum_rows(const float* x, int64_t ld, float* out, int64_t rows, int64_t N, bool accumulate = false);

// Memory of one thread that grows to the largest size asked for, so that a training loop allocates in its first step
// only. Declare it thread_local. What was in it is lost when it grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least `count` floats, aligned to 64 bytes.
  float* floats(int64_t count) {
    if (count > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      memory_ = static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(count) + 15) / 16 * 64));
      if (!memory_) throw std::bad_alloc();
      capacity_ = count;
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace portlm::PORTLM_ISA
