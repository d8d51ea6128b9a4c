// The states of one role: keys and values of every layer that grow in place, in one block of memory with room to spare.
// They are floats, or bytes beside floats that are their scales.
//
// The slots of a head lie without gaps; all rows end at the same slot. What operations on states mean, and which slots
// become zero, is what runtimes/base.py says of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "run/status.h"

namespace portlm::run {

// Heads K and width D of the tensor (rows, K, past, D) of one state, and the bytes of one of its numbers.
struct Heads {
  int64_t K, D, item;
};

class Cache {
 public:
  // B rows without slots.
  Cache(const std::vector<Heads>& tensors, int64_t rows);
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  int64_t rows() const { return rows_; }
  int64_t past() const { return past_; }
  size_t tensors() const { return tensors_.size(); }
  // Numbers from row to row and from head to head of a tensor, and its first one.
  int64_t row_stride(size_t tensor) const { return tensors_[tensor].K * head_stride(tensor); }
  int64_t head_stride(size_t tensor) const { return capacity_ * tensors_[tensor].D; }
  float* floats(size_t tensor) { return reinterpret_cast<float*>(data(tensor)); }
  int8_t* bytes(size_t tensor) { return reinterpret_cast<int8_t*>(data(tensor)); }

  // Makes room for so many slots in all, not more than `most` of them.
  Status reserve(int64_t slots, int64_t most);
  // Slots that were written behind the last one belong to it now.
  void grow(int64_t slots) { past_ += slots; }

  // Row i becomes what row rows[i] is, without its first `skip` slots.
  Status reorder(const std::vector<int64_t>& rows, int64_t skip);
  // Row b keeps its first lengths[b] slots, which move to the end of the longest.
  void crop(const std::vector<int64_t>& lengths);
  // The rows of others behind these, all at the end of the longest.
  Status join(const std::vector<const Cache*>& others);
  // The same content once more.
  Status copy_to(Cache& twin) const;
  // Takes over so many slots of every state, and gives those of one: (rows, K, slots, D) without gaps.
  Status fill(int64_t slots, const std::vector<const void*>& states);
  void read(size_t tensor, void* to) const;

 private:
  char* data(size_t tensor) const { return memory_ + begins_[tensor]; }
  // Where slot `slot` of a head begins.
  char* at(size_t tensor, int64_t row, int64_t head, int64_t slot) const {
    const Heads& t = tensors_[tensor];
    return data(tensor) + ((row * t.K + head) * capacity_ + slot) * t.D * t.item;
  }
  bool allocate(int64_t rows, int64_t capacity);
  // Puts row `row` of a source, without its first `skip` slots, at the end of the first `past` slots of row `to`.
  void place(const Cache& source, int64_t row, int64_t skip, int64_t to, int64_t past);
  void swap(Cache& other);

  std::vector<Heads> tensors_;
  std::vector<int64_t> begins_;  // of the tensors in memory, multiples of 64 bytes
  int64_t rows_, past_ = 0, capacity_ = 0;
  char* memory_ = nullptr;
};

// Memory for so many floats, aligned to 64 bytes, large pages where that helps; nullptr if there is none. free() ends it.
float* allocate_floats(int64_t count);

// Whether a product of positive numbers stays below what memory can hold; `product` is then that.
bool multiply(const int64_t* factors, size_t count, int64_t& product);

}  // namespace portlm::run
