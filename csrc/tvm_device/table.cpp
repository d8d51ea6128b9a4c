#include "tvm_device/table.h"

#include <tvm/ffi/error.h>

namespace portlm::tvm_device {

namespace {

size_t bytes_of(const DLTensor& tensor) {
  size_t count = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) count *= static_cast<size_t>(tensor.shape[i]);
  return (count * tensor.dtype.bits * tensor.dtype.lanes + 7) / 8;
}

bool contiguous(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

}  // namespace

size_t OneQueueTable::GetDataSize(const DLTensor& tensor, tvm::ffi::Optional<tvm::ffi::String>) {
  return bytes_of(tensor);
}

void* OneQueueTable::AllocDataSpace(DLDevice device, int ndim, const int64_t* shape, DLDataType type,
                                    tvm::ffi::Optional<tvm::ffi::String> scope) {
  if (scope.has_value() && scope.value() != "global")
    TVM_FFI_THROW(ValueError) << "the device has no memory of scope " << scope.value();
  DLTensor tensor = {};
  tensor.ndim = ndim;
  tensor.shape = const_cast<int64_t*>(shape);
  tensor.dtype = type;
  return AllocDataSpace(device, bytes_of(tensor), 0, type);
}

void OneQueueTable::CopyDataFromTo(DLTensor* from, DLTensor* to, void* stream) {
  const size_t bytes = bytes_of(*from);
  if (bytes != bytes_of(*to))
    TVM_FFI_THROW(ValueError) << "cannot copy " << bytes << " bytes into a tensor of " << bytes_of(*to);
  for (const DLTensor* each : {from, to})
    if (!contiguous(*each)) TVM_FFI_THROW(ValueError) << "only contiguous tensors can be copied";
  CopyDataFromTo(from->data, from->byte_offset, to->data, to->byte_offset, bytes, from->device, to->device, from->dtype,
                 stream);
}

void* OneQueueTable::AllocWorkspace(DLDevice device, size_t bytes, DLDataType type) {
  return AllocDataSpace(device, bytes, 0, type);
}

void OneQueueTable::FreeWorkspace(DLDevice device, void* data) { FreeDataSpace(device, data); }

}  // namespace portlm::tvm_device
