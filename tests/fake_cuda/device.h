// A GPU that is none: what libcuda and libcudart share. Its memory is the host's, shut but for copies and kernels, so whoever
// reads a device's pointer on the host ends with a signal; and full of NaN until something is written there.
#pragma once

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace fake_cuda {

inline int setting(const char* name, int otherwise) {
  const char* said = std::getenv(name);
  return said ? std::atoi(said) : otherwise;
}
inline int devices() { return setting("FAKE_CUDA_DEVICES", 1); }
inline int version() { return setting("FAKE_CUDA_VERSION", 13000); }
inline int architecture() { return setting("FAKE_CUDA_ARCHITECTURE", 90); }

// Attributes of a device by the numbers of cuda.h, which those of driver_types.h are equal to.
inline int attribute(int which) {
  switch (which) {
    case 1: return 1024;                  // threads of a block
    case 2: case 3: return 1024;          // along x, y
    case 4: return 64;                    // along z
    case 5: return 0x7fffffff;            // blocks along x
    case 6: case 7: return 65535;         // along y, z
    case 8: return 48 << 10;              // shared bytes of a block
    case 10: return 32;                   // threads of a warp
    case 12: return 65536;                // registers of a block
    case 75: return architecture() / 10;
    case 76: return architecture() % 10;
    default: return 1;
  }
}

// What happened, a line each, in the file that FAKE_CUDA_LOG names.
template <typename... Values>
void note(const char* format, Values... values) {
  const char* path = std::getenv("FAKE_CUDA_LOG");
  if (!path) return;
  if (std::FILE* file = std::fopen(path, "a")) {
    std::fprintf(file, format, values...);
    std::fclose(file);
  }
}

constexpr size_t kArena = size_t{1} << 30, kPiece = 256;

// All memory of the device, in one piece of address space.
class Memory {
 public:
  Memory() {
    begin_ = static_cast<char*>(mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }

  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t size = (bytes / kPiece + 1) * kPiece;  // one byte more than was asked for, at least
    size_t at = 0;
    for (const auto& [begin, length] : taken_) {
      if (begin - at >= size) break;
      at = begin + length;
    }
    if (at + size > kArena) return nullptr;
    taken_[at] = size;
    if (at + size > used_) used_ = at + size;
    open();
    std::memset(begin_ + at, 0xff, size);
    shut();
    return begin_ + at;
  }

  bool give_back(void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return taken_.erase(static_cast<size_t>(static_cast<char*>(pointer) - begin_)) == 1;
  }

  bool holds(const void* pointer) const { return pointer >= begin_ && pointer < begin_ + kArena; }
  void open() { mprotect(begin_, used_, PROT_READ | PROT_WRITE); }
  void shut() { mprotect(begin_, used_, PROT_NONE); }

 private:
  char* begin_;
  size_t used_ = 0;
  std::map<size_t, size_t> taken_;  // length by where it begins
  std::mutex mutex_;
};

}  // namespace fake_cuda

extern "C" fake_cuda::Memory* fake_cuda_memory();  // of libcuda
