// The part of TVM-FFI's C ABI that the wrappers in this folder use, declared here so that building portlm needs no TVM.
//
// A TVM-FFI function is a C function `int __tvm_ffi_<name>(void* self, const Any* args, int32_t count, Any* result)`.
// It returns 0, or -1 after handing a message to the runtime. Arguments are tagged 16-byte values; tensors arrive as
// pointers to objects whose header is followed by a DLPack DLTensor. Nothing here is linked: the few functions of
// libtvm_ffi that are needed come in through portlm_connect (connect.cpp), which also checks the version this was
// written against.
//
// Sources: the TVM-FFI ABI overview (tvm.apache.org/ffi), DLPack 1.x (dmlc.github.io/dlpack).
#pragma once

#include <cstddef>
#include <cstdint>

namespace portlm::tvm {

// ABI versions that this file describes: 0.1.x.
constexpr uint32_t kAbiMajor = 0;
constexpr uint32_t kAbiMinor = 1;

enum DeviceType : int32_t { kCpu = 1 };
enum DataTypeCode : uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2 };

struct DLDevice {
  int32_t type;
  int32_t id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr means contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor* self);
};

enum TypeIndex : int32_t {
  kNone = 0,
  kInteger = 1,
  kBoolean = 2,
  kDouble = 3,
  kOpaquePointer = 4,
  kDLTensorPointer = 7,
  kStringObject = 65,
  kFunctionObject = 68,
  kTensorObject = 70,
  kArrayObject = 71,
};

// Header of every reference-counted object. A tensor object is this header followed by its DLTensor.
struct Object {
  uint64_t reference_counts;
  int32_t type_index;
  uint32_t padding;
  void (*deleter)(void* self, int flags);
};

struct Any {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    double real;
    void* pointer;
    Object* object;
  };
};

// What follows the header of a text, of a function and of an array.
struct BytesCell {
  const char* data;
  size_t size;
};

struct FunctionCell {
  int (*safe_call)(void* self, const Any* args, int32_t count, Any* result);
};

struct SequenceCell {
  void* data;  // the first of `size` Any
  int64_t size;
};

static_assert(sizeof(Any) == 16 && sizeof(Object) == 24 && sizeof(DLTensor) == 48, "TVM-FFI's 64-bit layout");

// Functions of libtvm_ffi, filled in by portlm_connect.
struct Runtime {
  void (*set_error)(const char* kind, const char* message) = nullptr;
  int (*tensor_from_dlpack)(DLManagedTensor* from, int32_t alignment, int32_t contiguous, void** out) = nullptr;
  int (*release)(void* object) = nullptr;
  Object* make_array = nullptr;  // a function that returns an array of its arguments
};

using Function = int (*)(void* self, const Any* args, int32_t count, Any* result);

// The functions of this folder by name, nullptr for none.
Function find_function(const char* name);
struct Listed {
  Listed(const char* name, Function function);
};

Runtime& runtime();

}  // namespace portlm::tvm

#define PORTLM_TVM_FUNCTION(name)                                                                          \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_portlm_##name(                           \
      void* self, const ::portlm::tvm::Any* args, int32_t count, ::portlm::tvm::Any* result);              \
  [[maybe_unused]] static const ::portlm::tvm::Listed listed_##name(#name, __tvm_ffi_portlm_##name);       \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_portlm_##name(                           \
      [[maybe_unused]] void* self, const ::portlm::tvm::Any* args, int32_t count,                          \
      [[maybe_unused]] ::portlm::tvm::Any* result)
