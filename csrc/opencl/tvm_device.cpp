#include "opencl/tvm_device.h"

#include <cstdlib>
#include <cstring>
#include <memory>

namespace portlm::opencl {

namespace {

using namespace tvm_device;

std::string& chosen() {
  static auto* const name = new std::string;
  return *name;
}

std::unique_ptr<Device>& made() {
  static auto* const device = new std::unique_ptr<Device>;
  return *device;
}

class Table final : public OneQueueTable {
 public:
  void SetDevice(DLDevice device) override {
    if (device.device_id != 0)
      TVM_FFI_THROW(ValueError) << "one OpenCL device is used at a time, and it has number 0, not "
                                << device.device_id << ": choose it by PORTLM_OPENCL_DEVICE";
  }

  void GetAttr(DLDevice device, int kind, tvm::ffi::Any* result) override {
    *result = nullptr;
    if (kind == kExists) {
      *result = static_cast<int64_t>(device.device_id == 0 && exists());
      return;
    }
    guarded([&] {
      const Device& it = the_device();
      if (kind == kThreads) *result = static_cast<int64_t>(it.limits().threads);
      if (kind == kWarp) *result = static_cast<int64_t>(1);  // subgroups are not used
      if (kind == kShared) *result = static_cast<int64_t>(it.limits().shared);
      if (kind == kName) *result = tvm::ffi::String(it.adapter().name);
      if (kind == kUnits) *result = static_cast<int64_t>(it.limits().units);
      if (kind == kMemory) *result = static_cast<int64_t>(it.limits().memory);
    });
  }

  void* AllocDataSpace(DLDevice device, size_t bytes, size_t, DLDataType) override {
    SetDevice(device);
    return guarded([&] { return the_device().allocate(bytes); });
  }

  void FreeDataSpace(DLDevice, void* data) override {
    guarded([&] { the_device().release(static_cast<Buffer*>(data)); });
  }

  void StreamSync(DLDevice, void*) override {
    guarded([] { the_device().wait(); });
  }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes,
                      DLDevice from_device, DLDevice to_device, DLDataType, void*) override {
    const bool in = from_device.device_type == kDLCPU, out = to_device.device_type == kDLCPU;
    const auto* const source = static_cast<const char*>(from) + from_offset;
    auto* const target = static_cast<char*>(to) + to_offset;
    guarded([&] {
      Device& device = the_device();
      if (in && out) std::memmove(target, source, bytes);
      else if (in) device.upload(source, static_cast<Buffer*>(to), to_offset, bytes);
      else if (out) device.download(static_cast<Buffer*>(const_cast<void*>(from)), from_offset, target, bytes);
      else
        device.copy(static_cast<Buffer*>(const_cast<void*>(from)), from_offset, static_cast<Buffer*>(to), to_offset,
                    bytes);
    });
  }

 private:
  static bool exists() {
    const std::lock_guard<std::mutex> lock(mutex());
    return made() != nullptr || !Device::adapters().empty();
  }
};

}  // namespace

Device& the_device() {
  if (made() == nullptr) {
    const char* const asked = std::getenv("PORTLM_OPENCL_DEVICE");
    made() = std::make_unique<Device>(!chosen().empty() ? chosen() : asked == nullptr ? "" : asked);
  }
  return *made();
}

bool choose_device(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex());
  if (made() != nullptr) return false;
  chosen() = name;
  return true;
}

DeviceTable* device_table() {
  static auto* const table = new Table;
  return table;
}

}  // namespace portlm::opencl
