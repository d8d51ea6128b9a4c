// Checked access to the arguments of one call. Every failure throws an Error whose text starts with the op's name.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cpu/threads.h"
#include "tvm/ffi_abi.h"

namespace portlm::tvm {

// What a wrapper throws; guarded() turns it into a ValueError on the other side of the C boundary.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Any extent is accepted where a wanted shape says so.
constexpr int64_t kAny = -1;

std::string shape_text(const int64_t* shape, int32_t ndim);

class Tensor {
 public:
  Tensor(const DLTensor* tensor, const char* name) : tensor_(tensor), name_(name) {}
  int32_t ndim() const { return tensor_->ndim; }
  int64_t size(int32_t axis) const { return tensor_->shape[axis < 0 ? axis + tensor_->ndim : axis]; }
  int64_t stride(int32_t axis) const;
  // Product of the extents of the axes before the last one.
  int64_t rows() const;
  int64_t elements() const;
  bool contiguous() const;
  const char* name() const { return name_; }
  const DLTensor& raw() const { return *tensor_; }
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor_->data) + tensor_->byte_offset);
  }

 private:
  const DLTensor* tensor_;
  const char* name_;
};

class Call {
 public:
  Call(const char* op, const Any* args, int32_t count) : op_(op), args_(args), count_(count) {}

  int32_t count() const { return count_; }
  void expect_count(int32_t count) const;

  // Contiguous CPU tensors of one rank (or any rank of at least one, if ndim is kAny).
  Tensor f32(int32_t i, const char* name, int32_t ndim = kAny) const;
  Tensor i64(int32_t i, const char* name, int32_t ndim = kAny) const;
  Tensor u8(int32_t i, const char* name, int32_t ndim = kAny) const;
  // A tensor of any type on any device.
  Tensor any(int32_t i, const char* name) const;
  // Of float32, without the demand to be contiguous.
  Tensor strided_f32(int32_t i, const char* name, int32_t ndim) const;
  Tensor strided_i8(int32_t i, const char* name, int32_t ndim) const;
  int64_t integer(int32_t i, const char* name) const;
  float real(int32_t i, const char* name) const;

  void expect_shape(const Tensor& tensor, std::initializer_list<int64_t> wanted) const;
  void expect_same_shape(const Tensor& a, const Tensor& b) const;
  void expect_last(const Tensor& tensor, int64_t wanted) const;
  // Columns [first, first + width) of the last axis exist.
  void expect_columns(const Tensor& tensor, int64_t first, int64_t width) const;
  [[noreturn]] void fail(const std::string& message) const;

 private:
  Tensor tensor(int32_t i, const char* name, int32_t ndim, DataTypeCode code, uint8_t bits, bool contiguous) const;

  const char* op_;
  const Any* args_;
  int32_t count_;
};

// Runs body and reports what it throws through the runtime; no C++ exception may cross into TVM.
int report(const char* kind, const std::string& message);
template <typename Body>
int guarded(const char* op, const Any* args, int32_t count, Body body) {
  try {
    const OwnThreads own;
    body(Call(op, args, count));
    return 0;
  } catch (const Error& error) {
    return report("ValueError", error.what());
  } catch (const std::exception& error) {
    return report("RuntimeError", std::string("[") + op + "] " + error.what());
  }
}

}  // namespace portlm::tvm
