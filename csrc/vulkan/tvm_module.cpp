// Modules of TVM whose kernels are WGSL, and the names under which TVM finds them and the device.
//
// TVM calls both "webgpu", after the language; what runs them here is Vulkan.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>

#include "tvm_device/signature.h"
#include "vulkan/kernel.h"
#include "vulkan/tvm_device.h"

namespace portlm::vulkan {

namespace {

namespace ffi = tvm::ffi;

using namespace tvm_device;

constexpr char kWrites[] = "paramWriteAccess:[";

// "paramWriteAccess:[0,1]" says of each tensor whether it is written.
std::vector<bool> written(const Signature& signature) {
  for (const std::string& tag : signature.tags)
    if (tag.rfind(kWrites, 0) == 0) {
      std::vector<bool> result;
      for (size_t i = sizeof kWrites - 1; i < tag.size(); ++i)
        if (tag[i] == '0' || tag[i] == '1') result.push_back(tag[i] == '1');
      return result;
    }
  TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " does not say which tensors it writes";
  TVM_FFI_UNREACHABLE();
}

// A kernel with what is known of its calls.
struct Entry {
  Signature signature;
  std::string source;
  size_t tensors = 0, parameters = 0;
  std::vector<int> axes;  // of each launch number: its place in the grid, -1 for one that the source has already
  std::shared_ptr<Kernel> kernel;
};

Entry entry_of(Signature signature, std::string source) {
  Entry entry;
  for (const DLDataType& type : signature.types) ++(type.code == kDLOpaqueHandle ? entry.tensors : entry.parameters);
  std::vector<bool> writes = written(signature);
  if (writes.size() != entry.tensors)
    TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " has " << entry.tensors << " tensors and says of "
                              << writes.size() << " whether they are written";
  for (const std::string& tag : signature.tags) {
    if (tag == "blockIdx.x") entry.axes.push_back(0);
    else if (tag == "blockIdx.y") entry.axes.push_back(1);
    else if (tag.rfind("threadIdx.", 0) == 0) entry.axes.push_back(-1);
    else if (tag.rfind(kWrites, 0) != 0)
      TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " is launched with " << tag
                                << ", which this device has not";
  }
  entry.kernel = std::make_shared<Kernel>(signature.name, source, std::move(writes), entry.parameters);
  entry.signature = std::move(signature);
  entry.source = std::move(source);
  return entry;
}

uint32_t word(const ffi::AnyView& value, const DLDataType& type) {
  uint32_t bits;
  if (type.code == kDLFloat) {
    const float number = static_cast<float>(value.cast<double>());
    std::memcpy(&bits, &number, 4);
  } else {
    const int64_t number = value.cast<int64_t>();
    if (number < INT32_MIN || number > static_cast<int64_t>(UINT32_MAX))
      TVM_FFI_THROW(ValueError) << "the number " << number << " does not fit the 32 bits of a kernel's argument";
    bits = static_cast<uint32_t>(number);
  }
  return bits;
}

void call(const Entry& entry, const ffi::AnyView* args, int32_t count) {
  const Signature& signature = entry.signature;
  if (static_cast<size_t>(count) != signature.types.size() + entry.axes.size())
    TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " takes " << signature.types.size() << " arguments and "
                              << entry.axes.size() << " sizes, and got " << count;
  std::vector<Buffer*> buffers;
  std::vector<uint32_t> parameters;
  int32_t at = 0;
  for (const DLDataType& type : signature.types) {
    const ffi::AnyView& value = args[at++];
    if (type.code == kDLOpaqueHandle) buffers.push_back(static_cast<Buffer*>(value.cast<void*>()));
    else parameters.push_back(word(value, type));
  }
  uint32_t grid[3] = {1, 1, 1};
  for (const int axis : entry.axes) {
    const int64_t size = args[at++].cast<int64_t>();
    if (axis < 0) continue;
    if (size < 0 || size > UINT32_MAX)
      TVM_FFI_THROW(ValueError) << "kernel " << signature.name << " is launched with " << size << " groups";
    grid[axis] = static_cast<uint32_t>(size);
  }
  try {
    const std::lock_guard<std::mutex> lock(mutex());
    the_device().launch(*entry.kernel, {buffers, parameters, {grid[0], grid[1], grid[2]}});
  } catch (const DeviceError& error) {
    TVM_FFI_THROW(RuntimeError) << error.what();
  }
}

class WgslModule : public ffi::ModuleObj {
 public:
  explicit WgslModule(std::unordered_map<std::string, std::shared_ptr<Entry>> entries) : entries_(std::move(entries)) {}
  ~WgslModule() {
    const std::lock_guard<std::mutex> lock(mutex());
    entries_.clear();
  }

  const char* kind() const final { return "webgpu"; }
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

  ffi::String InspectSource(const ffi::String&) const final {
    std::string all;
    for (const auto& [name, entry] : entries_) all += "// " + name + "\n" + entry->source + "\n";
    return all;
  }

  ffi::Bytes SaveToBytes() const final {
    Writer writer;
    writer.number(entries_.size());
    for (const auto& [key, entry] : entries_) writer.signature(key, entry->signature);
    writer.number(entries_.size());
    for (const auto& [key, entry] : entries_) {
      writer.text(key);
      writer.text(entry->source);
    }
    return ffi::Bytes(writer.take());
  }

 private:
  std::unordered_map<std::string, std::shared_ptr<Entry>> entries_;
};

ffi::Module module_of(Signatures signatures, std::unordered_map<std::string, std::string> sources) {
  std::unordered_map<std::string, std::shared_ptr<Entry>> entries;
  for (auto& [key, signature] : signatures) {
    const auto source = sources.find(key);
    if (source == sources.end()) TVM_FFI_THROW(ValueError) << "a WGSL module has no source of its kernel " << key;
    signature.name = key;  // as the function is called in the source
    entries.emplace(key, std::make_shared<Entry>(entry_of(std::move(signature), std::move(source->second))));
  }
  return ffi::Module(ffi::make_object<WgslModule>(std::move(entries)));
}

ffi::Module load(const ffi::Bytes& bytes) {
  Reader reader(bytes.data(), bytes.size());
  Signatures signatures = reader.signatures();
  std::unordered_map<std::string, std::string> sources;
  for (size_t i = reader.count(16); i > 0; --i) {
    std::string key = reader.text();
    sources.emplace(std::move(key), reader.text());
  }
  return module_of(std::move(signatures), std::move(sources));
}

ffi::Module create(const ffi::Map<ffi::String, ffi::Bytes>& sources, const ffi::String& format,
                   const ffi::Map<ffi::String, ffi::ObjectRef>& signatures, const ffi::Map<ffi::String, ffi::String>&) {
  if (format != "wgsl") TVM_FFI_THROW(ValueError) << "kernels in " << format << " are not WGSL";
  std::unordered_map<std::string, std::string> texts;
  for (const auto& [key, source] : sources) texts.emplace(key, std::string(source.data(), source.size()));
  return module_of(signatures_of(signatures), std::move(texts));
}

}  // namespace

}  // namespace portlm::vulkan

// Opens wgpu-native at a path, and tells TVM of the device and its modules. Called once, after versions were compared.
// Returns what is wrong, which lives as long as the process, or nullptr.
extern "C" __attribute__((visibility("default"))) const char* portlm_vulkan_open(const char* wgpu_native) {
  using namespace portlm::vulkan;
  static auto* const problem = new std::string;
  *problem = open_wgpu(wgpu_native);
  if (!problem->empty()) return problem->c_str();
  try {
    ffi::Function::SetGlobal("device_api.webgpu", ffi::Function::FromPacked([](const ffi::AnyView*, int32_t,
                                                                               ffi::Any* result) {
                               *result = static_cast<void*>(device_table());
                             }));
    ffi::Function::SetGlobal("ffi.Module.load_from_bytes.webgpu", ffi::Function::FromTyped(load));
    ffi::Function::SetGlobal("ffi.Module.create.webgpu", ffi::Function::FromTyped(create));
    ffi::Function::SetGlobal("portlm.vulkan.adapters", ffi::Function::FromTyped([] {
                               ffi::Array<ffi::Array<ffi::String>> result;
                               for (const Adapter& each : Device::adapters())
                                 result.push_back({each.name, each.kind, each.driver});
                               return result;
                             }));
    ffi::Function::SetGlobal("portlm.vulkan.choose",
                             ffi::Function::FromTyped([](const ffi::String& name) { return choose_device(name); }));
    ffi::Function::SetGlobal("portlm.vulkan.limits", ffi::Function::FromTyped([] {
                               const std::lock_guard<std::mutex> lock(mutex());
                               const WGPULimits& it = the_device().limits();
                               return ffi::Map<ffi::String, int64_t>{
                                   {"threads", static_cast<int64_t>(it.maxComputeInvocationsPerWorkgroup)},
                                   {"shared", static_cast<int64_t>(it.maxComputeWorkgroupStorageSize)},
                                   {"tensors", static_cast<int64_t>(it.maxStorageBuffersPerShaderStage)},
                                   {"binding", static_cast<int64_t>(it.maxStorageBufferBindingSize)},
                                   {"half", the_device().half()},
                               };
                             }));
  } catch (const ffi::Error& error) {
    *problem = error.what();
    return problem->c_str();
  }
  return nullptr;
}
