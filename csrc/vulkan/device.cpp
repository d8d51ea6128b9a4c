#include "vulkan/device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "vulkan/kernel.h"

namespace portlm::vulkan {

namespace {

constexpr size_t kArena = 1 << 20;      // bytes of parameters that may wait to be sent
constexpr uint32_t kMostGroups = 65535;  // of a grid, along one axis: every device has at least these

size_t up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

WGPUInstance instance() {
  static WGPUInstance const made = [] {
    WGPUInstanceExtras extras = {};
    extras.chain.sType = static_cast<WGPUSType>(WGPUSType_InstanceExtras);
    extras.backends = WGPUInstanceBackend_Vulkan;
    WGPUInstanceDescriptor descriptor = {};
    descriptor.nextInChain = &extras.chain;
    return wgpu().CreateInstance(&descriptor);
  }();
  if (made == nullptr) throw DeviceError("wgpu-native makes no instance");
  return made;
}

std::vector<WGPUAdapter> found_adapters() {
  WGPUInstanceEnumerateAdapterOptions options = {};
  options.backends = WGPUInstanceBackend_Vulkan;
  std::vector<WGPUAdapter> found(wgpu().InstanceEnumerateAdapters(instance(), &options, nullptr));
  if (!found.empty()) wgpu().InstanceEnumerateAdapters(instance(), &options, found.data());
  return found;
}

Adapter described(WGPUAdapter adapter) {
  WGPUAdapterInfo info = {};
  if (wgpu().AdapterGetInfo(adapter, &info) != WGPUStatus_Success) return {"unknown", "unknown", ""};
  const char* kind = info.adapterType == WGPUAdapterType_DiscreteGPU     ? "discrete"
                     : info.adapterType == WGPUAdapterType_IntegratedGPU ? "integrated"
                     : info.adapterType == WGPUAdapterType_CPU           ? "cpu"
                                                                         : "unknown";
  Adapter result{text_of(info.device), kind, text_of(info.description)};
  wgpu().AdapterInfoFreeMembers(info);
  return result;
}

int rank(const Adapter& adapter) {
  return adapter.kind == "discrete" ? 0 : adapter.kind == "integrated" ? 1 : adapter.kind == "unknown" ? 2 : 3;
}

size_t choose(const std::vector<Adapter>& there, const std::string& chosen) {
  if (there.empty()) throw DeviceError("no Vulkan device: is a driver installed?");
  std::string names;
  for (size_t i = 0; i < there.size(); ++i)
    names += (i == 0 ? "" : ", ") + std::to_string(i) + ": " + there[i].name;
  if (chosen.empty()) {
    const auto best = std::min_element(there.begin(), there.end(),
                                       [](const Adapter& a, const Adapter& b) { return rank(a) < rank(b); });
    return static_cast<size_t>(best - there.begin());
  }
  if (chosen.find_first_not_of("0123456789") == std::string::npos && chosen.size() < 4) {
    const size_t index = std::stoul(chosen);
    if (index < there.size()) return index;
  }
  for (size_t i = 0; i < there.size(); ++i)
    if (there[i].name.find(chosen) != std::string::npos) return i;
  throw DeviceError("no Vulkan device is called " + chosen + "; there are " + names);
}

}  // namespace

std::mutex& mutex() {
  static auto* const made = new std::mutex;
  return *made;
}

std::vector<Adapter> Device::adapters() {
  std::vector<Adapter> result;
  for (WGPUAdapter const each : found_adapters()) {
    result.push_back(described(each));
    wgpu().AdapterRelease(each);
  }
  return result;
}

Device::Device(const std::string& chosen) {
  const std::vector<WGPUAdapter> found = found_adapters();
  std::vector<Adapter> there;
  for (WGPUAdapter const each : found) there.push_back(described(each));
  const auto release = [&found] {
    for (WGPUAdapter const each : found) wgpu().AdapterRelease(each);
  };
  size_t index;
  try {
    index = choose(there, chosen);
  } catch (...) {
    release();
    throw;
  }
  adapter_ = there[index];
  wgpu().AdapterGetLimits(found[index], &limits_);
  limits_.nextInChain = nullptr;
  half_ = wgpu().AdapterHasFeature(found[index], WGPUFeatureName_ShaderF16) != 0;
  const WGPUFeatureName features[] = {WGPUFeatureName_ShaderF16};

  WGPUDeviceDescriptor descriptor = {};
  descriptor.requiredFeatureCount = half_;
  descriptor.requiredFeatures = features;
  descriptor.requiredLimits = &limits_;
  descriptor.deviceLostCallbackInfo.mode = WGPUCallbackMode_AllowSpontaneous;
  descriptor.deviceLostCallbackInfo.userdata1 = this;
  descriptor.deviceLostCallbackInfo.callback = [](WGPUDevice const*, WGPUDeviceLostReason, WGPUStringView message,
                                                  void* self, void*) {
    static_cast<Device*>(self)->lost_ = true;
    static_cast<Device*>(self)->complaints_.push_back("the device is lost: " + text_of(message));
  };
  descriptor.uncapturedErrorCallbackInfo.userdata1 = this;
  descriptor.uncapturedErrorCallbackInfo.callback = [](WGPUDevice const*, WGPUErrorType, WGPUStringView message,
                                                       void* self, void*) {
    static_cast<Device*>(self)->complaints_.push_back(text_of(message));
  };
  struct Answer {
    WGPUDevice device = nullptr;
    std::string message;
  } answer;
  WGPURequestDeviceCallbackInfo callback = {};
  callback.mode = WGPUCallbackMode_AllowSpontaneous;
  callback.userdata1 = &answer;
  callback.callback = [](WGPURequestDeviceStatus status, WGPUDevice device, WGPUStringView message, void* into,
                         void*) {
    auto* const result = static_cast<Answer*>(into);
    if (status == WGPURequestDeviceStatus_Success) result->device = device;
    result->message = text_of(message);
  };
  wgpu().AdapterRequestDevice(found[index], &descriptor, callback);
  release();
  if (answer.device == nullptr)
    throw DeviceError("the Vulkan device " + adapter_.name + " cannot be opened: " + answer.message);
  device_ = answer.device;
  queue_ = wgpu().DeviceGetQueue(device_);
  WGPUBufferDescriptor arena = {};
  arena.usage = WGPUBufferUsage_Uniform | WGPUBufferUsage_CopyDst;
  arena.size = kArena;
  arena_ = wgpu().DeviceCreateBuffer(device_, &arena);
  check("making room for parameters");
}

void Device::check(const std::string& doing) {
  if (complaints_.empty() && !lost_) return;
  std::string what;
  for (const std::string& each : complaints_) what += (what.empty() ? "" : "; ") + each;
  if (what.empty()) what = "the device is lost";
  complaints_.clear();
  throw DeviceError(adapter_.name + ", " + doing + ": " + what);
}

Buffer* Device::allocate(size_t bytes) {
  // Whole words: what is read and written is counted in them.
  const size_t room = std::max<size_t>(up(bytes, 16), 16);
  if (room > limits_.maxBufferSize)
    throw DeviceError(adapter_.name + " has no buffers of " + std::to_string(bytes) + " bytes, but of at most " +
                      std::to_string(limits_.maxBufferSize));
  WGPUBufferDescriptor descriptor = {};
  descriptor.usage = WGPUBufferUsage_Storage | WGPUBufferUsage_CopySrc | WGPUBufferUsage_CopyDst;
  descriptor.size = room;
  WGPUBuffer const handle = wgpu().DeviceCreateBuffer(device_, &descriptor);
  check("allocating " + std::to_string(bytes) + " bytes");
  auto* const buffer = new Buffer{handle, bytes, ++ids_, {}};
  buffers_.insert(buffer);
  return buffer;
}

void Device::release(Buffer* buffer) {
  // Commands that wait to be sent hold what they need: nothing is sent for this.
  for (Kernel* kernel : buffer->bound) kernel->forget(buffer->id);
  wgpu().BufferRelease(buffer->handle);
  buffers_.erase(buffer);
  delete buffer;
}

void Device::forget(Kernel* kernel) {
  for (Buffer* buffer : buffers_) buffer->bound.erase(kernel);
}

WGPUCommandEncoder Device::encoder() {
  if (encoder_ == nullptr) {
    const WGPUCommandEncoderDescriptor descriptor = {};
    encoder_ = wgpu().DeviceCreateCommandEncoder(device_, &descriptor);
  }
  return encoder_;
}

WGPUComputePassEncoder Device::pass() {
  if (pass_ == nullptr) {
    const WGPUComputePassDescriptor descriptor = {};
    pass_ = wgpu().CommandEncoderBeginComputePass(encoder(), &descriptor);
  }
  return pass_;
}

void Device::end_pass() {
  if (pass_ == nullptr) return;
  wgpu().ComputePassEncoderEnd(pass_);
  wgpu().ComputePassEncoderRelease(pass_);
  pass_ = nullptr;
}

void Device::send() {
  if (encoder_ == nullptr) return;
  end_pass();
  if (!filled_.empty()) wgpu().QueueWriteBuffer(queue_, arena_, 0, filled_.data(), filled_.size());
  filled_.clear();
  const WGPUCommandBufferDescriptor descriptor = {};
  WGPUCommandBuffer const commands = wgpu().CommandEncoderFinish(encoder_, &descriptor);
  wgpu().CommandEncoderRelease(encoder_);
  encoder_ = nullptr;
  if (complaints_.empty()) wgpu().QueueSubmit(queue_, 1, &commands);
  wgpu().CommandBufferRelease(commands);
  check("sending commands, the last of which is " + (last_.empty() ? "a copy" : last_));
}

void Device::wait() {
  send();
  wgpu().DevicePoll(device_, 1, nullptr);
  check("waiting for " + (last_.empty() ? "a copy" : last_));
}

void Device::launch(Kernel& kernel, const Launch& launch) {
  uint32_t x = launch.grid[0];
  const uint32_t y = launch.grid[1];
  if (x == 0 || y == 0) return;
  if (y > kMostGroups)
    throw DeviceError(kernel.name() + " has a grid of " + std::to_string(y) + " along its second axis; the most is " +
                      std::to_string(kMostGroups) + ": compute it in smaller batches");
  for (const Buffer* buffer : launch.buffers)
    if (buffer->bytes > limits_.maxStorageBufferBindingSize)
      throw DeviceError(kernel.name() + " takes a tensor of " + std::to_string(buffer->bytes) + " bytes, and " +
                        adapter_.name + " binds at most " + std::to_string(limits_.maxStorageBufferBindingSize));
  // A grid that is too long along x is folded: a kernel finds its place as z times the length of x, plus x, and does
  // nothing behind the last group, whose number is its last parameter.
  const uint32_t last = x - 1;
  uint32_t z = 1;
  if (x > kMostGroups) {
    z = (x + kMostGroups - 1) / kMostGroups;
    x = (x + z - 1) / z;
  }

  bool aliased = false;
  for (size_t i = 0; i < launch.buffers.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      aliased |= launch.buffers[i] == launch.buffers[j] && kernel.writes_[i] != kernel.writes_[j];

  Kernel::Variant& variant = kernel.variant(*this, aliased);
  WGPUBindGroup const group = kernel.group(*this, variant, launch.buffers);
  const size_t size = 4 * (launch.parameters.size() + 1);
  size_t offset = up(filled_.size(), limits_.minUniformBufferOffsetAlignment);
  if (offset + size > kArena) {
    send();
    offset = 0;
  }
  filled_.resize(up(offset + size, 4));
  std::memcpy(filled_.data() + offset, launch.parameters.data(), size - 4);
  std::memcpy(filled_.data() + offset + size - 4, &last, 4);

  const auto place = static_cast<uint32_t>(offset);
  wgpu().ComputePassEncoderSetPipeline(pass(), variant.pipeline);
  wgpu().ComputePassEncoderSetBindGroup(pass(), 0, group, 1, &place);
  wgpu().ComputePassEncoderDispatchWorkgroups(pass(), x, y, z);
  last_ = kernel.name();
}

WGPUBuffer Device::staging(size_t bytes) {
  size_t room = 256;
  while (room < bytes) room *= 2;
  WGPUBuffer& made = staging_[room];
  if (made == nullptr) {
    WGPUBufferDescriptor descriptor = {};
    descriptor.usage = WGPUBufferUsage_MapRead | WGPUBufferUsage_CopyDst;
    descriptor.size = room;
    made = wgpu().DeviceCreateBuffer(device_, &descriptor);
    check("making room for an answer of " + std::to_string(bytes) + " bytes");
  }
  return made;
}

void Device::download(Buffer* from, size_t offset, void* to, size_t bytes) {
  if (bytes == 0) return;
  const size_t begin = offset / 4 * 4, size = up(offset + bytes, 4) - begin;
  WGPUBuffer const room = staging(size);
  end_pass();
  wgpu().CommandEncoderCopyBufferToBuffer(encoder(), from->handle, begin, room, 0, size);
  send();
  struct Answer {
    bool done = false, good = false;
    std::string message;
  } answer;
  WGPUBufferMapCallbackInfo callback = {};
  callback.mode = WGPUCallbackMode_AllowSpontaneous;
  callback.userdata1 = &answer;
  callback.callback = [](WGPUMapAsyncStatus status, WGPUStringView message, void* into, void*) {
    auto* const result = static_cast<Answer*>(into);
    result->done = true;
    result->good = status == WGPUMapAsyncStatus_Success;
    result->message = text_of(message);
  };
  wgpu().BufferMapAsync(room, WGPUMapMode_Read, 0, size, callback);
  while (!answer.done) {
    wgpu().DevicePoll(device_, 1, nullptr);
    check("reading what " + (last_.empty() ? "was copied" : last_ + " has left"));
  }
  if (!answer.good) throw DeviceError(adapter_.name + ", reading " + std::to_string(bytes) + " bytes: " + answer.message);
  const auto* const mapped = static_cast<const char*>(wgpu().BufferGetConstMappedRange(room, 0, size));
  std::memcpy(to, mapped + (offset - begin), bytes);
  wgpu().BufferUnmap(room);
}

void Device::upload(const void* from, Buffer* to, size_t offset, size_t bytes) {
  if (bytes == 0) return;
  send();  // what was recorded comes before
  if (offset % 4 == 0 && bytes % 4 == 0) {
    wgpu().QueueWriteBuffer(queue_, to->handle, offset, from, bytes);
  } else {
    const size_t begin = offset / 4 * 4, end = up(offset + bytes, 4);
    std::vector<char> words(end - begin);
    download(to, begin, words.data(), 4);
    download(to, end - 4, words.data() + words.size() - 4, 4);
    std::memcpy(words.data() + (offset - begin), from, bytes);
    wgpu().QueueWriteBuffer(queue_, to->handle, begin, words.data(), words.size());
  }
  check("writing " + std::to_string(bytes) + " bytes");
}

void Device::copy(Buffer* from, size_t from_offset, Buffer* to, size_t to_offset, size_t bytes) {
  if (bytes == 0) return;
  if (from != to && from_offset % 4 == 0 && to_offset % 4 == 0 && bytes % 4 == 0) {
    end_pass();
    wgpu().CommandEncoderCopyBufferToBuffer(encoder(), from->handle, from_offset, to->handle, to_offset, bytes);
    return;
  }
  std::vector<char> between(bytes);
  download(from, from_offset, between.data(), bytes);
  upload(between.data(), to, to_offset, bytes);
}

}  // namespace portlm::vulkan
