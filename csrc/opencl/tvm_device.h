// TVM's view of the device: the table of functions that its runtime calls for memory and copies.
#pragma once

#include <tvm/ffi/error.h>

#include <string>

#include "opencl/device.h"
#include "tvm_device/table.h"

namespace portlm::opencl {

// The device of this process, made when it is first asked for. Throws DeviceError.
Device& the_device();
// Which one that will be; false if it is made already.
bool choose_device(const std::string& name);

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

tvm_device::DeviceTable* device_table();

}  // namespace portlm::opencl
