// A Vulkan device behind WebGPU's interface: its memory, its pipelines, and the commands that wait to be sent.
//
// Commands are recorded into one encoder and sent together: when an answer is asked for, when data come in, and when the
// parameters of kernels fill their buffer. A device is made when it is first used and lives as long as the process,
// because TVM's objects may be freed at any time until its end.
//
// Nothing here is safe for two threads at a time: callers hold mutex().
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "vulkan/wgpu_api.h"

namespace portlm::vulkan {

// Anything the device refuses, in one sentence that names the kernel where there is one.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Kernel;

// A part of the device's memory. TVM carries its address as the data pointer of a tensor.
struct Buffer {
  WGPUBuffer handle = nullptr;
  size_t bytes = 0;   // asked for
  uint64_t id = 0;    // never used again
  std::unordered_set<Kernel*> bound;  // those that may have a bind group with it
};

// What an installed driver offers.
struct Adapter {
  std::string name;
  std::string kind;    // "discrete", "integrated", "virtual", "cpu" or "unknown"
  std::string driver;
};

// What one call of a kernel is made of.
struct Launch {
  const std::vector<Buffer*>& buffers;
  const std::vector<uint32_t>& parameters;  // 4 bytes each, whatever they are
  uint32_t grid[3];
};

class Device {
 public:
  // The device that `chosen` names: "" for the best, a number for that of the list, or a part of its name.
  // Throws DeviceError where there is none.
  explicit Device(const std::string& chosen);

  static std::vector<Adapter> adapters();

  Buffer* allocate(size_t bytes);
  void release(Buffer* buffer);
  void upload(const void* from, Buffer* to, size_t offset, size_t bytes);
  void download(Buffer* from, size_t offset, void* to, size_t bytes);
  void copy(Buffer* from, size_t from_offset, Buffer* to, size_t to_offset, size_t bytes);
  void launch(Kernel& kernel, const Launch& launch);
  // Sends what is recorded, and waits until all of it is done.
  void wait();

  const WGPULimits& limits() const { return limits_; }
  const Adapter& adapter() const { return adapter_; }
  bool half() const { return half_; }
  WGPUDevice handle() const { return device_; }
  // Throws what the device has complained of since the last call, with what was being done.
  void check(const std::string& doing);
  // A kernel is gone.
  void forget(Kernel* kernel);

 private:
  friend class Kernel;

  void send();
  void end_pass();
  WGPUCommandEncoder encoder();
  WGPUComputePassEncoder pass();
  WGPUBuffer staging(size_t bytes);

  WGPUDevice device_ = nullptr;
  WGPUQueue queue_ = nullptr;
  WGPULimits limits_ = {};
  Adapter adapter_;
  bool half_ = false;
  WGPUCommandEncoder encoder_ = nullptr;
  WGPUComputePassEncoder pass_ = nullptr;
  WGPUBuffer arena_ = nullptr;          // parameters of the kernels that wait to be sent
  std::vector<unsigned char> filled_;   // what is in it
  std::map<size_t, WGPUBuffer> staging_;  // by size, for answers
  std::unordered_set<Buffer*> buffers_;
  uint64_t ids_ = 0;
  std::string last_;                    // the kernel recorded last, for messages
  std::vector<std::string> complaints_;
  bool lost_ = false;
};

std::mutex& mutex();

}  // namespace portlm::vulkan
