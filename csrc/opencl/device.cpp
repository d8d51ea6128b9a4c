#include "opencl/device.h"

#include <algorithm>
#include <utility>

#include "opencl/kernel.h"

namespace portlm::opencl {

namespace {

constexpr size_t kLeast = 16;          // bytes of a buffer: none may be empty
constexpr uint64_t kFlushEvery = 32;   // kernels: some drivers begin only then, and the host goes on meanwhile

template <typename Value>
Value number(DeviceId device, uint32_t what) {
  Value value = {};
  if (cl().GetDeviceInfo(device, what, sizeof value, &value, nullptr) != kDone) return {};
  return value;
}

template <typename Object>
std::string text(Status (*ask)(Object, uint32_t, size_t, void*, size_t*), Object object, uint32_t what) {
  size_t size = 0;
  if (ask(object, what, 0, nullptr, &size) != kDone || size == 0) return {};
  std::string result(size, '\0');
  if (ask(object, what, size, result.data(), nullptr) != kDone) return {};
  result.resize(result.find('\0') == std::string::npos ? size : result.find('\0'));
  result.erase(0, result.find_first_not_of(' '));
  result.erase(result.find_last_not_of(' ') + 1);
  return result;
}

struct Found {
  Platform platform;
  DeviceId id;
  Adapter adapter;
};

// Devices that little-endian kernels in source can be compiled for.
std::vector<Found> found_devices() {
  std::vector<Found> result;
  uint32_t count = 0;
  if (cl().GetPlatformIDs(0, nullptr, &count) != kDone) return result;
  std::vector<Platform> platforms(count);
  if (count == 0 || cl().GetPlatformIDs(count, platforms.data(), nullptr) != kDone) return result;
  for (Platform const platform : platforms) {
    if (cl().GetDeviceIDs(platform, kTypeAll, 0, nullptr, &count) != kDone || count == 0) continue;
    std::vector<DeviceId> devices(count);
    if (cl().GetDeviceIDs(platform, kTypeAll, count, devices.data(), nullptr) != kDone) continue;
    const std::string name = text(cl().GetPlatformInfo, platform, kPlatformName);
    for (DeviceId const id : devices) {
      if (number<Bool>(id, kDeviceCompiles) != kYes) continue;
      const auto type = number<Flags>(id, kDeviceType);
      const char* const kind = type & kTypeGpu           ? "gpu"
                               : type & kTypeAccelerator ? "accelerator"
                               : type & kTypeCpu         ? "cpu"
                                                         : "unknown";
      std::string version = text(cl().GetDeviceInfo, id, kDeviceVersion);  // "OpenCL 3.0", and what a vendor adds
      version.resize(std::min(version.find(' ', version.find(' ') + 1), version.size()));
      const std::string driver = text(cl().GetDeviceInfo, id, kDeviceDriver);
      const std::string device = text(cl().GetDeviceInfo, id, kDeviceName);
      result.push_back({platform, id, {device, kind, name, version + ", driver " + driver}});
    }
  }
  return result;
}

int rank(const Adapter& adapter) {
  return adapter.kind == "gpu" ? 0 : adapter.kind == "accelerator" ? 1 : adapter.kind == "unknown" ? 2 : 3;
}

size_t choose(const std::vector<Found>& there, const std::string& chosen) {
  if (there.empty()) throw DeviceError("no OpenCL device: is a driver installed?");
  if (chosen.empty()) {
    const auto best = std::min_element(there.begin(), there.end(), [](const Found& a, const Found& b) {
      return rank(a.adapter) < rank(b.adapter);
    });
    return static_cast<size_t>(best - there.begin());
  }
  if (chosen.find_first_not_of("0123456789") == std::string::npos && chosen.size() < 4) {
    const size_t index = std::stoul(chosen);
    if (index < there.size()) return index;
  }
  std::string names;
  for (size_t i = 0; i < there.size(); ++i) {
    const Adapter& it = there[i].adapter;
    if (it.name.find(chosen) != std::string::npos || it.platform.find(chosen) != std::string::npos) return i;
    names += (i == 0 ? "" : ", ") + std::to_string(i) + ": " + it.name + " of " + it.platform;
  }
  throw DeviceError("no OpenCL device is called " + chosen + "; there are " + names);
}

// What the driver says of its own accord, from threads of its own.
struct Complaints {
  std::mutex mutex;
  std::string last;
};

Complaints& complaints() {
  static auto* const made = new Complaints;
  return *made;
}

void complain(const char* what, const void*, size_t, void*) {
  const std::lock_guard<std::mutex> lock(complaints().mutex);
  complaints().last = what;
}

std::string complained() {
  const std::lock_guard<std::mutex> lock(complaints().mutex);
  return std::exchange(complaints().last, {});
}

}  // namespace

std::mutex& mutex() {
  static auto* const made = new std::mutex;
  return *made;
}

std::vector<Adapter> Device::adapters() {
  std::vector<Adapter> result;
  for (Found& each : found_devices()) result.push_back(std::move(each.adapter));
  return result;
}

Device::Device(const std::string& chosen) {
  const std::vector<Found> there = found_devices();
  const Found& it = there[choose(there, chosen)];
  id_ = it.id;
  adapter_ = it.adapter;
  limits_.threads = number<size_t>(id_, kDeviceThreads);
  limits_.units = number<uint32_t>(id_, kDeviceUnits);
  limits_.shared = number<uint64_t>(id_, kDeviceShared);
  limits_.memory = number<uint64_t>(id_, kDeviceMemory);
  limits_.most_bytes = number<uint64_t>(id_, kDeviceMostBytes);
  const std::string extensions = " " + text(cl().GetDeviceInfo, id_, kDeviceExtensions) + " ";
  limits_.half = extensions.find(" cl_khr_fp16 ") != std::string::npos;
  limits_.real = extensions.find(" cl_khr_fp64 ") != std::string::npos;
  Status status = kDone;
  context_ = cl().CreateContext(nullptr, 1, &id_, complain, nullptr, &status);
  check(status, "opening it");
  queue_ = cl().CreateCommandQueue(context_, id_, 0, &status);
  check(status, "making its queue");
}

void Device::check(Status status, const std::string& doing) {
  if (status == kDone) return;
  const std::string more = complained();
  throw DeviceError(adapter_.name + ", " + doing + ": " + meaning(status) + (more.empty() ? "" : ": " + more));
}

Buffer* Device::allocate(size_t bytes) {
  if (bytes > limits_.most_bytes)
    throw DeviceError(adapter_.name + " has no buffers of " + std::to_string(bytes) + " bytes, but of at most " +
                      std::to_string(limits_.most_bytes));
  Status status = kDone;
  Memory const handle = cl().CreateBuffer(context_, kReadWrite, std::max(bytes, kLeast), nullptr, &status);
  check(status, "allocating " + std::to_string(bytes) + " bytes");
  return new Buffer{handle, bytes};
}

void Device::release(Buffer* buffer) {
  cl().ReleaseMemObject(buffer->handle);  // what waits in the queue holds what it needs
  delete buffer;
}

void Device::upload(const void* from, Buffer* to, size_t offset, size_t bytes) {
  if (bytes == 0) return;
  check(cl().EnqueueWriteBuffer(queue_, to->handle, kYes, offset, bytes, from, 0, nullptr, nullptr),
        "writing " + std::to_string(bytes) + " bytes");
}

void Device::download(Buffer* from, size_t offset, void* to, size_t bytes) {
  if (bytes == 0) return;
  check(cl().EnqueueReadBuffer(queue_, from->handle, kYes, offset, bytes, to, 0, nullptr, nullptr),
        "reading " + std::to_string(bytes) + " bytes" + (last_.empty() ? "" : " after " + last_));
}

void Device::copy(Buffer* from, size_t from_offset, Buffer* to, size_t to_offset, size_t bytes) {
  if (bytes == 0) return;
  if (from == to && from_offset < to_offset + bytes && to_offset < from_offset + bytes) {
    std::vector<char> between(bytes);  // OpenCL does not copy what overlaps
    download(from, from_offset, between.data(), bytes);
    upload(between.data(), to, to_offset, bytes);
    return;
  }
  check(cl().EnqueueCopyBuffer(queue_, from->handle, to->handle, from_offset, to_offset, bytes, 0, nullptr, nullptr),
        "copying " + std::to_string(bytes) + " bytes");
}

void Device::launch(Kernel& kernel, const std::vector<Argument>& arguments, const Grid& grid) {
  size_t all[3], group = 1;
  for (int axis = 0; axis < 3; ++axis) {
    if (grid.groups[axis] == 0 || grid.threads[axis] == 0) return;  // nothing to do, which OpenCL calls an error
    all[axis] = grid.groups[axis] * grid.threads[axis];
    group *= grid.threads[axis];
  }
  KernelId const id = kernel.on(*this);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Argument& it = arguments[i];
    const bool tensor = it.buffer != nullptr;
    check(cl().SetKernelArg(id, static_cast<uint32_t>(i), tensor ? sizeof(Memory) : it.bytes,
                            tensor ? static_cast<const void*>(&it.buffer->handle) : it.number.data()),
          "giving " + kernel.name() + " its argument " + std::to_string(i));
  }
  const Status status = cl().EnqueueNDRangeKernel(queue_, id, 3, nullptr, all, grid.threads, 0, nullptr, nullptr);
  if (status != kDone)
    check(status, "running " + kernel.name() + " with " + std::to_string(group) +
                      " threads of each group, where it may have " + std::to_string(kernel.most_threads(*this)));
  last_ = kernel.name();
  if (++launches_ % kFlushEvery == 0) check(cl().Flush(queue_), "sending " + last_);
}

void Device::wait() {
  check(cl().Finish(queue_), last_.empty() ? std::string("waiting") : "waiting for " + last_);
}

}  // namespace portlm::opencl
