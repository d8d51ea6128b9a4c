#include "cpu/pool.h"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#define PORTLM_POSIX
#endif

namespace portlm {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr auto kSpin = 500us;        // for which a thread looks for a part before it sleeps
constexpr auto kSpinAlone = 20us;    // of these, without asking whether another program wants the core
constexpr auto kSetAside = 50us;     // a turn of that takes this long if one did
constexpr auto kPatience = 50us;     // for which a part's end is waited for before the waiting thread sleeps
constexpr auto kUnusual = 100us;     // parts of a loop may differ by that much, or by half of the loop
constexpr auto kLongestStay = 1000ms;
constexpr int kTurn = 32;            // pauses between two looks at the clock

thread_local bool inside_loop = false;
std::atomic<bool> forked{false};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline void yield_core() {
#ifdef PORTLM_POSIX
  sched_yield();
#else
  std::this_thread::yield();
#endif
}

// Signals are for the program's own threads.
class NoSignals {
#ifdef PORTLM_POSIX
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#endif
};

}  // namespace

int Crowd::threads(int wanted, Time now) {
  if (halvings_ == 0) return wanted;
  if (now >= until_) {
    --halvings_;
    until_ = now + stay_;
  }
  return std::max(1, wanted >> std::min(halvings_, 30));
}

void Crowd::took(Duration useful, Duration lost, Time now) {
  together_ += useful;
  if (lost == Duration::zero()) return;
  // Half of the time is what several threads gain at least, where they gain anything.
  if (together_ >= 2 * lost) {
    stay_ = Duration::zero();
  } else {
    stay_ = std::min<Duration>(std::max(2 * stay_, 4 * lost), kLongestStay);
    halvings_ = std::min(halvings_ + 1, 30);
    until_ = now + stay_;
  }
  together_ = Duration::zero();
}

// One thread, and the part of a loop that it is given: on a line of its own, which two threads write in turn.
class alignas(64) Pool::Worker {
 public:
  Worker() {
    const NoSignals none;
    std::thread([this] { live(); }).detach();
  }

  void give(Part part, const void* body, int64_t id, int64_t count) {
    part_ = part, body_ = body, id_ = id, count_ = count;
    if (state_.exchange(ready, std::memory_order_acq_rel) == asleep) wake();
  }

  // Whether nobody has begun the part that was given, and nobody will.
  bool take_back() {
    State expected = ready;
    return state_.compare_exchange_strong(expected, idle, std::memory_order_acq_rel);
  }

  bool busy() const { return state_.load(std::memory_order_acquire) == taken; }

  // Returns when the part that was begun has ended.
  void await() {
    const auto deadline = Clock::now() + kPatience;
    do
      for (int i = 0; i < kTurn; ++i) {
        if (!busy()) return;
        pause();
      }
    while (Clock::now() < deadline);
    State expected = taken;
    if (!state_.compare_exchange_strong(expected, awaited, std::memory_order_acq_rel)) return;
    sleep_while(awaited);
  }

  // What the last part threw.
  std::exception_ptr error() { return std::exchange(error_, nullptr); }

 private:
  enum State : uint32_t {
    idle,
    asleep,   // idle, and to be woken
    ready,    // a part is there for whoever comes first
    taken,    // by this thread
    awaited,  // taken, and somebody sleeps until it has ended
  };

  void live() {
    inside_loop = true;
    for (;;) {
      if (!look()) {
        State expected = idle;
        if (state_.compare_exchange_strong(expected, asleep, std::memory_order_acq_rel)) sleep_while(asleep);
      }
      State expected = ready;
      if (!state_.compare_exchange_strong(expected, taken, std::memory_order_acq_rel)) continue;
      try {
        part_(body_, id_, count_);
      } catch (...) {
        error_ = std::current_exception();
      }
      if (state_.exchange(idle, std::memory_order_acq_rel) == awaited) wake();
    }
  }

  // Waits for a part without sleeping; false if it took too long, or another program wants the core.
  bool look() {
    const auto begin = Clock::now();
    auto last = begin;
    for (;;) {
      for (int i = 0; i < kTurn; ++i) {
        if (state_.load(std::memory_order_acquire) == ready) return true;
        pause();
      }
      const auto now = Clock::now();
      if (now - begin > kSpin || now - last > kSetAside) return false;
      last = now;
      if (now - begin > kSpinAlone) yield_core();
    }
  }

  void sleep_while(State state) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return state_.load(std::memory_order_acquire) != state; });
  }

  void wake() {
    { const std::lock_guard<std::mutex> lock(mutex_); }  // who looked before the change sleeps by now
    changed_.notify_one();                               // there is one at most: the other one is here
  }

  std::atomic<State> state_{idle};
  Part part_ = nullptr;
  const void* body_ = nullptr;
  int64_t id_ = 0, count_ = 0;
  std::exception_ptr error_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

Pool::Pool() {
#ifdef PORTLM_POSIX
  pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif
}

Pool& Pool::shared() {
  static Pool* const pool = new Pool;
  return *pool;
}

bool Pool::inside() { return inside_loop; }

// Returns how many threads there are, the caller's included: `threads`, if the system has so many.
int Pool::grow(int threads) {
  try {
    while (static_cast<int>(workers_.size()) + 1 < threads) workers_.push_back(std::make_unique<Worker>());
  } catch (const std::system_error&) {
  }
  return std::min(threads, static_cast<int>(workers_.size()) + 1);
}

void Pool::run(int count, Part part, const void* body) {
  if (count < 2 || inside_loop || forked.load(std::memory_order_relaxed) ||
      in_use_.exchange(true, std::memory_order_acquire))
    return part(body, 0, 1);
  const auto begin = Clock::now();
  struct Use {  // until the end, come what may
    std::atomic<bool>& in_use;
    ~Use() {
      inside_loop = false;
      in_use.store(false, std::memory_order_release);
    }
  } const use{in_use_};
  inside_loop = true;
  count = crowd_.threads(count, begin);
  if (count > 1) count = grow(count);
  count > 1 ? run_together(count, part, body, begin) : part(body, 0, 1);
}

void Pool::run_together(int count, Part part, const void* body, Crowd::Time begin) {
  std::exception_ptr error;
  const auto call = [&](int64_t id) {
    try {
      part(body, id, count);
    } catch (...) {
      error = std::current_exception();
    }
  };
  for (int id = 1; id < count; ++id) workers_[id - 1]->give(part, body, id, count);
  call(0);
  for (int id = 1; id < count; ++id)
    if (workers_[id - 1]->take_back()) call(id);
  const auto worked = Clock::now();
  bool waited = false;
  for (int id = 1; id < count; ++id) {
    Worker& worker = *workers_[id - 1];
    if (worker.busy()) {
      worker.await();
      waited = true;
    }
    if (std::exception_ptr thrown = worker.error()) error = thrown;
  }
  const auto ended = waited ? Clock::now() : worked;
  const auto useful = worked - begin, usual = useful / 2 + kUnusual, wait = ended - worked;
  crowd_.took(useful, wait > usual ? wait - usual : Crowd::Duration::zero(), ended);
  if (error) std::rethrow_exception(error);
}

}  // namespace portlm
