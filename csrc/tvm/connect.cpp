// portlm_connect: receives the runtime's functions once, before any other function of this folder is called.
#include <string>
#include <unordered_map>

#include "tvm/call.h"

namespace portlm::tvm {

Runtime& runtime() {
  static Runtime instance;
  return instance;
}

namespace {

std::unordered_map<std::string, Function>& listed() {
  static auto* const all = new std::unordered_map<std::string, Function>;
  return *all;
}

}  // namespace

Listed::Listed(const char* name, Function function) { listed()[name] = function; }

Function find_function(const char* name) {
  const auto found = listed().find(name);
  return found == listed().end() ? nullptr : found->second;
}

}  // namespace portlm::tvm

// Arguments: ABI major and minor version, then the addresses (as integers) of TVMFFIErrorSetRaisedFromCStr,
// TVMFFITensorFromDLPack and TVMFFIObjectDecRef in the libtvm_ffi that is loaded, then the
// function that makes arrays, which its caller keeps. Result: 1, or 0 if the version is not the one known here; no error
// can be raised before the address that raises it is known.
PORTLM_TVM_FUNCTION(connect) {
  using namespace portlm::tvm;
  result->type_index = kInteger;
  result->padding = 0;
  result->integer = 0;
  if (count != 6 || args[5].type_index != kFunctionObject) return 0;
  for (int32_t i = 0; i < 5; ++i)
    if (args[i].type_index != kInteger) return 0;
  if (args[0].integer != kAbiMajor || args[1].integer != kAbiMinor) return 0;
  runtime().set_error = reinterpret_cast<decltype(Runtime::set_error)>(args[2].integer);
  runtime().tensor_from_dlpack = reinterpret_cast<decltype(Runtime::tensor_from_dlpack)>(args[3].integer);
  runtime().release = reinterpret_cast<decltype(Runtime::release)>(args[4].integer);
  runtime().make_array = args[5].object;
  result->integer = 1;
  return 0;
}
