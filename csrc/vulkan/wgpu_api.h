// The functions of wgpu-native that the device needs, taken from the library at run time: building portlm links none, and
// a machine without the library gets a sentence instead of a loader's error.
//
// Sources: webgpu.h (github.com/webgpu-native/webgpu-headers) and wgpu.h, as the package wgpu carries them.
#pragma once

#include <string>

#include "webgpu.h"
#include "wgpu.h"

namespace portlm::vulkan {

// What webgpu.h of this version declares; another library has other structs.
constexpr uint32_t kWgpuVersion = 0x1d000101;

#define PORTLM_WGPU_FUNCTIONS(X)                                                                        \
  X(CreateInstance) X(InstanceEnumerateAdapters) X(InstanceProcessEvents) X(AdapterGetInfo)             \
  X(AdapterInfoFreeMembers) X(AdapterGetLimits) X(AdapterHasFeature) X(AdapterRequestDevice)            \
  X(AdapterRelease) X(DeviceGetQueue) X(DevicePoll) X(DeviceCreateBuffer) X(DeviceCreateCommandEncoder) \
  X(DeviceCreateComputePipeline) X(DeviceCreateBindGroup) X(DeviceCreateBindGroupLayout)                \
  X(DeviceCreatePipelineLayout) X(DeviceCreateShaderModule) X(QueueSubmit) X(QueueWriteBuffer)          \
  X(BufferMapAsync) X(BufferGetConstMappedRange) X(BufferUnmap) X(BufferRelease) X(BufferDestroy)       \
  X(CommandEncoderBeginComputePass) X(CommandEncoderCopyBufferToBuffer) X(CommandEncoderFinish)         \
  X(CommandEncoderRelease) X(CommandBufferRelease) X(ComputePassEncoderSetPipeline)                     \
  X(ComputePassEncoderSetBindGroup) X(ComputePassEncoderDispatchWorkgroups) X(ComputePassEncoderEnd)    \
  X(ComputePassEncoderRelease) X(ComputePipelineRelease) X(PipelineLayoutRelease)                       \
  X(BindGroupLayoutRelease) X(BindGroupRelease) X(ShaderModuleRelease)

struct Wgpu {
#define PORTLM_WGPU_POINTER(name) decltype(&wgpu##name) name = nullptr;
  PORTLM_WGPU_FUNCTIONS(PORTLM_WGPU_POINTER)
#undef PORTLM_WGPU_POINTER
};

// Opens the library at a path, once. Returns what is wrong, or nothing.
std::string open_wgpu(const char* path);

// The functions; open_wgpu must have succeeded.
const Wgpu& wgpu();

inline WGPUStringView view(const std::string& text) { return {text.data(), text.size()}; }
inline std::string text_of(WGPUStringView view) {
  if (view.data == nullptr) return {};
  return view.length == WGPU_STRLEN ? std::string(view.data) : std::string(view.data, view.length);
}

}  // namespace portlm::vulkan
