// A block's threads as fibers: each runs until it reaches a barrier or its end, then the next one of its warp does, and no warp
// waits for another before a barrier of the block. So a thread never sees what another wrote in the same stretch between
// barriers unless it comes after it, and the order in which they come is chosen from outside: a missing barrier shows as a
// result that depends on it. One launch runs at a time.
#include "emulator.h"

#include <cuda_runtime.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace portlm::cuda {
constexpr size_t kFloats = cuda_on_cpu::kMostSharedBytes / sizeof(float), kBehind = 1024;
// As common.cuh declares it, and some room behind it that no block may touch.
extern thread_local float memory[] __attribute__((aligned(32)));
thread_local float memory[kFloats + kBehind] __attribute__((aligned(32)));  // the size is known only here
}  // namespace portlm::cuda

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr uint32_t kUnwritten = 0x7fc0dead;  // a NaN

enum class State { ready, at_block_barrier, at_warp_barrier, done };

constexpr size_t kMostExchanged = 32, kCopied = 16;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  State state;
  uint3 thread;
  const char* file;
  int line;
  unsigned turn;  // which of the values is being exchanged
  alignas(8) char values[2][kMostExchanged];  // the last one is still read by others when the next is written
  std::vector<std::vector<Copy>> copies;      // groups, the last one open
  bool started = false;
  jmp_buf where;
  char* stack = nullptr;
};

struct Machine {
  std::vector<Fiber> fibers{1024};
  Fiber* running = nullptr;
  unsigned count = 0;  // threads of a block
  const std::function<void()>* thread = nullptr;
  jmp_buf scheduler;
  std::exception_ptr fault;  // of a thread: its stack ends here, so it is thrown again on the scheduler's
  unsigned order = 0;

  ~Machine() {
    for (Fiber& fiber : fibers)
      if (fiber.stack) munmap(fiber.stack, kStackBytes);
  }
};
Machine machine;
std::mutex one_launch;

// The shared memory of a block: all thread-local variables of this library, in the running thread.
struct Shared {
  char* begin = nullptr;
  size_t bytes = 0;
};

int look_for_this_library(dl_phdr_info* info, size_t, void* found) {
  const auto here = reinterpret_cast<uintptr_t>(&look_for_this_library);
  const ElfW(Phdr) *tls = nullptr, *code = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_TLS) tls = &part;
    if (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz) code = &part;
  }
  if (!code) return 0;
  if (tls && info->dlpi_tls_data) *static_cast<Shared*>(found) = {static_cast<char*>(info->dlpi_tls_data), tls->p_memsz};
  return 1;
}

Shared shared_memory_of_a_block() {
  portlm::cuda::memory[0] = 0.0f;  // from the first use on the thread has it
  Shared shared;
  dl_iterate_phdr(look_for_this_library, &shared);
  const char* const known = reinterpret_cast<char*>(portlm::cuda::memory);
  if (known < shared.begin || known + sizeof(portlm::cuda::memory) > shared.begin + shared.bytes)
    throw std::runtime_error("the shared memory was not found");
  return shared;
}

// A fiber's whole life: one thread after another, of block after block.
void run_threads() {
  for (;;) {
    Machine& m = machine;
    try {
      (*m.thread)();
    } catch (...) {
      m.fault = std::current_exception();
    }
    Fiber& fiber = *m.running;
    fiber.state = State::done;
    if (!setjmp(fiber.where)) longjmp(m.scheduler, 1);
  }
}

void resume(Machine& m, Fiber& fiber) {
  m.running = &fiber;
  threadIdx = fiber.thread;
  if (setjmp(m.scheduler)) {
    if (m.fault) std::rethrow_exception(std::exchange(m.fault, nullptr));
    return;
  }
  if (fiber.started) longjmp(fiber.where, 1);
  fiber.started = true;
  if (!fiber.stack) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(stack);
  }
  ucontext_t begin;  // only to get onto the new stack: later changes need no system call
  getcontext(&begin);
  begin.uc_stack.ss_sp = fiber.stack;
  begin.uc_stack.ss_size = kStackBytes;
  begin.uc_link = nullptr;
  makecontext(&begin, run_threads, 0);
  setcontext(&begin);
}

void wait(State state, const char* file, int line) {
  Machine& m = machine;
  Fiber& fiber = *m.running;
  fiber.state = state;
  fiber.file = file;
  fiber.line = line;
  if (!setjmp(fiber.where)) longjmp(m.scheduler, 1);
}

std::string place(const Fiber& fiber) {
  const std::string thread = "thread (" + std::to_string(fiber.thread.x) + ", " + std::to_string(fiber.thread.y) + ")";
  if (fiber.state == State::done) return thread + " has ended";
  const char* slash = std::strrchr(fiber.file, '/');
  return thread + " waits for its " + (fiber.state == State::at_block_barrier ? "block" : "warp") + " in " +
         (slash ? slash + 1 : fiber.file) + ":" + std::to_string(fiber.line);
}

// Whether fibers [begin, end) all wait for each other, in one place.
bool met(const Machine& m, unsigned begin, unsigned end, State state) {
  const Fiber& first = m.fibers[begin];
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.state != state || fiber.line != first.line || std::strcmp(fiber.file, first.file)) return false;
  }
  return true;
}

void release(Machine& m, unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) m.fibers[i].state = State::ready;
}

// Lets the warp go on if its threads have met.
bool warp_goes_on(Machine& m, uint64_t warp) {
  const unsigned begin = static_cast<unsigned>(warp) * kWarp;
  const unsigned end = std::min(begin + kWarp, m.count);  // the last warp of some blocks is not whole
  if (!met(m, begin, end, State::at_warp_barrier)) return false;
  release(m, begin, end);
  return true;
}

// Lets the block go on if its threads have met; false if all have ended.
bool go_on(Machine& m) {
  const auto ended = [](const Fiber& fiber) { return fiber.state == State::done; };
  if (std::all_of(m.fibers.begin(), m.fibers.begin() + m.count, ended)) return false;
  if (met(m, 0, m.count, State::at_block_barrier)) {
    release(m, 0, m.count);
    return true;
  }
  const Fiber& first = *std::find_if_not(m.fibers.begin(), m.fibers.begin() + m.count, ended);
  const Fiber* other = nullptr;
  for (unsigned i = 0; i < m.count; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.state != first.state || fiber.line != first.line || std::strcmp(fiber.file, first.file)) other = &fiber;
  }
  throw std::runtime_error("threads of a block wait in vain: " + place(first) +
                           (other ? ", and " + place(*other) : ", and its warp is not whole"));
}

void arrive(const Copy& copy) {
  std::memset(copy.to, 0, kCopied);
  if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
}

// 0, 1, 2, ... n - 1; the same backwards; or shuffled.
std::vector<uint64_t> ordered(uint64_t n, unsigned order) {
  std::vector<uint64_t> found(n);
  std::iota(found.begin(), found.end(), uint64_t{0});
  if (order == 1) std::reverse(found.begin(), found.end());
  if (order > 1) std::shuffle(found.begin(), found.end(), std::mt19937(order));
  return found;
}

}  // namespace

void choose_order(unsigned order) { machine.order = order; }

unsigned lane() {
  const Machine& m = machine;
  return static_cast<unsigned>(m.running - m.fibers.data()) % kWarp;
}

unsigned lanes() {
  const Machine& m = machine;
  const unsigned left = m.count - static_cast<unsigned>(m.running - m.fibers.data()) / kWarp * kWarp;
  return left < kWarp ? (1u << left) - 1 : 0xffffffffu;
}

void block_barrier(const char* file, int line) { wait(State::at_block_barrier, file, line); }

uint64_t exchange(unsigned mask, uint64_t value, unsigned from, const char* file, int line) {
  if (mask != lanes()) throw std::runtime_error("only whole warps exchange values here");
  // A lane that has no thread gives the asking one its own value, as on a device.
  const unsigned there = lanes() >> from % kWarp & 1 ? from % kWarp : lane();
  return exchange_bytes(&value, sizeof value, file, line).at<uint64_t>(static_cast<int>(there));
}

WarpValues exchange_bytes(const void* value, size_t bytes, const char* file, int line) {
  Machine& m = machine;
  Fiber* const self = m.running;
  const unsigned turn = self->turn;
  if (bytes > kMostExchanged) throw std::runtime_error("a warp exchanges no more than 32 bytes of each thread");
  std::memcpy(self->values[turn], value, bytes);
  wait(State::at_warp_barrier, file, line);
  self->turn = 1 - turn;
  const Fiber* const warp = self - (self - m.fibers.data()) % kWarp;
  return {warp->values[turn], sizeof(Fiber)};
}

void copy_later(void* to, const void* from, size_t bytes) {
  const uintptr_t ends = reinterpret_cast<uintptr_t>(to) | (bytes ? reinterpret_cast<uintptr_t>(from) : 0);
  if (ends % kCopied) throw std::runtime_error("an end of a copy is not aligned to 16 bytes");
  const Copy copy = {to, from, bytes};
  if (machine.order == 1)
    arrive(copy);  // as soon as it may
  else
    machine.running->copies.back().push_back(copy);
}

void end_copies() { machine.running->copies.emplace_back(); }

void finish_copies(size_t under) {
  auto& groups = machine.running->copies;
  while (groups.size() > under + 1) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  Machine& m = machine;
  const Shared shared = shared_memory_of_a_block();
  m.thread = &thread;
  m.count = block.x * block.y * block.z;
  gridDim = grid;
  blockDim = block;
  struct Ending {
    Machine& m;
    bool whole = false;
    ~Ending() {
      m.running = nullptr;
      for (unsigned i = 0; !whole && i < m.count; ++i) m.fibers[i].started = false;  // what waits will not be waited for
    }
  } ending{m};
  const auto warps = ordered((m.count + kWarp - 1) / kWarp, m.order), turns = ordered(kWarp, m.order);
  static const std::vector<uint32_t> unwritten(shared.bytes / sizeof kUnwritten, kUnwritten);
  const size_t room = (shared_bytes + sizeof(float) - 1) / sizeof(float);
  for (const uint64_t b : ordered(uint64_t{grid.x} * grid.y * grid.z, m.order)) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::memcpy(shared.begin, unwritten.data(), shared.bytes / sizeof kUnwritten * sizeof kUnwritten);
    for (unsigned i = 0; i < m.count; ++i) {
      Fiber& fiber = m.fibers[i];
      fiber.state = State::ready;
      fiber.turn = 0;
      fiber.copies.assign(1, {});
      fiber.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
    do {
      for (const uint64_t warp : warps)  // each as far as it gets without the others
        do
          for (const uint64_t lane : turns)
            if (const uint64_t i = warp * kWarp + lane; i < m.count && m.fibers[i].state == State::ready) resume(m, m.fibers[i]);
        while (warp_goes_on(m, warp));
    } while (go_on(m));
    const size_t behind = portlm::cuda::kFloats + portlm::cuda::kBehind - room;
    if (std::memcmp(&portlm::cuda::memory[room], unwritten.data(), behind * sizeof kUnwritten))
      throw std::runtime_error("a block wrote behind the shared memory that it was given");
  }
  ending.whole = true;
}

}  // namespace cuda_on_cpu
