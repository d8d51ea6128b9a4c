// A kernel in OpenCL C, compiled by the device's driver when it first runs.
//
// What drivers compile they keep on disk themselves, PoCL like those of GPUs: a second process finds it there.
#pragma once

#include <string>

#include "opencl/device.h"

namespace portlm::opencl {

class Kernel {
 public:
  Kernel(std::string name, std::string source);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const std::string& name() const { return name_; }
  // Compiles it, the first time. Throws DeviceError with what the driver says of the source.
  KernelId on(Device& device);
  // Threads that a group of it may have.
  size_t most_threads(Device& device);

 private:
  std::string name_, source_;
  Program program_ = nullptr;
  KernelId id_ = nullptr;
};

}  // namespace portlm::opencl
