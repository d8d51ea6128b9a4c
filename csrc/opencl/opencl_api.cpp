#include "opencl/opencl_api.h"

#include <dlfcn.h>

namespace portlm::opencl {

namespace {

OpenCl functions;
bool opened = false;

template <typename Function>
bool find(void* library, const char* name, Function& into) {
  into = reinterpret_cast<Function>(dlsym(library, name));
  return into != nullptr;
}

}  // namespace

std::string open_opencl(const char* library) {
  if (opened) return {};
  void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return std::string("cannot open OpenCL's loader: ") + dlerror();
  OpenCl found = {};
#define PORTLM_OPENCL_FIND(name) \
  if (!find(handle, "cl" #name, found.name)) return std::string(library) + " has no cl" #name;
  PORTLM_OPENCL_FIND(GetPlatformIDs)
  PORTLM_OPENCL_FIND(GetPlatformInfo)
  PORTLM_OPENCL_FIND(GetDeviceIDs)
  PORTLM_OPENCL_FIND(GetDeviceInfo)
  PORTLM_OPENCL_FIND(CreateContext)
  PORTLM_OPENCL_FIND(CreateCommandQueue)
  PORTLM_OPENCL_FIND(CreateBuffer)
  PORTLM_OPENCL_FIND(ReleaseMemObject)
  PORTLM_OPENCL_FIND(EnqueueWriteBuffer)
  PORTLM_OPENCL_FIND(EnqueueReadBuffer)
  PORTLM_OPENCL_FIND(EnqueueCopyBuffer)
  PORTLM_OPENCL_FIND(CreateProgramWithSource)
  PORTLM_OPENCL_FIND(BuildProgram)
  PORTLM_OPENCL_FIND(GetProgramBuildInfo)
  PORTLM_OPENCL_FIND(ReleaseProgram)
  PORTLM_OPENCL_FIND(CreateKernel)
  PORTLM_OPENCL_FIND(ReleaseKernel)
  PORTLM_OPENCL_FIND(SetKernelArg)
  PORTLM_OPENCL_FIND(GetKernelWorkGroupInfo)
  PORTLM_OPENCL_FIND(EnqueueNDRangeKernel)
  PORTLM_OPENCL_FIND(Flush)
  PORTLM_OPENCL_FIND(Finish)
#undef PORTLM_OPENCL_FIND
  functions = found;
  opened = true;
  return {};
}

const OpenCl& cl() { return functions; }

std::string meaning(Status status) {
  const char* const words = status == kNoDevice        ? "there is no device"
                            : status == kDeviceGone    ? "the device is lost"
                            : status == kNoMemory      ? "its memory is full"
                            : status == kNoResources   ? "its memory or another resource is full"
                            : status == kNoHostMemory  ? "the host's memory is full"
                            : status == kDoesNotBuild  ? "the program does not compile"
                            : status == kNoSuchQueue   ? "the device is lost, perhaps by a kernel that went wrong"
                            : status == kBadGroups     ? "it has no groups of so many threads"
                            : status == kBadBufferSize ? "it has no buffers of this size"
                            : status == kNoPlatform    ? "no driver is installed"
                                                       : "OpenCL refuses";
  return std::string(words) + " (OpenCL's error " + std::to_string(status) + ")";
}

}  // namespace portlm::opencl
