// A pool of threads for short loops, many thousand a second, on a machine that other programs use, too.
//
// The thread that begins a loop does a part of it. The others look for one without sleeping for a while, as long as
// nobody else wants their core. Who is done takes back the parts that nobody has begun, so a thread that the system has
// set aside, or that still sleeps, costs no time. One that is set aside in the midst of a part does: where that takes
// more than several threads gain, loops take fewer for a while.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "cpu/threads.h"

namespace portlm {

// How many threads loops take, from the time that was lost with waiting for them.
class Crowd {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::steady_clock::duration;

  // Threads of a loop that begins now and could use `wanted`.
  int threads(int wanted, Time now);
  // Takes in a loop on several threads: how long it would have taken without waiting, how long somebody was waited for
  // beyond what is usual, and when it ended.
  void took(Duration useful, Duration lost, Time now);

 private:
  int halvings_ = 0;
  Duration together_{0};  // spent usefully since the last loss
  Duration stay_{0};      // how long fewer threads are taken
  Time until_{};
};

class Pool {
 public:
  // The pool of this process. It has no threads before the first loop, and is never destroyed: they may outlive main().
  static Pool& shared();

  // Whether this thread is in a loop of the pool.
  static bool inside();

  // Calls part(body, id, n) for all id of [0, n), where n is `count` or less, and returns when all have ended. Alone,
  // on this thread, if the pool is in use by another one, if this is inside a loop, or in a forked child. What a part
  // throws is thrown here, when all have ended.
  void run(int count, Part part, const void* body);

 private:
  class Worker;

  Pool();
  void run_together(int count, Part part, const void* body, Crowd::Time begin);
  int grow(int threads);

  std::atomic<bool> in_use_{false};
  // Of the thread that has set in_use_:
  Crowd crowd_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace portlm
