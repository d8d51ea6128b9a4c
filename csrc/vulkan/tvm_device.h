// TVM's view of the device: the table of functions that its runtime calls for memory and copies.
#pragma once

#include <string>

#include "tvm_device/table.h"
#include "vulkan/device.h"

namespace portlm::vulkan {

// The device of this process, made when it is first asked for. Throws DeviceError.
Device& the_device();
// Which one that will be; false if it is made already.
bool choose_device(const std::string& name);

tvm_device::DeviceTable* device_table();

}  // namespace portlm::vulkan
