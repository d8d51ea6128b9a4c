// The part of OpenCL 1.2 that the device needs, declared here, and taken from the loader at run time: building portlm
// needs no OpenCL, and a machine without a loader gets a sentence instead of a linker's error.
//
// Numbers and signatures are the specification's (registry.khronos.org/OpenCL).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace portlm::opencl {

using Status = int32_t;
using Flags = uint64_t;
using Bool = uint32_t;

// Objects of the driver, of which only addresses are known.
using Platform = struct PlatformObject*;
using DeviceId = struct DeviceObject*;
using Context = struct ContextObject*;
using Queue = struct QueueObject*;
using Memory = struct MemoryObject*;
using Program = struct ProgramObject*;
using KernelId = struct KernelObject*;
using Event = struct EventObject*;

constexpr Bool kYes = 1;

enum : Status {
  kDone = 0, kNoDevice = -1, kDeviceGone = -2, kNoMemory = -4, kNoResources = -5, kNoHostMemory = -6,
  kDoesNotBuild = -11, kNoSuchQueue = -36, kBadGroups = -54, kBadBufferSize = -61, kNoPlatform = -1001,
};

enum : uint32_t {
  kPlatformVersion = 0x0901, kPlatformName = 0x0902,
  kDeviceType = 0x1000, kDeviceUnits = 0x1002, kDeviceThreads = 0x1004, kDeviceMostBytes = 0x1010,
  kDeviceMemory = 0x101f, kDeviceShared = 0x1023, kDeviceCompiles = 0x1028, kDeviceName = 0x102b,
  kDeviceDriver = 0x102d, kDeviceVersion = 0x102f, kDeviceExtensions = 0x1030,
  kBuildLog = 0x1183, kKernelThreads = 0x11b0,
};

constexpr Flags kTypeCpu = 2, kTypeGpu = 4, kTypeAccelerator = 8, kTypeAll = 0xffffffff;
constexpr Flags kReadWrite = 1;

struct OpenCl {
  Status (*GetPlatformIDs)(uint32_t room, Platform* into, uint32_t* count);
  Status (*GetPlatformInfo)(Platform, uint32_t what, size_t room, void* into, size_t* size);
  Status (*GetDeviceIDs)(Platform, Flags kinds, uint32_t room, DeviceId* into, uint32_t* count);
  Status (*GetDeviceInfo)(DeviceId, uint32_t what, size_t room, void* into, size_t* size);
  Context (*CreateContext)(const intptr_t* properties, uint32_t count, const DeviceId*,
                           void (*notify)(const char* what, const void*, size_t, void* user), void* user, Status*);
  Queue (*CreateCommandQueue)(Context, DeviceId, Flags properties, Status*);
  Memory (*CreateBuffer)(Context, Flags, size_t bytes, void* host, Status*);
  Status (*ReleaseMemObject)(Memory);
  Status (*EnqueueWriteBuffer)(Queue, Memory, Bool wait, size_t offset, size_t bytes, const void* from, uint32_t,
                               const Event*, Event*);
  Status (*EnqueueReadBuffer)(Queue, Memory, Bool wait, size_t offset, size_t bytes, void* to, uint32_t, const Event*,
                              Event*);
  Status (*EnqueueCopyBuffer)(Queue, Memory from, Memory to, size_t from_offset, size_t to_offset, size_t bytes,
                              uint32_t, const Event*, Event*);
  Program (*CreateProgramWithSource)(Context, uint32_t count, const char** texts, const size_t* sizes, Status*);
  Status (*BuildProgram)(Program, uint32_t count, const DeviceId*, const char* options,
                         void (*notify)(Program, void* user), void* user);
  Status (*GetProgramBuildInfo)(Program, DeviceId, uint32_t what, size_t room, void* into, size_t* size);
  Status (*ReleaseProgram)(Program);
  KernelId (*CreateKernel)(Program, const char* name, Status*);
  Status (*ReleaseKernel)(KernelId);
  Status (*SetKernelArg)(KernelId, uint32_t index, size_t bytes, const void* value);
  Status (*GetKernelWorkGroupInfo)(KernelId, DeviceId, uint32_t what, size_t room, void* into, size_t* size);
  Status (*EnqueueNDRangeKernel)(Queue, KernelId, uint32_t axes, const size_t* offset, const size_t* global,
                                 const size_t* local, uint32_t, const Event*, Event*);
  Status (*Flush)(Queue);
  Status (*Finish)(Queue);
};

// Opens a loader, once. Returns what is wrong, or nothing.
std::string open_opencl(const char* library);

// The functions; open_opencl must have succeeded.
const OpenCl& cl();

// A status in words, with its number.
std::string meaning(Status status);

}  // namespace portlm::opencl
