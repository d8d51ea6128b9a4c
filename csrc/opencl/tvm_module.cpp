// Modules of TVM whose kernels are OpenCL C, and the names under which TVM finds them and the device.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>

#include "opencl/kernel.h"
#include "opencl/tvm_device.h"
#include "tvm_device/signature.h"

namespace portlm::opencl {

namespace {

namespace ffi = tvm::ffi;

using namespace tvm_device;

constexpr char kFormat[] = "cl";             // TVM's word for OpenCL C
constexpr char kBegin[] = "// Function: ";   // before each kernel of a source, which declares all others, too

// OpenCL's functions are for numbers of any width; for some of them TVM writes C's name of that for float32.
constexpr const char* kNarrow[] = {"acos",  "acosh", "asin",  "asinh", "atan", "atan2", "atanh",     "copysign", "cosh",
                                   "expm1", "fmod",  "hypot", "ldexp", "log1p", "log2", "log10", "nextafter", "sinh",
                                   "tan"};

// Without the declarations of all kernels that TVM writes before each: none calls another.
std::string undeclared(const std::string& source) {
  std::string result;
  for (size_t at = 0; at < source.size();) {
    const size_t end = std::min(source.find('\n', at), source.size() - 1);
    const std::string line = source.substr(at, end + 1 - at);
    const bool declares = line.rfind("__kernel void ", 0) == 0 && line.find(");") != std::string::npos;
    if (!declares) result += line;
    at = end + 1;
  }
  return result;
}

// What a driver takes, of a kernel as TVM writes it.
std::string readable(const std::string& source) {
  std::string text = undeclared(source);
  // Kernels take no pointers to bool, which has no size there; TVM's bool is a byte.
  const std::string from = "__global bool*", to = "__global uchar*";
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
  std::string names;
  for (const std::string name : kNarrow)
    if (text.find(name + "f(") != std::string::npos) names += "#define " + name + "f " + name + "\n";
  return names + text;
}

// The source of each kernel.
std::map<std::string, std::string> parts(const std::string& source) {
  std::map<std::string, std::string> result;
  size_t at = source.find(kBegin);
  while (at != std::string::npos) {
    const size_t name = at + sizeof kBegin - 1, end = source.find('\n', name);
    if (end == std::string::npos) break;
    at = source.find(kBegin, end);
    result.emplace(source.substr(name, end - name), readable(source.substr(end + 1, at - end - 1)));
  }
  return result;
}

constexpr size_t kLongName = 64;

// A kernel's name as a driver gets it, in its source, too: PoCL makes files of it, and ends the process where a file
// may not have so long a name. TVM joins the names of all that it fused.
std::string shortened(const std::string& name, size_t number, std::string& source) {
  if (name.size() <= kLongName) return name;
  const std::string symbol = name.substr(0, kLongName) + "_" + std::to_string(number);
  const std::string from = "void " + name + "(", to = "void " + symbol + "(";
  for (size_t at = source.find(from); at != std::string::npos; at = source.find(from, at + to.size()))
    source.replace(at, from.size(), to);
  return symbol;
}

// A place of a number behind a kernel's arguments: groups or threads, along an axis.
struct Place {
  bool threads;
  int axis;
};

// A kernel with what is known of its calls.
struct Entry {
  Signature signature;
  std::vector<Place> places;
  std::unique_ptr<Kernel> kernel;
};

Entry entry_of(Signature signature, std::string symbol, std::string source, const std::shared_ptr<Whole>& whole) {
  Entry entry;
  for (const std::string& tag : signature.tags) {
    const bool groups = tag.rfind("blockIdx.", 0) == 0, threads = tag.rfind("threadIdx.", 0) == 0;
    const int axis = tag.empty() ? -1 : tag.back() - 'x';
    if (!(groups || threads) || axis < 0 || axis > 2)
      TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " is launched with " << tag
                                << ", which this device has not";
    entry.places.push_back({threads, axis});
  }
  for (const DLDataType& type : signature.types)
    if (type.code != kDLOpaqueHandle && (type.lanes != 1 || type.bits > 64))
      TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " takes a number of type "
                                << ffi::DLDataTypeToString(type) << ", which this device does not hand over";
  entry.kernel = std::make_unique<Kernel>(signature.name, std::move(symbol), std::move(source), whole);
  entry.signature = std::move(signature);
  return entry;
}

Argument argument_of(const ffi::AnyView& value, const DLDataType& type, const std::string& kernel) {
  if (type.code == kDLOpaqueHandle) return {static_cast<Buffer*>(value.cast<void*>()), {}, 0};
  Argument result{nullptr, {}, static_cast<size_t>(type.bits + 7) / 8};
  if (type.code == kDLFloat && type.bits == 32) {
    const float number = static_cast<float>(value.cast<double>());
    std::memcpy(result.number.data(), &number, sizeof number);
  } else if (type.code == kDLFloat && type.bits == 64) {
    const double number = value.cast<double>();
    std::memcpy(result.number.data(), &number, sizeof number);
  } else if (type.code == kDLInt || type.code == kDLUInt || type.code == kDLBool) {
    const int64_t number = value.cast<int64_t>();  // little endian: the first bytes are the number in fewer
    const int64_t back = type.bits == 64 ? number : number << (64 - type.bits) >> (64 - type.bits);
    if (type.code == kDLInt && back != number)
      TVM_FFI_THROW(ValueError) << "the number " << number << " does not fit the " << int{type.bits}
                                << " bits of an argument of " << kernel;
    std::memcpy(result.number.data(), &number, result.bytes);
  } else {
    TVM_FFI_THROW(ValueError) << "kernel " << kernel << " takes a number of type " << ffi::DLDataTypeToString(type)
                              << ", which this device does not hand over";
  }
  return result;
}

void call(const Entry& entry, const ffi::AnyView* args, int32_t count) {
  const Signature& signature = entry.signature;
  if (static_cast<size_t>(count) != signature.types.size() + entry.places.size())
    TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " takes " << signature.types.size() << " arguments and "
                              << entry.places.size() << " sizes, and got " << count;
  std::vector<Argument> arguments;
  int32_t at = 0;
  for (const DLDataType& type : signature.types) arguments.push_back(argument_of(args[at++], type, signature.name));
  Grid grid;
  for (const Place& place : entry.places) {
    const int64_t size = args[at++].cast<int64_t>();
    if (size < 0)
      TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " is launched with " << size << " groups or threads";
    (place.threads ? grid.threads : grid.groups)[place.axis] = static_cast<size_t>(size);
  }
  guarded([&] { the_device().launch(*entry.kernel, arguments, grid); });
}

class OpenClModule : public ffi::ModuleObj {
 public:
  OpenClModule(std::unordered_map<std::string, std::shared_ptr<Entry>> entries, std::string source)
      : entries_(std::move(entries)), source_(std::move(source)) {}

  const char* kind() const final { return "opencl"; }
  int GetPropertyMask() const final { return ffi::Module::kBinarySerializable | ffi::Module::kRunnable; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    const auto found = entries_.find(name);
    if (found == entries_.end()) return std::nullopt;
    // The function keeps its kernel, whatever becomes of the module.
    return ffi::Function::FromPacked(
        [entry = found->second](const ffi::AnyView* args, int32_t count, ffi::Any* result) {
          call(*entry, args, count);
          *result = nullptr;
        });
  }

  ffi::String InspectSource(const ffi::String&) const final { return source_; }

  ffi::Bytes SaveToBytes() const final {
    Writer writer;
    writer.text(kFormat);
    writer.number(entries_.size());
    for (const auto& [key, entry] : entries_) writer.signature(key, entry->signature);
    writer.text(source_);
    return ffi::Bytes(writer.take());
  }

 private:
  std::unordered_map<std::string, std::shared_ptr<Entry>> entries_;
  std::string source_;
};

ffi::Module module_of(Signatures signatures, const std::string& format, std::string source) {
  if (format != kFormat) TVM_FFI_THROW(ValueError) << "kernels in " << format << " are not OpenCL C";
  // In one order always: drivers know a program that they compiled before by its text.
  std::map<std::string, std::string> sources = parts(source);
  std::string all;
  std::map<std::string, std::string> symbols;
  for (auto& [key, part] : sources) {
    symbols.emplace(key, shortened(key, symbols.size(), part));
    all += part;
  }
  const auto whole = std::make_shared<Whole>(std::move(all));
  std::unordered_map<std::string, std::shared_ptr<Entry>> entries;
  for (auto& [key, signature] : signatures) {
    const auto part = sources.find(key);
    if (part == sources.end()) TVM_FFI_THROW(ValueError) << "an OpenCL module has no source of its kernel " << key;
    signature.name = key;  // as the function is called in the source
    Entry entry = entry_of(std::move(signature), symbols.at(key), std::move(part->second), whole);
    entries.emplace(key, std::make_shared<Entry>(std::move(entry)));
  }
  return ffi::Module(ffi::make_object<OpenClModule>(std::move(entries), std::move(source)));
}

ffi::Module load(const ffi::Bytes& bytes) {
  Reader reader(bytes.data(), bytes.size());
  const std::string format = reader.text();
  Signatures signatures = reader.signatures();
  return module_of(std::move(signatures), format, reader.text());
}

ffi::Module create(const ffi::Bytes& source, const ffi::String& format,
                   const ffi::Map<ffi::String, ffi::ObjectRef>& signatures, const ffi::Map<ffi::String, ffi::String>&) {
  return module_of(signatures_of(signatures), format, std::string(source.data(), source.size()));
}

}  // namespace

}  // namespace portlm::opencl

// Opens OpenCL's loader, and tells TVM of the device and its modules. Called once, after versions were compared.
// Returns what is wrong, which lives as long as the process, or nullptr.
extern "C" __attribute__((visibility("default"))) const char* portlm_opencl_open(const char* loader) {
  using namespace portlm::opencl;
  static auto* const problem = new std::string;
  *problem = open_opencl(loader);
  if (!problem->empty()) return problem->c_str();
  try {
    ffi::Function::SetGlobal("device_api.opencl", ffi::Function::FromPacked([](const ffi::AnyView*, int32_t,
                                                                               ffi::Any* result) {
                               *result = static_cast<void*>(device_table());
                             }));
    ffi::Function::SetGlobal("ffi.Module.load_from_bytes.opencl", ffi::Function::FromTyped(load));
    ffi::Function::SetGlobal("ffi.Module.create.opencl", ffi::Function::FromTyped(create));
    ffi::Function::SetGlobal("portlm.opencl.adapters", ffi::Function::FromTyped([] {
                               ffi::Array<ffi::Array<ffi::String>> result;
                               for (const Adapter& each : Device::adapters())
                                 result.push_back({each.name, each.kind, each.platform, each.driver});
                               return result;
                             }));
    ffi::Function::SetGlobal("portlm.opencl.choose",
                             ffi::Function::FromTyped([](const ffi::String& name) { return choose_device(name); }));
    // Which of the adapters it is: as Device::adapters says it.
    ffi::Function::SetGlobal("portlm.opencl.chosen", ffi::Function::FromTyped([] {
                               return guarded([] {
                                 const Adapter& it = the_device().adapter();
                                 return ffi::Array<ffi::String>{it.name, it.kind, it.platform, it.driver};
                               });
                             }));
    ffi::Function::SetGlobal("portlm.opencl.limits", ffi::Function::FromTyped([] {
                               return guarded([] {
                                 const Limits& it = the_device().limits();
                                 return ffi::Map<ffi::String, int64_t>{
                                     {"threads", static_cast<int64_t>(it.threads)},
                                     {"shared", static_cast<int64_t>(it.shared)},
                                     {"bytes", static_cast<int64_t>(it.most_bytes)},
                                     {"memory", static_cast<int64_t>(it.memory)},
                                     {"half", it.half},
                                     {"double", it.real},
                                 };
                               });
                             }));
    ffi::Function::SetGlobal("portlm.opencl.launches", ffi::Function::FromTyped([] {
                               return guarded([] { return static_cast<int64_t>(the_device().launches()); });
                             }));
  } catch (const ffi::Error& error) {
    *problem = error.what();
    return problem->c_str();
  }
  return nullptr;
}
