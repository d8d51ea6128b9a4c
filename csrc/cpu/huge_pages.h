// Pages of 2 MB for memory that is read from end to end: with pages of 4 KB the processor waits for translations.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace portlm::PORTLM_ISA {

// A wish that the system may refuse. Write to the memory for the first time afterwards: pages are given out then.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Memory that nobody wrote to before, which malloc's may be not, and so in large pages if the system has any.
class FreshPages {
 public:
  explicit FreshPages(int64_t bytes) : bytes_(static_cast<size_t>(bytes > 0 ? bytes : 1)) {
#if defined(__linux__)
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    prefer_huge_pages(memory_, bytes);
#else
    memory_ = std::malloc(bytes_);
    if (!memory_) throw std::bad_alloc();
#endif
  }
  FreshPages(const FreshPages&) = delete;
  FreshPages& operator=(const FreshPages&) = delete;
  ~FreshPages() {
#if defined(__linux__)
    munmap(memory_, bytes_);
#else
    std::free(memory_);
#endif
  }

  float* floats() const { return static_cast<float*>(memory_); }

 private:
  void* memory_;
  size_t bytes_;
};

}  // namespace portlm::PORTLM_ISA
