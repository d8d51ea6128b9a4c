// The key/value cache of one layer, grown in place.
//
// append_cache(past (B, K, P, D), source (B, T, W), first) -> present (B, K, P+T, D) adds columns [first, first + K*D) of
// source; append_bytes does so for a cache of bytes, and append_byte_scales(past (B, K, P, 1), source, first, D) for its
// scales. Each returns a view of a buffer with room for more positions than it holds, so that the next call only writes
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

#include "cpu/kernels.h"
#include "tvm/call.h"

namespace portlm::tvm {
namespace {

constexpr size_t kAlignment = 64;
constexpr int64_t kLeastRoom = 64;  // positions

// Storage for (B, K, capacity, D) numbers, of which the first `used` positions of each head are written.
struct Buffer {
  char* data;
  DLDataType type;
  int64_t B, K, D, capacity;
  int64_t used;                 // guarded by Registry::mutex
  std::atomic<int64_t> views{1};
  int64_t item() const { return type.bits / 8; }  // bytes
  int64_t head_stride() const { return capacity * D; }
  char* at(int64_t head, int64_t position) const { return data + (head * head_stride() + position * D) * item(); }
};

struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, Buffer*> buffers;  // by address of the first element
};

Registry& registry() {
  static Registry* instance = new Registry;  // never destroyed: views may outlive static destructors
  return *instance;
}

Buffer* make_buffer(DLDataType type, int64_t B, int64_t K, int64_t D, int64_t used) {
  const int64_t capacity = used + std::max(kLeastRoom, used / 2);
  const size_t bytes = static_cast<size_t>(B * K * capacity * D) * (type.bits / 8);
  const size_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  auto* data = static_cast<char*>(std::aligned_alloc(kAlignment, rounded));
  if (!data) throw std::bad_alloc();
  auto buffer = std::make_unique<Buffer>();
  buffer->data = data, buffer->type = type;
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
  const bool complete = buffer->B == past.size(0) && buffer->type.code == past.raw().dtype.code && buffer->K == past.size(1) && buffer->D == past.size(3) &&
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
  const int64_t head = buffer->head_stride();
  const int64_t strides[4] = {buffer->K * head, head, buffer->D, 1};
  std::copy(shape, shape + 4, view->shape);
  std::copy(strides, strides + 4, view->strides);
  view->managed.tensor = {buffer->data, {kCpu, 0}, 4, buffer->type, view->shape, view->strides, 0};
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

// What the new positions of a cache are made of: T rows of W floats each.
struct Source {
  const float* data;
  int64_t T, W;
};

Source source_of(const Call& call, int64_t B, int64_t width) {
  const auto source = call.f32(1, "source", 3);
  const int64_t T = source.size(1), W = source.size(2), first = call.integer(2, "first");
  call.expect_shape(source, {B, T, W});
  call.expect_columns(source, first, width);
  return {source.data<float>() + first, T, W};
}

// A buffer that holds the P positions of `past` and has room for T more, which are claimed.
Buffer* extend(const Call& call, const Tensor& past, int64_t T) {
  if (Buffer* buffer = claim(past, T)) return buffer;
  const int64_t B = past.size(0), K = past.size(1), P = past.size(2), D = past.size(3);
  if (P > 0 && past.stride(3) != 1) call.fail("past must have contiguous rows");
  Buffer* buffer = make_buffer(past.raw().dtype, B, K, D, P + T);
  const int64_t item = buffer->item();
  for (int64_t head = 0; head < B * K; ++head)
    for (int64_t p = 0; p < P; ++p)
      std::memcpy(buffer->at(head, p),
                  past.data<char>() + (head / K * past.stride(0) + head % K * past.stride(1) + p * past.stride(2)) * item,
                  static_cast<size_t>(D * item));
  return buffer;
}

}  // namespace
}  // namespace portlm::tvm

PORTLM_TVM_FUNCTION(append_cache) {
  using namespace portlm::tvm;
  return guarded("append_cache", args, count, [result](const Call& call) {
    call.expect_count(3);
    const auto past = call.strided_f32(0, "past", 4);
    const int64_t K = past.size(1), P = past.size(2), D = past.size(3);
    const auto [data, T, W] = source_of(call, past.size(0), K * D);
    Buffer* buffer = extend(call, past, T);
    for (int64_t head = 0; head < past.size(0) * K; ++head)
      for (int64_t t = 0; t < T; ++t)
        std::memcpy(buffer->at(head, P + t), data + (head / K * T + t) * W + head % K * D,
                    static_cast<size_t>(D) * sizeof(float));
    hand_over(buffer, P + T, result);
  });
}

PORTLM_TVM_FUNCTION(append_bytes) {
  using namespace portlm::tvm;
  return guarded("append_bytes", args, count, [result](const Call& call) {
    call.expect_count(3);
    const auto past = call.strided_i8(0, "past", 4);
    const int64_t B = past.size(0), K = past.size(1), P = past.size(2), D = past.size(3);
    const auto [data, T, W] = source_of(call, B, K * D);
    Buffer* buffer = extend(call, past, T);
    const int64_t head = buffer->head_stride();
    portlm::kernels().append_bytes(data, W, reinterpret_cast<int8_t*>(buffer->data), K * head, head, nullptr, 0, 0, B, K, P, T,
                                   D);
    hand_over(buffer, P + T, result);
  });
}

PORTLM_TVM_FUNCTION(append_byte_scales) {
  using namespace portlm::tvm;
  return guarded("append_byte_scales", args, count, [result](const Call& call) {
    call.expect_count(4);
    const auto past = call.strided_f32(0, "past", 4);
    const int64_t B = past.size(0), K = past.size(1), P = past.size(2), D = call.integer(3, "D");
    call.expect_last(past, 1);
    if (D < 1) call.fail("D must be at least 1");
    const auto [data, T, W] = source_of(call, B, K * D);
    Buffer* buffer = extend(call, past, T);
    const int64_t head = buffer->head_stride();
    portlm::kernels().append_bytes(data, W, nullptr, 0, 0, reinterpret_cast<float*>(buffer->data), K * head, head, B, K, P, T, D);
    hand_over(buffer, P + T, result);
  });
}
