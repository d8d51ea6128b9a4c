// The key/value cache of one layer, grown in place.
//
// append_cache(past (B, K, P, D), source (B, T, W), first) -> present (B, K, P+T, D) adds columns [first, first + K*D) of
// source. It returns a view of a buffer with room for more positions than it holds, so that the next call only writes
// its T new rows. The function stays pure for its caller: a buffer is extended only from the view that reaches its end,
// and rows once written never change, so an older view keeps its content. Extending such an older view again (another
// continuation of the same prefix) finds the end moved on, and copies.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>

#include "tvm/call.h"

namespace portlm::tvm {
namespace {

constexpr size_t kAlignment = 64;
constexpr int64_t kLeastRoom = 64;  // positions

// Storage for (B, K, capacity, D) floats, of which the first `used` positions of each head are written.
struct Buffer {
  float* data;
  int64_t B, K, D, capacity;
  int64_t used;                 // guarded by Registry::mutex
  std::atomic<int64_t> views{1};
};

struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, Buffer*> buffers;  // by address of the first element
};

Registry& registry() {
  static Registry* instance = new Registry;  // never destroyed: views may outlive static destructors
  return *instance;
}

Buffer* make_buffer(int64_t B, int64_t K, int64_t D, int64_t used) {
  const int64_t capacity = used + std::max(kLeastRoom, used / 2);
  const size_t bytes = static_cast<size_t>(B * K * capacity * D) * sizeof(float);
  const size_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  auto* data = static_cast<float*>(std::aligned_alloc(kAlignment, rounded));
  if (!data) throw std::bad_alloc();
  auto buffer = std::make_unique<Buffer>();
  buffer->data = data;
  buffer->B = B, buffer->K = K, buffer->D = D, buffer->capacity = capacity, buffer->used = used;
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.buffers[data] = buffer.get();
  return buffer.release();
}

void release(Buffer* buffer) {
  Registry& all = registry();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (--buffer->views) return;
    all.buffers.erase(buffer->data);
  }
  std::free(buffer->data);
  delete buffer;
}

// The buffer that `past` is the complete content of, with room for T more positions now claimed; or nullptr.
Buffer* claim(const Tensor& past, int64_t T) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.buffers.find(past.data<void>());
  if (found == all.buffers.end()) return nullptr;
  Buffer* buffer = found->second;
  const bool complete = buffer->B == past.size(0) && buffer->K == past.size(1) && buffer->D == past.size(3) &&
                        buffer->used == past.size(2);
  if (!complete || buffer->used + T > buffer->capacity) return nullptr;
  buffer->used += T;
  ++buffer->views;
  return buffer;
}

struct View {
  DLManagedTensor managed;
  int64_t shape[4], strides[4];
  Buffer* buffer;
};

void hand_over(Buffer* buffer, int64_t positions, Any* result) {
  auto* view = new View{};
  view->buffer = buffer;
  const int64_t shape[4] = {buffer->B, buffer->K, positions, buffer->D};
  const int64_t head = buffer->capacity * buffer->D;
  const int64_t strides[4] = {buffer->K * head, head, buffer->D, 1};
  std::copy(shape, shape + 4, view->shape);
  std::copy(strides, strides + 4, view->strides);
  view->managed.tensor = {buffer->data, {kCpu, 0}, 4, {kFloat, 32, 1}, view->shape, view->strides, 0};
  view->managed.context = view;
  view->managed.deleter = [](DLManagedTensor* self) {
    auto* owner = static_cast<View*>(self->context);
    release(owner->buffer);
    delete owner;
  };
  void* object = nullptr;
  if (runtime().tensor_from_dlpack(&view->managed, 0, 0, &object) != 0) {
    view->managed.deleter(&view->managed);
    throw std::runtime_error("the runtime refused the cache tensor");
  }
  result->type_index = kTensorObject;
  result->padding = 0;
  result->pointer = object;
}

}  // namespace
}  // namespace portlm::tvm

PORTLM_TVM_FUNCTION(append_cache) {
  using namespace portlm::tvm;
  return guarded("append_cache", args, count, [result](const Call& call) {
    call.expect_count(3);
    const auto past = call.strided_f32(0, "past", 4), source = call.f32(1, "source", 3);
    const int64_t B = past.size(0), K = past.size(1), P = past.size(2), D = past.size(3);
    const int64_t T = source.size(1), W = source.size(2), first = call.integer(2, "first");
    call.expect_shape(source, {B, T, W});
    call.expect_columns(source, first, K * D);
    Buffer* buffer = claim(past, T);
    if (!buffer) {
      if (P > 0 && past.stride(3) != 1) call.fail("past must have contiguous rows");
      buffer = make_buffer(B, K, D, P + T);
      if (P > 0)
        for (int64_t b = 0; b < B; ++b)
          for (int64_t k = 0; k < K; ++k)
            for (int64_t p = 0; p < P; ++p)
              std::memcpy(buffer->data + ((b * K + k) * buffer->capacity + p) * D,
                          past.data<float>() + b * past.stride(0) + k * past.stride(1) + p * past.stride(2),
                          static_cast<size_t>(D) * sizeof(float));
    }
    for (int64_t b = 0; b < B; ++b)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t t = 0; t < T; ++t)
          std::memcpy(buffer->data + ((b * K + k) * buffer->capacity + P + t) * D,
                      source.data<float>() + (b * T + t) * W + first + k * D, static_cast<size_t>(D) * sizeof(float));
    hand_over(buffer, P + T, result);
  });
}
