#include "vulkan/tvm_device.h"

#include <tvm/ffi/error.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

namespace portlm::vulkan {

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

bool is_int64(DLDataType type) { return (type.code == kDLInt || type.code == kDLUInt) && type.bits == 64; }

// WGSL has no 64 bits, so whole numbers of 64 are 32 on the device, in the first half of their room. The kernels are
// rewritten to match when they are compiled.
void narrow(const char* from, std::vector<int32_t>& to) {
  for (size_t i = 0; i < to.size(); ++i) {
    int64_t value;
    std::memcpy(&value, from + 8 * i, 8);
    if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
      throw DeviceError("the whole number " + std::to_string(value) +
                        " does not fit the 32 bits that the device computes with");
    to[i] = static_cast<int32_t>(value);
  }
}

// Runs something with the device to itself, and turns what it throws into TVM's errors.
template <typename Action>
auto guarded(Action action) {
  try {
    const std::lock_guard<std::mutex> lock(mutex());
    return action();
  } catch (const DeviceError& error) {
    TVM_FFI_THROW(RuntimeError) << error.what();
  }
  TVM_FFI_UNREACHABLE();
}

class Table final : public tvm_device::OneQueueTable {
 public:
  void SetDevice(DLDevice device) override {
    if (device.device_id != 0)
      TVM_FFI_THROW(ValueError) << "one Vulkan device is used at a time, and it has number 0, not "
                                << device.device_id << ": choose it by PORTLM_VULKAN_DEVICE";
  }

  void GetAttr(DLDevice device, int kind, tvm::ffi::Any* result) override {
    *result = nullptr;
    if (kind == kExists) {
      *result = static_cast<int64_t>(device.device_id == 0 && exists());
      return;
    }
    guarded([&] {
      const Device& it = the_device();
      if (kind == kThreads) *result = static_cast<int64_t>(it.limits().maxComputeInvocationsPerWorkgroup);
      if (kind == kWarp) *result = static_cast<int64_t>(1);  // subgroups are not used
      if (kind == kShared) *result = static_cast<int64_t>(it.limits().maxComputeWorkgroupStorageSize);
      if (kind == kName) *result = tvm::ffi::String(it.adapter().name);
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
                      DLDevice from_device, DLDevice to_device, DLDataType type, void*) override {
    const bool in = from_device.device_type == kDLCPU, out = to_device.device_type == kDLCPU;
    const bool halved = is_int64(type);
    guarded([&] {
      Device& device = the_device();
      const size_t size = halved ? bytes / 2 : bytes;
      if (in && out) {
        std::memmove(static_cast<char*>(to) + to_offset, static_cast<const char*>(from) + from_offset, bytes);
      } else if (in) {
        const auto* const source = static_cast<const char*>(from) + from_offset;
        auto* const target = static_cast<Buffer*>(to);
        if (!halved) return device.upload(source, target, to_offset, size);
        std::vector<int32_t> words(bytes / 8);
        narrow(source, words);
        device.upload(words.data(), target, to_offset / 2, size);
      } else if (out) {
        auto* const source = static_cast<Buffer*>(const_cast<void*>(from));
        auto* const target = static_cast<char*>(to) + to_offset;
        if (!halved) return device.download(source, from_offset, target, size);
        std::vector<int32_t> words(bytes / 8);
        device.download(source, from_offset / 2, words.data(), size);
        for (size_t i = 0; i < words.size(); ++i) {
          const int64_t value = words[i];
          std::memcpy(target + 8 * i, &value, 8);
        }
      } else {
        device.copy(static_cast<Buffer*>(const_cast<void*>(from)), halved ? from_offset / 2 : from_offset,
                    static_cast<Buffer*>(to), halved ? to_offset / 2 : to_offset, size);
      }
    });
  }

 private:
  static bool exists() {
    try {
      const std::lock_guard<std::mutex> lock(mutex());
      return made() != nullptr || !Device::adapters().empty();
    } catch (const DeviceError&) {
      return false;
    }
  }
};

}  // namespace

Device& the_device() {
  if (made() == nullptr) {
    const char* const asked = std::getenv("PORTLM_VULKAN_DEVICE");
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

tvm_device::DeviceTable* device_table() {
  static auto* const table = new Table;
  return table;
}

}  // namespace portlm::vulkan
