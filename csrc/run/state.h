// The states of one role: keys and values of every layer that grow in place, in one block of memory with room to spare.
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

// Heads K and width D of the tensor (rows, K, past, D) of one state.
struct Heads {
  int64_t K, D;
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
  // Floats from row to row and from head to head of a tensor, and its first one.
  int64_t row_stride(size_t tensor) const { return tensors_[tensor].K * head_stride(tensor); }
  int64_t head_stride(size_t tensor) const { return capacity_ * tensors_[tensor].D; }
  float* data(size_t tensor) { return memory_ + rows_ * capacity_ * before_[tensor]; }

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

 private:
  const float* data(size_t tensor) const { return memory_ + rows_ * capacity_ * before_[tensor]; }
  bool allocate(int64_t rows, int64_t capacity);
  // Puts row `row` of a source, without its first `skip` slots, at the end of the first `past` slots of row `to`.
  void place(const Cache& source, int64_t row, int64_t skip, int64_t to, int64_t past);
  void swap(Cache& other);

  std::vector<Heads> tensors_;
  std::vector<int64_t> before_;  // floats of one slot of one row in the tensors before this one
  int64_t floats_ = 0;           // of one slot of one row
  int64_t rows_, past_ = 0, capacity_ = 0;
  float* memory_ = nullptr;
};

// Memory for so many floats, aligned to 64 bytes, large pages where that helps; nullptr if there is none. free() ends it.
float* allocate_floats(int64_t count);

// Whether a product of positive numbers stays below what memory can hold; `product` is then that.
bool multiply(const int64_t* factors, size_t count, int64_t& product);

}  // namespace portlm::run
