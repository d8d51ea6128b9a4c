// Kernels in OpenCL C, compiled by the device's driver when the first of a module runs.
//
// What drivers compile they keep on disk themselves, PoCL like those of GPUs: a second process finds it there.
#pragma once

#include <memory>
#include <string>

#include "opencl/device.h"

namespace portlm::opencl {

// All kernels of a module as one program: a driver's compiler takes as long to begin as for several of them.
class Whole {
 public:
  explicit Whole(std::string source) : source_(std::move(source)) {}
  ~Whole();
  Whole(const Whole&) = delete;
  Whole& operator=(const Whole&) = delete;

  // Compiles it, the first time. nullptr if it does not compile: then each kernel says for itself whether it does.
  Program on(Device& device);

 private:
  std::string source_;
  Program program_ = nullptr;
  bool tried_ = false;
};

class Kernel {
 public:
  // `source` is its own part of the whole, in which it is called `symbol`.
  Kernel(std::string name, std::string symbol, std::string source, std::shared_ptr<Whole> whole);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const std::string& name() const { return name_; }
  // Compiles it, the first time. Throws DeviceError with what the driver says of the source.
  KernelId on(Device& device);
  // Threads that a group of it may have.
  size_t most_threads(Device& device);

 private:
  std::string name_, symbol_, source_;
  std::shared_ptr<Whole> whole_;
  Program own_ = nullptr;
  KernelId id_ = nullptr;
};

}  // namespace portlm::opencl
