// An OpenCL device: its memory and the one queue, which keeps its order, of what it is to do.
//
// Kernels run behind the host's back; reading an answer waits for all that was asked before. A device is made when it is
// first used and lives as long as the process, because TVM's objects may be freed at any time until its end.
//
// Nothing here is safe for two threads at a time: callers hold mutex().
#pragma once

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "opencl/opencl_api.h"

namespace portlm::opencl {

// Anything the device refuses, in one sentence that names the kernel where there is one.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Kernel;

// A part of the device's memory. TVM carries its address as the data pointer of a tensor.
struct Buffer {
  Memory handle = nullptr;
  size_t bytes = 0;  // asked for
};

// What an installed driver offers.
struct Adapter {
  std::string name;
  std::string kind;      // "gpu", "accelerator", "cpu" or "unknown"
  std::string platform;  // that it belongs to
  std::string driver;    // version of OpenCL, and of the driver
};

struct Limits {
  size_t threads = 0, units = 0;
  uint64_t shared = 0, memory = 0, most_bytes = 0;  // in bytes: of a group, of all, of one buffer
  bool half = false, real = false;                   // float16 and float64
};

// A kernel's argument: a buffer, or so many bytes of a number.
struct Argument {
  Buffer* buffer;
  std::array<unsigned char, 8> number;
  size_t bytes;
};

// How many groups a kernel is launched with, and threads of each, along three axes.
struct Grid {
  size_t groups[3] = {1, 1, 1}, threads[3] = {1, 1, 1};
};

class Device {
 public:
  // The device that `chosen` names: "" for the best, a number for that of the list, or a part of its or its platform's
  // name. Throws DeviceError where there is none.
  explicit Device(const std::string& chosen);

  static std::vector<Adapter> adapters();

  Buffer* allocate(size_t bytes);
  void release(Buffer* buffer);
  void upload(const void* from, Buffer* to, size_t offset, size_t bytes);
  void download(Buffer* from, size_t offset, void* to, size_t bytes);
  void copy(Buffer* from, size_t from_offset, Buffer* to, size_t to_offset, size_t bytes);
  void launch(Kernel& kernel, const std::vector<Argument>& arguments, const Grid& grid);
  // Waits until all that was asked is done.
  void wait();

  const Limits& limits() const { return limits_; }
  const Adapter& adapter() const { return adapter_; }
  Context context() const { return context_; }
  DeviceId id() const { return id_; }
  uint64_t launches() const { return launches_; }
  // Throws what a status means, with what was being done; kDone passes.
  void check(Status status, const std::string& doing);

 private:
  DeviceId id_ = nullptr;
  Context context_ = nullptr;
  Queue queue_ = nullptr;
  Adapter adapter_;
  Limits limits_;
  uint64_t launches_ = 0;
  std::string last_;  // the kernel launched last, for messages
};

std::mutex& mutex();

}  // namespace portlm::opencl
