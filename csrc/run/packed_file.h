// A packed file (docs/packed.md) mapped into memory, every number of it compared with what it may be.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "run/status.h"

namespace portlm::run {

constexpr size_t kMaxRank = 8;
constexpr uint32_t kNone = 0xFFFFFFFF;
constexpr uint32_t kVersion = 2;

enum Symbol : uint32_t { kBatch = 1, kSequence = 2, kPast = 4, kKept = 8 };

// As in the file, where 3 is reserved. int4 and int8 are matrices (N, K) as packed_linear reads them, panels is one of
// float32 as panel_linear does, and the last two are of 16 bits as half_linear does; bytes are those of a state, signed.
enum class Dtype : uint8_t {
  none = 0,
  float32 = 1,
  int64 = 2,
  int4 = 4,
  int8 = 5,
  panels = 6,
  bytes = 7,
  float16_panels = 8,
  bfloat16_panels = 9,
};

// Whether a type is one of matrices of 16 bits, which lie in panels.
inline bool is_half(Dtype dtype) { return dtype == Dtype::float16_panels || dtype == Dtype::bfloat16_panels; }

// Whether a type is one of matrices in panels of 64 rows.
inline bool in_panels(Dtype dtype) { return dtype == Dtype::panels || is_half(dtype); }

enum class Kind : uint8_t { input = 1, state = 2, weight = 3, computed = 4 };

enum class Opcode : uint32_t {
  embedding = 1,
  add,
  view,
  slice,
  concat,
  rows,
  linear,
  layer_norm,
  add_layer_norm,
  rms_norm,
  add_rms_norm,
  swiglu,
  rotary,
  attention,
  heads,
  quantized_attention,
  linear_a8,
};

// A size, or the sum of symbols.
struct Dim {
  int64_t size;
  uint32_t symbols;
  bool operator==(const Dim& other) const { return size == other.size && symbols == other.symbols; }
  bool operator!=(const Dim& other) const { return !(*this == other); }
};

using Shape = std::vector<Dim>;

struct Tensor {
  std::string name;
  Dtype dtype;
  Shape shape;
  const void* data;
  int64_t group;  // columns that share a scale, of int4 and int8
  bool has_zeros;
};

// An input, output or state of a role.
struct Spec {
  std::string name, output;
  uint32_t value;
  Dtype dtype;
  Shape shape;
  int64_t below;  // 0: nothing is said
};

struct Value {
  std::string name;
  Kind kind;
  Dtype dtype;
  Shape shape;
  uint32_t tensor;  // of a weight
};

struct Step {
  std::string name;
  Opcode opcode;
  std::vector<uint32_t> inputs, outputs;  // values; kNone for an input that is absent
  std::vector<int64_t> ints;
  std::vector<double> reals;
};

struct Role {
  std::string name;
  std::vector<Spec> inputs, outputs, states;
  std::vector<Value> values;
  std::vector<Step> steps;
};

// What the file says. The weights stay in the mapping; the rest is copied, so that who writes to the file later cannot
// change what was checked.
class PackedFile {
 public:
  // Maps the whole file behind a descriptor, which may be closed afterwards; nullptr if it is none of ours, and why.
  static std::unique_ptr<PackedFile> open(int descriptor, Status& status);
  ~PackedFile();
  PackedFile(const PackedFile&) = delete;
  PackedFile& operator=(const PackedFile&) = delete;

  // Whether a product has activations of 8 bits.
  bool rounds_to_bytes() const;

  int64_t vocabulary = 0, context = 0;
  std::vector<Tensor> tensors;
  std::vector<Role> roles;

 private:
  PackedFile() = default;
  Status read();

  const unsigned char* base_ = nullptr;
  size_t size_ = 0;
};

// "(batch, 4, past + sequence)"
std::string text_of(const Shape& shape);

}  // namespace portlm::run
