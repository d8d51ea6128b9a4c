// How the kernels of a module of TVM's are called, as its compiler says it, and the bytes in which libraries carry that.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/string.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace portlm::tvm_device {

// How a kernel is called: its arguments, and behind them one number for each tag of its launch that names an axis.
struct Signature {
  std::string name;
  std::vector<DLDataType> types;
  std::vector<std::string> tags;
  std::vector<int32_t> extra;
};

using Signatures = std::unordered_map<std::string, Signature>;

// Those in the objects in which the compiler hands them over.
Signatures signatures_of(const tvm::ffi::Map<tvm::ffi::String, tvm::ffi::ObjectRef>& objects);

// Bytes as TVM writes them: little endian, lengths and counts in 64 bits.
class Writer {
 public:
  void number(uint64_t value, size_t bytes = 8) { text_.append(reinterpret_cast<const char*>(&value), bytes); }
  void text(const std::string& value) {
    number(value.size());
    text_ += value;
  }
  // One kernel's, behind the key that it has in its module.
  void signature(const std::string& key, const Signature& signature);
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

// Throws ValueError where bytes end too soon.
class Reader {
 public:
  Reader(const char* data, size_t size) : data_(data), left_(size) {}

  uint64_t number(size_t bytes = 8);
  // How many follow, each of at least so many bytes: a wrong count cannot ask for memory.
  size_t count(size_t least);
  std::string text();
  Signatures signatures();

 private:
  const char* take(size_t bytes);

  const char* data_;
  size_t left_;
};

}  // namespace portlm::tvm_device
