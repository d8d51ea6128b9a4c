#include "vulkan/wgpu_api.h"

#include <dlfcn.h>

namespace portlm::vulkan {

namespace {

Wgpu functions;

std::string hexadecimal(uint32_t number) {
  static const char digits[] = "0123456789abcdef";
  std::string text = "0x";
  for (int shift = 28; shift >= 0; shift -= 4) text += digits[number >> shift & 15];
  return text;
}

}  // namespace

std::string open_wgpu(const char* path) {
  if (functions.CreateInstance != nullptr) return {};
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::string("cannot open wgpu-native: ") + dlerror();
  const auto version = reinterpret_cast<uint32_t (*)()>(dlsym(library, "wgpuGetVersion"));
  if (version == nullptr) return std::string(path) + " is not wgpu-native: it has no wgpuGetVersion";
  if (version() != kWgpuVersion)
    return "wgpu-native says version " + hexadecimal(version()) + ", and this was built for " +
           hexadecimal(kWgpuVersion);
  Wgpu found;
#define PORTLM_WGPU_FIND(name)                                                           \
  found.name = reinterpret_cast<decltype(&wgpu##name)>(dlsym(library, "wgpu" #name)); \
  if (found.name == nullptr) return std::string(path) + " has no wgpu" #name;
  PORTLM_WGPU_FUNCTIONS(PORTLM_WGPU_FIND)
#undef PORTLM_WGPU_FIND
  functions = found;
  return {};
}

const Wgpu& wgpu() { return functions; }

}  // namespace portlm::vulkan
