// libcudart.so.13: the functions that TVM's runtime calls. Everything has happened when a function returns.
#include "device.h"

using fake_cuda::note;

namespace {
enum { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidDevice = 101, kNotSupported = 801 };
enum { kHostToHost, kHostToDevice, kDeviceToHost, kDeviceToDevice };
}  // namespace

extern "C" {

int cudaGetDeviceCount(int* count) {
  *count = fake_cuda::devices();
  return *count ? kSuccess : kNoDevice;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cudaSetDevice(int device) { return device < fake_cuda::devices() ? kSuccess : kInvalidDevice; }
int cudaDeviceGetAttribute(int* value, int which, int device) {
  *value = fake_cuda::attribute(which);
  return device < fake_cuda::devices() ? kSuccess : kInvalidDevice;
}
int cudaGetDeviceProperties(void*, int) { return kNotSupported; }
const char* cudaGetErrorName(int) { return "cudaError"; }
const char* cudaGetErrorString(int) { return "a fake error"; }
int cudaGetLastError() { return kSuccess; }
int cudaPeekAtLastError() { return kSuccess; }

int cudaMalloc(void** pointer, size_t bytes) {
  if (!bytes) {
    *pointer = nullptr;
    return kSuccess;
  }
  *pointer = fake_cuda_memory()->take(bytes);
  note("malloc %zu\n", bytes);
  return *pointer ? kSuccess : kOutOfMemory;
}
int cudaFree(void* pointer) {
  if (pointer) note("free\n");
  return !pointer || fake_cuda_memory()->give_back(pointer) ? kSuccess : kInvalidValue;
}
int cudaMallocHost(void** pointer, size_t bytes) {
  *pointer = std::malloc(bytes);
  return kSuccess;
}
int cudaFreeHost(void* pointer) {
  std::free(pointer);
  return kSuccess;
}
int cudaMemGetInfo(size_t* unused, size_t* all) {
  *unused = *all = fake_cuda::kArena;
  return kSuccess;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void*) {
  fake_cuda::Memory& memory = *fake_cuda_memory();
  const bool source = kind == kDeviceToHost || kind == kDeviceToDevice, there = kind == kHostToDevice || kind == kDeviceToDevice;
  if (bytes && (memory.holds(from) != source || memory.holds(to) != there)) return kInvalidValue;
  const char* names[] = {"on the host", "to the device", "to the host", "on the device"};
  if (kind < 0 || kind > 3) return kInvalidValue;
  note("copy %zu %s\n", bytes, names[kind]);
  memory.open();
  std::memcpy(to, from, bytes);
  memory.shut();
  return kSuccess;
}
int cudaMemcpyPeerAsync(void*, int, const void*, int, size_t, void*) { return kNotSupported; }

int cudaStreamCreate(void** stream) {
  *stream = new int;
  return kSuccess;
}
int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void* stream) {
  delete static_cast<int*>(stream);
  return kSuccess;
}
int cudaStreamSynchronize(void*) { return kSuccess; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
int cudaStreamBeginCapture(void*, int) { return kNotSupported; }
int cudaStreamEndCapture(void*, void**) { return kNotSupported; }
int cudaGraphInstantiate(void**, void*, unsigned long long) { return kNotSupported; }
int cudaGraphLaunch(void*, void*) { return kNotSupported; }
int cudaGraphDestroy(void*) { return kNotSupported; }
int cudaGraphExecDestroy(void*) { return kNotSupported; }
int cudaEventCreate(void** event) { return cudaStreamCreate(event); }
int cudaEventRecord(void*, void*) { return kSuccess; }
int cudaEventSynchronize(void*) { return kSuccess; }
int cudaEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 0;
  return kSuccess;
}
int cudaEventDestroy(void* event) { return cudaStreamDestroy(event); }
}
