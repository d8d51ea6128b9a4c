// Loops on the pool, short and many: from several threads at once, inside each other, with parts that throw, in a forked
// child, and with pauses in which its threads fall asleep. Ends with 0, or says what is wrong.
#include "cpu/pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using portlm::Crowd;
using portlm::Pool;
using namespace std::chrono_literals;

void expect(bool holds, const char* claim) {
  if (holds) return;
  std::printf("not so: %s\n", claim);
  std::exit(1);
}

struct Sums {
  std::vector<int64_t> of;
  std::atomic<int> parts{0};
  std::atomic<bool> together{false};
};

// Adds 1 to each element: what is done twice, or not at all, shows.
void add(const void* body, int64_t id, int64_t count) {
  Sums& sums = **static_cast<Sums* const*>(body);
  const int64_t n = static_cast<int64_t>(sums.of.size());
  for (int64_t i = n * id / count; i < n * (id + 1) / count; ++i) ++sums.of[static_cast<size_t>(i)];
  if (count > 1) sums.together = true;
}

void add_inside(const void* body, int64_t id, int64_t count) {
  if (Pool::inside())
    Pool::shared().run(3, [](const void*, int64_t i, int64_t n) { expect(i == 0 && n == 1, "a loop inside a loop is alone"); }, nullptr);
  add(body, id, count);
}

void fail_at_the_end(const void*, int64_t id, int64_t count) {
  if (id == count - 1) throw std::runtime_error("the last part");
}

bool many_loops(int loops) {
  Sums sums;
  sums.of.resize(257);
  Sums* const body = &sums;
  for (int i = 0; i < loops; ++i) {
    Pool::shared().run(1 + i % 4, i % 7 ? add : add_inside, &body);
    if (i % 512 == 0) std::this_thread::sleep_for(1ms);
    if (i % 300 == 0) {
      bool thrown = false;
      try {
        Pool::shared().run(4, fail_at_the_end, nullptr);
      } catch (const std::runtime_error&) {
        thrown = true;
      }
      expect(thrown, "what a part throws arrives");
    }
  }
  for (const int64_t sum : sums.of) expect(sum == loops, "every element is visited once in every loop");
  expect(!Pool::inside(), "after a loop this thread is in none");
  return sums.together;
}

void crowds() {
  const Crowd::Time start{};
  Crowd crowd;
  expect(crowd.threads(8, start) == 8, "all threads at first");
  crowd.took(10ms, 1ms, start);
  expect(crowd.threads(8, start) == 8, "all threads where less was lost than gained");
  crowd.took(1ms, 3ms, start);
  expect(crowd.threads(8, start) == 4 && crowd.threads(1, start) == 1, "half of them where more was");
  crowd.took(1ms, 3ms, start);
  expect(crowd.threads(8, start) == 2, "half of these where it goes on");
  expect(crowd.threads(8, start + 23ms) == 2, "for a while, longer than before");
  expect(crowd.threads(8, start + 24ms) == 4, "and then one step back");
  expect(crowd.threads(8, start + 48ms) == 8, "until all are there");
  for (int i = 0; i < 40; ++i) crowd.took(1us, 3ms, start + 50ms);
  expect(crowd.threads(8, start + 1049ms) == 1 && crowd.threads(8, start + 1051ms) == 1, "one thread is the least");
  Crowd::Time now = start + 50ms;
  for (int i = 0; i < 31; ++i) crowd.threads(8, now += 1s);
  expect(crowd.threads(8, now) == 8, "no stay is longer than a second for each step");
}

}  // namespace

int main(int, char** arguments) {
  crowds();
  const int loops = std::atoi(arguments[1]);
  std::atomic<bool> together{false};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) callers.emplace_back([&] { if (many_loops(loops)) together = true; });
  for (std::thread& caller : callers) caller.join();
  expect(together, "some loops were on several threads");
  const pid_t child = fork();
  if (child == 0) {
    expect(!many_loops(100), "in a forked child loops are alone");
    std::exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child ends");
}
