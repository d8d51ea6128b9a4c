// libcuda.so.1: the functions that portlm and TVM's runtime call, with a device's rules for launches.
//
// A module is either real machine code, whose kernels are found by name and only noted when they are launched; or a library
// for this processor, as the nvcc in this folder makes it, whose kernels run (tests/cuda_on_cpu).
#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include <cstdint>
#include <set>
#include <string>

#include "device.h"

using fake_cuda::note;

namespace {

enum { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidImage = 200, kNoBinary = 209, kNotFound = 500,
       kIllegalAddress = 700, kNotSupported = 801 };
constexpr int kCuda = 190;  // the machine of a cubin's header

struct Launch {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};

using Run = const char* (*)(const char* name, const unsigned* grid, const unsigned* block, unsigned shared, void** parameters);

struct Module {
  void* library = nullptr;
  Run run = nullptr;
  std::set<std::string> kernels;  // of a cubin
};
struct Function {
  Module* module;
  std::string name;
};

// The kernels of a cubin have a section of code each.
void read_cubin(const char* image, Module& module) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; ++i) {
    const std::string name = names + sections[i].sh_name;
    if (name.rfind(".text.", 0) == 0) module.kernels.insert(name.substr(6));
  }
}

bool open_library(const char* image, Module& module) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  const size_t size = header->e_shoff + size_t{header->e_shnum} * header->e_shentsize;  // the last thing in the file
  char path[] = "/tmp/fake-cuda-XXXXXX";
  const int file = mkstemp(path);
  if (file < 0) return false;
  const bool written = write(file, image, size) == static_cast<ssize_t>(size);
  close(file);
  if (written) module.library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  unlink(path);
  if (module.library) module.run = reinterpret_cast<Run>(dlsym(module.library, "cuda_on_cpu_launch"));
  return module.run != nullptr;
}

}  // namespace

extern "C" {

fake_cuda::Memory* fake_cuda_memory() {
  static auto* memory = new fake_cuda::Memory;
  return memory;
}

int cuInit(unsigned) { return fake_cuda::devices() ? fake_cuda::setting("FAKE_CUDA_INIT", kSuccess) : kNoDevice; }

int cuDriverGetVersion(int* version) {
  *version = fake_cuda::version();
  return kSuccess;
}

int cuDeviceGetCount(int* count) {
  *count = fake_cuda::devices();
  return kSuccess;
}

int cuDeviceGet(int* device, int number) {
  *device = number;
  return number < fake_cuda::devices() ? kSuccess : 101;
}

int cuDeviceGetName(char* name, int room, int) {
  std::snprintf(name, static_cast<size_t>(room), "Fake GPU");
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int which, int) {
  *value = fake_cuda::attribute(which);
  return kSuccess;
}

int cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = static_cast<size_t>(fake_cuda::setting("FAKE_CUDA_MEMORY", 1 << 28));
  return kSuccess;
}

int cuGetErrorName(int error, const char** text) {
  *text = error == kNoBinary ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : error == kIllegalAddress ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
  return kSuccess;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == kNoBinary ? "no kernel image is available for execution on the device" : "a fake error";
  return kSuccess;
}

int cuModuleLoadData(Module** module, const void* data) {
  const char* image = static_cast<const char*>(data);
  if (std::memcmp(image, ELFMAG, SELFMAG)) return kInvalidImage;
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  auto* made = new Module;
  if (header->e_machine == kCuda) {
    const int code = static_cast<int>(header->e_flags >> 8 & 0xff), here = fake_cuda::architecture();
    if (code / 10 != here / 10 || code > here) return kNoBinary;
    read_cubin(image, *made);
    note("module sm_%d\n", code);
  } else {
    if (!open_library(image, *made)) return kInvalidImage;
    note("module for this processor\n");
  }
  *module = made;
  return kSuccess;
}

int cuModuleUnload(Module* module) {
  if (module->library) dlclose(module->library);
  delete module;
  return kSuccess;
}

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  if (!module->run && !module->kernels.count(name)) return kNotFound;
  *function = new Function{module, name};
  return kSuccess;
}

int cuFuncSetAttribute(Function*, int, int) { return kSuccess; }

int cuTensorMapEncodeTiled() { return kNotSupported; }

int cuLaunchKernelEx(const Launch* launch, Function* function, void** parameters, void**) {
  const unsigned *grid = launch->grid, *block = launch->block;
  note("launch %s %u %u %u, %u %u %u\n", function->name.c_str(), grid[0], grid[1], grid[2], block[0], block[1], block[2]);
  const uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffffu || grid[1] > 65535u || grid[2] > 65535u) return kInvalidValue;
  if (!threads || threads > 1024 || block[2] > 64 || launch->shared > (48u << 10)) return kInvalidValue;
  if (const int fault = fake_cuda::setting("FAKE_CUDA_FAULT", kSuccess)) return fault;
  if (!function->module->run) return kSuccess;
  fake_cuda_memory()->open();
  const char* problem = function->module->run(function->name.c_str(), grid, block, launch->shared, parameters);
  fake_cuda_memory()->shut();
  if (!problem) return kSuccess;
  note("fault in %s: %s\n", function->name.c_str(), problem);
  std::fprintf(stderr, "fault in %s: %s\n", function->name.c_str(), problem);
  return kIllegalAddress;
}
}
