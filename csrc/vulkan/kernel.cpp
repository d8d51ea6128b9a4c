#include "vulkan/kernel.h"

#include <algorithm>
#include <utility>

namespace portlm::vulkan {

namespace {

// More bind groups than the layers of a deep model have calls of one kernel: beyond, the buffers are new ones each time.
constexpr size_t kGroups = 512;

std::string all_written(std::string source) {
  const std::string read = "var<storage, read>", written = "var<storage, read_write>";
  for (size_t at = source.find(read); at != std::string::npos; at = source.find(read, at + written.size()))
    source.replace(at, read.size(), written);
  return source;
}

}  // namespace

Kernel::Kernel(std::string name, std::string source, std::vector<bool> writes, size_t parameters)
    : name_(std::move(name)), source_(std::move(source)), writes_(std::move(writes)), parameters_(parameters) {}

Kernel::~Kernel() {
  if (device_ != nullptr) device_->forget(this);
  for (Variant& each : variants_) {
    for (const auto& [_, group] : each.groups) wgpu().BindGroupRelease(group);
    if (each.pipeline != nullptr) wgpu().ComputePipelineRelease(each.pipeline);
    if (each.layout != nullptr) wgpu().BindGroupLayoutRelease(each.layout);
  }
}

Kernel::Variant& Kernel::variant(Device& device, bool aliased) {
  Variant& made = variants_[aliased];
  if (made.pipeline != nullptr) return made;
  const size_t count = writes_.size();
  const WGPULimits& limits = device.limits();
  if (count > limits.maxStorageBuffersPerShaderStage)
    throw DeviceError(name_ + " has " + std::to_string(count) + " tensors, and the device binds " +
                      std::to_string(limits.maxStorageBuffersPerShaderStage));
  std::vector<WGPUBindGroupLayoutEntry> entries(count + 1);
  for (size_t i = 0; i <= count; ++i) {
    entries[i].binding = static_cast<uint32_t>(i);
    entries[i].visibility = WGPUShaderStage_Compute;
    entries[i].buffer.type = i == count                ? WGPUBufferBindingType_Uniform
                             : writes_[i] || aliased ? WGPUBufferBindingType_Storage
                                                       : WGPUBufferBindingType_ReadOnlyStorage;
    entries[i].buffer.hasDynamicOffset = i == count;
  }
  WGPUBindGroupLayoutDescriptor layout = {};
  layout.label = view(name_);
  layout.entryCount = entries.size();
  layout.entries = entries.data();
  made.layout = wgpu().DeviceCreateBindGroupLayout(device.handle(), &layout);

  WGPUPipelineLayoutDescriptor pipeline_layout = {};
  pipeline_layout.label = view(name_);
  pipeline_layout.bindGroupLayoutCount = 1;
  pipeline_layout.bindGroupLayouts = &made.layout;
  WGPUPipelineLayout const bindings = wgpu().DeviceCreatePipelineLayout(device.handle(), &pipeline_layout);

  const std::string source = aliased ? all_written(source_) : source_;
  WGPUShaderSourceWGSL code = {};
  code.chain.sType = WGPUSType_ShaderSourceWGSL;
  code.code = view(source);
  WGPUShaderModuleDescriptor shader = {};
  shader.nextInChain = &code.chain;
  shader.label = view(name_);
  WGPUShaderModule const compiled = wgpu().DeviceCreateShaderModule(device.handle(), &shader);
  device.check("compiling " + name_);

  WGPUComputePipelineDescriptor descriptor = {};
  descriptor.label = view(name_);
  descriptor.layout = bindings;
  descriptor.compute.module = compiled;
  descriptor.compute.entryPoint = view(name_);
  WGPUComputePipeline const pipeline = wgpu().DeviceCreateComputePipeline(device.handle(), &descriptor);
  wgpu().ShaderModuleRelease(compiled);
  wgpu().PipelineLayoutRelease(bindings);
  device.check("making a pipeline of " + name_);
  made.pipeline = pipeline;
  return made;
}

WGPUBindGroup Kernel::group(Device& device, Variant& variant, const std::vector<Buffer*>& buffers) {
  std::vector<uint64_t> key;
  for (const Buffer* buffer : buffers) key.push_back(buffer->id);
  if (const auto found = variant.groups.find(key); found != variant.groups.end()) return found->second;
  if (variant.groups.size() >= kGroups) {
    for (const auto& [_, group] : variant.groups) wgpu().BindGroupRelease(group);
    variant.groups.clear();
  }
  std::vector<WGPUBindGroupEntry> entries(buffers.size() + 1);
  for (size_t i = 0; i <= buffers.size(); ++i) {
    entries[i].binding = static_cast<uint32_t>(i);
    entries[i].buffer = i < buffers.size() ? buffers[i]->handle : device.arena_;
    entries[i].size = i < buffers.size() ? WGPU_WHOLE_SIZE : 4 * (parameters_ + 1);
  }
  WGPUBindGroupDescriptor descriptor = {};
  descriptor.label = view(name_);
  descriptor.layout = variant.layout;
  descriptor.entryCount = entries.size();
  descriptor.entries = entries.data();
  WGPUBindGroup const made = wgpu().DeviceCreateBindGroup(device.handle(), &descriptor);
  device.check("binding the tensors of " + name_);
  variant.groups.emplace(std::move(key), made);
  device_ = &device;
  for (Buffer* buffer : buffers) buffer->bound.insert(this);
  return made;
}

void Kernel::forget(uint64_t buffer) {
  for (Variant& each : variants_)
    for (auto it = each.groups.begin(); it != each.groups.end();) {
      if (std::find(it->first.begin(), it->first.end(), buffer) == it->first.end()) {
        ++it;
        continue;
      }
      wgpu().BindGroupRelease(it->second);
      it = each.groups.erase(it);
    }
}

}  // namespace portlm::vulkan
