#include "tvm_device/signature.h"

#include <tvm/ffi/error.h>
#include <tvm/ffi/object.h>

#include <cstring>

namespace portlm::tvm_device {

namespace ffi = tvm::ffi;

namespace {

// The object in which the compiler hands a signature over: its fields, in their order (tvm/src/runtime/metadata.h).
class SignatureObject : public ffi::Object {
 public:
  ffi::String name;
  ffi::Array<DLDataType> types;
  ffi::Array<ffi::String> tags;
  ffi::Array<int> extra;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("runtime.FunctionInfo", SignatureObject, ffi::Object);
};

}  // namespace

Signatures signatures_of(const ffi::Map<ffi::String, ffi::ObjectRef>& objects) {
  Signatures result;
  for (const auto& [key, object] : objects) {
    const auto* const it = static_cast<const SignatureObject*>(object.get());
    Signature signature{it->name, {}, {}, {}};
    for (const DLDataType type : it->types) signature.types.push_back(type);
    for (const ffi::String& tag : it->tags) signature.tags.push_back(tag);
    for (const int tag : it->extra) signature.extra.push_back(tag);
    result.emplace(key, std::move(signature));
  }
  return result;
}

void Writer::signature(const std::string& key, const Signature& signature) {
  text(key);
  text(signature.name);
  number(signature.types.size());
  for (const DLDataType& type : signature.types) {
    number(type.code, 1);
    number(type.bits, 1);
    number(type.lanes, 2);
  }
  number(signature.tags.size());
  for (const std::string& tag : signature.tags) text(tag);
  number(signature.extra.size());
  for (const int32_t tag : signature.extra) number(static_cast<uint32_t>(tag), 4);
}

const char* Reader::take(size_t bytes) {
  if (bytes > left_) TVM_FFI_THROW(ValueError) << "a module of kernels ends too soon";
  const char* const here = data_;
  data_ += bytes;
  left_ -= bytes;
  return here;
}

uint64_t Reader::number(size_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, take(bytes), bytes);
  return value;
}

size_t Reader::count(size_t least) {
  const uint64_t value = number();
  if (value > left_ / least) TVM_FFI_THROW(ValueError) << "a module of kernels counts " << value << " parts it has not";
  return value;
}

std::string Reader::text() {
  const size_t size = count(1);
  return std::string(take(size), size);
}

Signatures Reader::signatures() {
  Signatures result;
  for (size_t i = count(40); i > 0; --i) {
    std::string key = text();
    Signature signature{text(), {}, {}, {}};
    for (size_t n = count(4); n > 0; --n) {
      const auto code = static_cast<uint8_t>(number(1)), bits = static_cast<uint8_t>(number(1));
      signature.types.push_back({code, bits, static_cast<uint16_t>(number(2))});
    }
    for (size_t n = count(8); n > 0; --n) signature.tags.push_back(text());
    for (size_t n = count(4); n > 0; --n) signature.extra.push_back(static_cast<int32_t>(number(4)));
    result.emplace(std::move(key), std::move(signature));
  }
  return result;
}

}  // namespace portlm::tvm_device
