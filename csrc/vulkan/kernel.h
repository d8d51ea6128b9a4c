// A kernel in WGSL: its pipeline, made when it first runs, and its bind groups, kept for the buffers it meets again.
//
// TVM's convention: storage buffers are bindings 0 .. n - 1 in the order of the arguments, and every other argument is
// four bytes of one uniform struct at binding n, behind which stands the size of the grid along x.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "vulkan/device.h"

namespace portlm::vulkan {

class Kernel {
 public:
  // `writes[i]` says whether storage buffer i is written.
  Kernel(std::string name, std::string source, std::vector<bool> writes, size_t parameters);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const std::string& name() const { return name_; }

 private:
  friend class Device;

  // A pipeline with its layout. Where one buffer is two arguments, one of which is written, WebGPU wants all bindings
  // to be written ones, so a kernel has up to two of these.
  struct Variant {
    WGPUBindGroupLayout layout = nullptr;
    WGPUComputePipeline pipeline = nullptr;
    std::map<std::vector<uint64_t>, WGPUBindGroup> groups;  // by ids of buffers
  };

  Variant& variant(Device& device, bool aliased);
  WGPUBindGroup group(Device& device, Variant& variant, const std::vector<Buffer*>& buffers);
  void forget(uint64_t buffer);

  std::string name_, source_;
  std::vector<bool> writes_;
  size_t parameters_;
  Device* device_ = nullptr;  // where it ran
  Variant variants_[2];
};

}  // namespace portlm::vulkan
