#include "run/state.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace portlm::run {
namespace {

constexpr int64_t kLeastRoom = 64;                 // slots
constexpr int64_t kAlignment = 64;                 // bytes
constexpr int64_t kMostFloats = int64_t{1} << 40;  // 4 TiB
constexpr size_t kLargePage = size_t{2} << 20;

Status no_memory(int64_t rows, int64_t slots) {
  return Status::failed("no memory for the state of " + std::to_string(rows) + " rows with " + std::to_string(slots) +
                        " slots");
}

size_t bytes(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

}  // namespace

bool multiply(const int64_t* factors, size_t count, int64_t& product) {
  product = 1;
  for (size_t i = 0; i < count; ++i)
    if (factors[i] < 0 || __builtin_mul_overflow(product, factors[i], &product) || product > kMostFloats) return false;
  return true;
}

float* allocate_floats(int64_t count) {
  const size_t wanted = std::max<size_t>(bytes(count), 64);
  const size_t alignment = wanted >= kLargePage ? kLargePage : 64;
  const size_t rounded = (wanted + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
#ifdef MADV_HUGEPAGE
  if (memory && alignment == kLargePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return static_cast<float*>(memory);
}

Cache::Cache(const std::vector<Heads>& tensors, int64_t rows)
    : tensors_(tensors), begins_(tensors.size(), 0), rows_(rows) {}

Cache::~Cache() { std::free(memory_); }

bool Cache::allocate(int64_t rows, int64_t capacity) {
  int64_t end = 0;
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const auto [K, D, item] = tensors_[t];
    const int64_t factors[] = {rows, capacity, K, D, item};
    int64_t size = 0;
    begins_[t] = (end + kAlignment - 1) / kAlignment * kAlignment;
    if (!multiply(factors, 5, size) || __builtin_add_overflow(begins_[t], size, &end)) return false;
  }
  memory_ = reinterpret_cast<char*>(allocate_floats(end / static_cast<int64_t>(sizeof(float)) + 1));
  if (memory_) rows_ = rows, capacity_ = capacity;
  return memory_ != nullptr;
}

void Cache::swap(Cache& other) {
  std::swap(rows_, other.rows_);
  std::swap(past_, other.past_);
  std::swap(capacity_, other.capacity_);
  std::swap(begins_, other.begins_);
  std::swap(memory_, other.memory_);
}

void Cache::place(const Cache& source, int64_t row, int64_t skip, int64_t to, int64_t past) {
  const int64_t slots = source.past_ - skip, free = past - slots;
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const int64_t slot = tensors_[t].D * tensors_[t].item;  // bytes
    for (int64_t k = 0; k < tensors_[t].K; ++k) {
      if (free > 0) std::memset(at(t, to, k, 0), 0, static_cast<size_t>(free * slot));
      if (slots > 0) std::memcpy(at(t, to, k, free), source.at(t, row, k, skip), static_cast<size_t>(slots * slot));
    }
  }
}

Status Cache::reserve(int64_t slots, int64_t most) {
  if (slots <= capacity_) return {};
  const int64_t capacity = std::max(slots, std::min(most, slots + std::max(kLeastRoom, slots / 2)));
  Cache larger(tensors_, rows_);
  if (!larger.allocate(rows_, capacity)) return no_memory(rows_, capacity);
  larger.past_ = past_;
  for (int64_t b = 0; b < rows_; ++b) larger.place(*this, b, 0, b, past_);
  swap(larger);
  return {};
}

Status Cache::reorder(const std::vector<int64_t>& rows, int64_t skip) {
  bool same = static_cast<int64_t>(rows.size()) == rows_;
  for (size_t i = 0; same && i < rows.size(); ++i) same = rows[i] == static_cast<int64_t>(i);
  if (same && skip == 0) return {};
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t past = past_ - skip;
  Cache chosen(tensors_, count);
  if (past > 0 && !chosen.allocate(count, past + kLeastRoom)) return no_memory(count, past);
  for (int64_t i = 0; past > 0 && i < count; ++i) chosen.place(*this, rows[static_cast<size_t>(i)], skip, i, past);
  chosen.past_ = past;
  swap(chosen);
  return {};
}

void Cache::crop(const std::vector<int64_t>& lengths) {
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  for (int64_t b = 0; b < rows_; ++b) {
    const int64_t length = lengths[static_cast<size_t>(b)], free = longest - length;
    if (free == 0) continue;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      const int64_t slot = tensors_[t].D * tensors_[t].item;  // bytes
      for (int64_t k = 0; k < tensors_[t].K; ++k) {
        std::memmove(at(t, b, k, free), at(t, b, k, 0), static_cast<size_t>(length * slot));
        std::memset(at(t, b, k, 0), 0, static_cast<size_t>(free * slot));
      }
    }
  }
  past_ = longest;
}

Status Cache::join(const std::vector<const Cache*>& others) {
  int64_t rows = rows_, past = past_;
  for (const Cache* other : others) rows += other->rows_, past = std::max(past, other->past_);
  Cache joined(tensors_, rows);
  if (past > 0 && !joined.allocate(rows, past + kLeastRoom)) return no_memory(rows, past);
  int64_t to = 0;
  for (int64_t b = 0; past > 0 && b < rows_; ++b) joined.place(*this, b, 0, to++, past);
  for (const Cache* other : others)
    for (int64_t b = 0; past > 0 && b < other->rows_; ++b) joined.place(*other, b, 0, to++, past);
  joined.past_ = past;
  swap(joined);
  return {};
}

Status Cache::copy_to(Cache& twin) const {
  Cache copied(tensors_, rows_);
  if (past_ > 0 && !copied.allocate(rows_, past_ + kLeastRoom)) return no_memory(rows_, past_);
  for (int64_t b = 0; past_ > 0 && b < rows_; ++b) copied.place(*this, b, 0, b, past_);
  copied.past_ = past_;
  twin.swap(copied);
  return {};
}

Status Cache::fill(int64_t slots, const std::vector<const void*>& states) {
  Cache filled(tensors_, rows_);
  if (slots > 0 && !filled.allocate(rows_, slots + kLeastRoom)) return no_memory(rows_, slots);
  for (size_t t = 0; slots > 0 && t < tensors_.size(); ++t) {
    const int64_t head = slots * tensors_[t].D * tensors_[t].item;  // bytes
    const char* from = static_cast<const char*>(states[t]);
    for (int64_t b = 0; b < rows_; ++b)
      for (int64_t k = 0; k < tensors_[t].K; ++k, from += head)
        std::memcpy(filled.at(t, b, k, 0), from, static_cast<size_t>(head));
  }
  filled.past_ = slots;
  swap(filled);
  return {};
}

void Cache::read(size_t tensor, void* to) const {
  const int64_t head = past_ * tensors_[tensor].D * tensors_[tensor].item;  // bytes
  char* next = static_cast<char*>(to);
  for (int64_t b = 0; past_ > 0 && b < rows_; ++b)
    for (int64_t k = 0; k < tensors_[tensor].K; ++k, next += head)
      std::memcpy(next, at(tensor, b, k, 0), static_cast<size_t>(head));
}

}  // namespace portlm::run
