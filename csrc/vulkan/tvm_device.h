// TVM's view of the device: the table of functions that its runtime calls for memory and copies.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/any.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <string>

#include "vulkan/device.h"

namespace portlm::vulkan {

// The device of this process, made when it is first asked for. Throws DeviceError.
Device& the_device();
// Which one that will be; false if it is made already.
bool choose_device(const std::string& name);

// Classes of TVM's runtime 0.27 that are called through their table of virtual functions: what counts is the order of the
// functions and what they take. tvm/runtime/device_api.h has them; it is not included, since only this table is needed
// of it, and building portlm needs no TVM. Whoever loads this compares versions first.
class DeviceTable {
 public:
  virtual ~DeviceTable() = default;
  virtual void SetDevice(DLDevice device) = 0;
  virtual void GetAttr(DLDevice device, int kind, tvm::ffi::Any* result) = 0;
  virtual size_t GetDataSize(const DLTensor& tensor, tvm::ffi::Optional<tvm::ffi::String> scope) = 0;
  virtual void GetTargetProperty(DLDevice device, const std::string& property, tvm::ffi::Any* result) = 0;
  virtual void* AllocDataSpace(DLDevice device, size_t bytes, size_t alignment, DLDataType type) = 0;
  virtual void* AllocDataSpace(DLDevice device, int ndim, const int64_t* shape, DLDataType type,
                               tvm::ffi::Optional<tvm::ffi::String> scope) = 0;
  virtual void FreeDataSpace(DLDevice device, void* data) = 0;
  virtual void CopyDataFromTo(DLTensor* from, DLTensor* to, void* stream) = 0;
  virtual void* CreateStream(DLDevice device) = 0;
  virtual void FreeStream(DLDevice device, void* stream) = 0;
  virtual void StreamSync(DLDevice device, void* stream) = 0;
  virtual void SetStream(DLDevice device, void* stream) = 0;
  virtual void* GetCurrentStream(DLDevice device) = 0;
  virtual void SyncStreamFromTo(DLDevice device, void* from, void* to) = 0;
  virtual void* AllocWorkspace(DLDevice device, size_t bytes, DLDataType type) = 0;
  virtual void FreeWorkspace(DLDevice device, void* data) = 0;
  virtual bool SupportsDevicePointerArithmeticsOnHost() = 0;

 protected:
  virtual void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes,
                              DLDevice from_device, DLDevice to_device, DLDataType type, void* stream) = 0;
};

DeviceTable* device_table();

}  // namespace portlm::vulkan
