// Where a loop's threads come from: OpenMP's, which are PyTorch's, or, while the calling thread says so, the pool that is
// portlm's own. Training takes the first, since PyTorch's loops stand between portlm's and two pools would take the cores
// from each other; engines that run nothing of PyTorch take the second, which wakes faster and gives way to other programs.
#pragma once

#include <cstdint>

namespace portlm {

// Part `id` of `count` of a loop's body, which is behind a pointer.
using Part = void (*)(const void* body, int64_t id, int64_t count);

// Threads that a loop may have which this thread begins: 1 inside another one.
int threads_here();

// Calls part(body, id, n) for all id of [0, n), n at most `count`, each on a thread of its own if there are so many.
void run_parts(int count, Part part, const void* body);

// While it lives, loops that this thread begins take threads of Pool::shared() (cpu/pool.h).
class OwnThreads {
 public:
  OwnThreads();
  ~OwnThreads();
  OwnThreads(const OwnThreads&) = delete;
  OwnThreads& operator=(const OwnThreads&) = delete;

 private:
  bool before_;
};

}  // namespace portlm
