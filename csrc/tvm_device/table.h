// What portlm's devices for TVM have in common: the table of functions that TVM's runtime calls for memory and copies.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/any.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <string>

namespace portlm::tvm_device {

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

// What is the same on every device that has one queue, which keeps its order, and no pointers that the host may move.
class OneQueueTable : public DeviceTable {
 public:
  size_t GetDataSize(const DLTensor& tensor, tvm::ffi::Optional<tvm::ffi::String> scope) override;
  void GetTargetProperty(DLDevice, const std::string&, tvm::ffi::Any*) override {}
  void* AllocDataSpace(DLDevice device, int ndim, const int64_t* shape, DLDataType type,
                       tvm::ffi::Optional<tvm::ffi::String> scope) override;
  // Only whole, contiguous tensors are copied; what does it is the function that takes addresses and offsets.
  void CopyDataFromTo(DLTensor* from, DLTensor* to, void* stream) override;
  void* CreateStream(DLDevice) override { return nullptr; }
  void FreeStream(DLDevice, void*) override {}
  void SetStream(DLDevice, void*) override {}
  void* GetCurrentStream(DLDevice) override { return nullptr; }
  void SyncStreamFromTo(DLDevice, void*, void*) override {}
  void* AllocWorkspace(DLDevice device, size_t bytes, DLDataType type) override;
  void FreeWorkspace(DLDevice device, void* data) override;
  bool SupportsDevicePointerArithmeticsOnHost() override { return false; }

 protected:
  using DeviceTable::AllocDataSpace;
  using DeviceTable::CopyDataFromTo;
};

// Kinds of GetAttr, by TVM's numbers.
enum Attribute : int { kExists = 0, kThreads = 1, kWarp = 2, kShared = 3, kName = 5, kUnits = 7, kMemory = 14 };

}  // namespace portlm::tvm_device
