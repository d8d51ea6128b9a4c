#include "tvm/call.h"

#include <cmath>

namespace portlm::tvm {

std::string shape_text(const int64_t* shape, int32_t ndim) {
  std::string text = "[";
  for (int32_t i = 0; i < ndim; ++i)
    text += (i ? ", " : "") + (shape[i] == kAny ? std::string("any") : std::to_string(shape[i]));
  return text + "]";
}

int64_t Tensor::stride(int32_t axis) const {
  if (axis < 0) axis += tensor_->ndim;
  if (tensor_->strides) return tensor_->strides[axis];
  int64_t stride = 1;
  for (int32_t i = axis + 1; i < tensor_->ndim; ++i) stride *= tensor_->shape[i];
  return stride;
}

int64_t Tensor::rows() const {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < tensor_->ndim; ++i) rows *= tensor_->shape[i];
  return rows;
}

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (int32_t i = 0; i < tensor_->ndim; ++i) count *= tensor_->shape[i];
  return count;
}

bool Tensor::contiguous() const {
  if (!tensor_->strides || elements() == 0) return true;
  int64_t wanted = 1;
  for (int32_t i = tensor_->ndim - 1; i >= 0; --i) {
    if (tensor_->shape[i] != 1 && tensor_->strides[i] != wanted) return false;
    wanted *= tensor_->shape[i];
  }
  return true;
}

void Call::fail(const std::string& message) const { throw Error(std::string("[") + op_ + "] " + message); }

void Call::expect_count(int32_t count) const {
  if (count_ != count) fail("takes " + std::to_string(count) + " arguments, got " + std::to_string(count_));
}

Tensor Call::any(int32_t i, const char* name) const {
  if (i >= count_) fail(std::string("argument ") + name + " is missing");
  const DLTensor* raw = nullptr;
  if (args_[i].type_index == kTensorObject)
    raw = reinterpret_cast<const DLTensor*>(args_[i].object + 1);
  else if (args_[i].type_index == kDLTensorPointer)
    raw = static_cast<const DLTensor*>(args_[i].pointer);
  if (!raw) fail(std::string(name) + " must be a tensor");
  return Tensor(raw, name);
}

Tensor Call::tensor(int32_t i, const char* name, int32_t ndim, DataTypeCode code, uint8_t bits, bool contiguous) const {
  const Tensor tensor = any(i, name);
  const DLTensor* const raw = &tensor.raw();
  if (ndim == kAny ? raw->ndim < 1 : raw->ndim != ndim)
    fail(std::string(name) + " must have " + (ndim == kAny ? "at least 1 axis" : std::to_string(ndim) + " axes") +
         ", got shape " + shape_text(raw->shape, raw->ndim));
  if (raw->dtype.code != code || raw->dtype.bits != bits || raw->dtype.lanes != 1)
    fail(std::string(name) + " must be " + (code == kFloat ? "float" : code == kInt ? "int" : "uint") + std::to_string(bits) +
         ", got type code " + std::to_string(raw->dtype.code) + " with " + std::to_string(raw->dtype.bits) + " bits");
  if (raw->device.type != kCpu) fail(std::string(name) + " must be on the CPU");
  if (contiguous && !tensor.contiguous()) fail(std::string(name) + " must be contiguous");
  return tensor;
}

Tensor Call::f32(int32_t i, const char* name, int32_t ndim) const { return tensor(i, name, ndim, kFloat, 32, true); }

Tensor Call::i64(int32_t i, const char* name, int32_t ndim) const { return tensor(i, name, ndim, kInt, 64, true); }

Tensor Call::u8(int32_t i, const char* name, int32_t ndim) const { return tensor(i, name, ndim, kUnsigned, 8, true); }

Tensor Call::strided_f32(int32_t i, const char* name, int32_t ndim) const {
  return tensor(i, name, ndim, kFloat, 32, false);
}

Tensor Call::strided_i8(int32_t i, const char* name, int32_t ndim) const { return tensor(i, name, ndim, kInt, 8, false); }

int64_t Call::integer(int32_t i, const char* name) const {
  if (i >= count_ || args_[i].type_index != kInteger) fail(std::string(name) + " must be an integer");
  return args_[i].integer;
}

float Call::real(int32_t i, const char* name) const {
  if (i < count_ && args_[i].type_index == kDouble) return static_cast<float>(args_[i].real);
  if (i < count_ && args_[i].type_index == kInteger) return static_cast<float>(args_[i].integer);
  fail(std::string(name) + " must be a number");
}

void Call::expect_shape(const Tensor& tensor, std::initializer_list<int64_t> wanted) const {
  bool equal = tensor.ndim() == static_cast<int32_t>(wanted.size());
  for (int32_t i = 0; equal && i < tensor.ndim(); ++i) {
    const int64_t extent = wanted.begin()[i];
    equal = extent == kAny || tensor.size(i) == extent;
  }
  if (!equal)
    fail(std::string(tensor.name()) + " must have shape " +
         shape_text(wanted.begin(), static_cast<int32_t>(wanted.size())) + ", got " +
         shape_text(tensor.raw().shape, tensor.ndim()));
}

void Call::expect_same_shape(const Tensor& a, const Tensor& b) const {
  bool equal = a.ndim() == b.ndim();
  for (int32_t i = 0; equal && i < a.ndim(); ++i) equal = a.size(i) == b.size(i);
  if (!equal)
    fail(std::string(a.name()) + " and " + b.name() + " must have the same shape, got " +
         shape_text(a.raw().shape, a.ndim()) + " and " + shape_text(b.raw().shape, b.ndim()));
}

void Call::expect_last(const Tensor& tensor, int64_t wanted) const {
  if (tensor.size(-1) != wanted)
    fail(std::string("the last axis of ") + tensor.name() + " must be " + std::to_string(wanted) + ", got shape " +
         shape_text(tensor.raw().shape, tensor.ndim()));
}

void Call::expect_columns(const Tensor& tensor, int64_t first, int64_t width) const {
  if (first < 0 || width < 0 || first > tensor.size(-1) - width)
    fail("columns " + std::to_string(first) + " to " + std::to_string(first + width) + " of " + tensor.name() +
         " do not exist, its shape is " + shape_text(tensor.raw().shape, tensor.ndim()));
}

int report(const char* kind, const std::string& message) {
  if (runtime().set_error) runtime().set_error(kind, message.c_str());
  return -1;
}

}  // namespace portlm::tvm
