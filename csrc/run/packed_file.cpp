#include "run/packed_file.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <new>

#include "cpu/kernels.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace portlm::run {
namespace {

constexpr unsigned char kMagic[8] = {0x89, 'P', 'O', 'R', 'T', 'L', 'M', '\n'};
constexpr uint32_t kOrder = 0x01020304;
constexpr uint32_t kTiles = 1;  // the layout of quantized matrices
constexpr size_t kAlignment = 64, kHeader = 256, kTables = 10;
constexpr int64_t kMaxSize = int64_t{1} << 31;
constexpr uint64_t kMaxBytes = uint64_t{1} << 44;
constexpr uint64_t kMaxName = 1024, kMaxCopied = 64 << 20;

// Records as they lie in the file.
struct Name {
  uint32_t offset, length;
};
struct Section {
  uint64_t offset, count;
};
struct Header {
  unsigned char magic[8];
  uint32_t order, version;
  uint64_t bytes;
  uint32_t layout, vocabulary, context, zeros[7];
  Section tables[kTables];
  uint32_t more_zeros[8];
};
struct DimRecord {
  int64_t size;
  uint32_t symbols, zero;
};
struct TensorRecord {
  Name name;
  uint8_t dtype, rank, bits, has_zeros;
  uint32_t group, dims, zero;
  uint64_t offset, bytes;
};
struct RoleRecord {
  Name name;
  uint32_t inputs, outputs, states, values, steps, zeros[3];
};
struct SpecRecord {
  Name name, output;
  uint32_t value;
  uint8_t dtype, rank, initial, update;
  uint32_t dims, zero;
  uint64_t below;
};
struct ValueRecord {
  Name name;
  uint8_t kind, dtype, rank, zero;
  uint32_t dims, tensor, last;
};
struct StepRecord {
  Name name;
  uint32_t opcode, inputs, outputs, ints, reals, zeros[3];
};
static_assert(sizeof(Header) == kHeader && sizeof(DimRecord) == 16 && sizeof(TensorRecord) == 40, "docs/packed.md");
static_assert(sizeof(RoleRecord) == 40 && sizeof(SpecRecord) == 40 && sizeof(ValueRecord) == 24, "docs/packed.md");
static_assert(sizeof(StepRecord) == 40, "docs/packed.md");

enum Table { kNames, kDims, kTensorTable, kRoles, kSpecs, kValues, kSteps, kOperands, kInts, kReals };
struct Known {
  const char* name;
  uint64_t item, most;
};
constexpr Known kKnown[kTables] = {
    {"names", 1, 16 << 20},      {"dims", 16, 1 << 22},  {"tensors", 40, 1 << 16}, {"roles", 40, 64},
    {"specs", 40, 1 << 20},      {"values", 24, 1 << 20}, {"steps", 40, 1 << 17},   {"operands", 4, 1 << 22},
    {"ints", 8, 1 << 22},        {"reals", 8, 1 << 22},
};

// What ends the reading, with its reason. It does not leave this file.
struct Refused {
  std::string why;
};

[[noreturn]] void refuse(std::string why) { throw Refused{std::move(why)}; }

void need(bool fine, const char* what, uint64_t place) {
  if (!fine) refuse(std::string(what) + " " + std::to_string(place) + " says what cannot be");
}

bool all_zero(const uint32_t* words, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (words[i]) return false;
  return true;
}

uint64_t aligned(uint64_t place) { return (place + kAlignment - 1) / kAlignment * kAlignment; }

// The system fills the last page of a mapping with zeros, so who reads behind the file's end is not stopped there.
void guard_last_page(const unsigned char* base, size_t size, bool guarded) {
#ifdef __SANITIZE_ADDRESS__
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), behind = (page - size % page) % page;
  if (guarded)
    ASAN_POISON_MEMORY_REGION(base + size, behind);
  else
    ASAN_UNPOISON_MEMORY_REGION(base + size, behind);
#else
  (void)base, (void)size, (void)guarded;
#endif
}

// Whether bytes are UTF-8 (RFC 3629) without control characters.
bool is_text(const unsigned char* text, size_t length) {
  for (size_t i = 0; i < length;) {
    const unsigned char c = text[i];
    if (c < 0x20 || c == 0x7F) return false;
    if (c < 0x80) {
      ++i;
      continue;
    }
    const size_t more = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
    if (c < 0xC2 || c > 0xF4 || more >= length - i) return false;
    const unsigned char next = text[i + 1];
    if ((c == 0xE0 && next < 0xA0) || (c == 0xED && next > 0x9F) || (c == 0xF0 && next < 0x90) || (c == 0xF4 && next > 0x8F))
      return false;
    for (size_t k = 1; k <= more; ++k)
      if ((text[i + k] & 0xC0) != 0x80) return false;
    i += more + 1;
  }
  return true;
}

// The tables of a mapped file, of which every part that is asked for has been found to lie inside it.
class Reader {
 public:
  Reader(const unsigned char* base, uint64_t size) : base_(base), size_(size) {}

  Header header() {
    Header header;
    if (size_ < kHeader)
      refuse("truncated, it has " + std::to_string(size_) + " bytes and the header alone " + std::to_string(kHeader));
    std::memcpy(&header, base_, kHeader);
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) refuse("it does not begin as a packed file does");
    if (header.order != kOrder)
      refuse(header.order == 0x04030201 ? "it is of the other byte order" : "its mark of the byte order is none");
    if (header.version != kVersion)
      refuse("it is of version " + std::to_string(header.version) + ", this portlm reads " + std::to_string(kVersion));
    if (header.bytes != size_)
      refuse((size_ < header.bytes ? "truncated, it has " : "it has ") + std::to_string(size_) + " bytes and says " +
             std::to_string(header.bytes));
    if (header.layout > kTiles)
      refuse("its matrices are packed in layout " + std::to_string(header.layout) + ", which this portlm cannot read");
    need(all_zero(header.zeros, 7) && all_zero(header.more_zeros, 8) && header.vocabulary >= 1 && header.context >= 1 &&
             header.vocabulary <= kMaxSize && header.context <= kMaxSize,
         "header", 0);
    uint64_t end = kHeader;
    for (size_t t = 0; t < kTables; ++t) {
      const Known& known = kKnown[t];
      const Section& section = header.tables[t];
      if (section.count > known.most)
        refuse("it has " + std::to_string(section.count) + " " + known.name + ", at most " + std::to_string(known.most) +
               " may be");
      const uint64_t begin = aligned(end);
      if (section.offset != begin) refuse(std::string("its ") + known.name + " do not begin where they should");
      const uint64_t next = begin + section.count * known.item;  // at most 2^28
      if (next > size_) refuse(std::string("truncated, its ") + known.name + " end at byte " + std::to_string(next));
      gap(end, begin);
      end = next;
      tables_[t] = section;
    }
    end_ = end;
    return header;
  }

  template <typename Record>
  Record at(Table table, uint64_t index) const {
    Record record;
    if (index >= tables_[table].count) refuse(std::string("there are too few ") + kKnown[table].name);
    std::memcpy(&record, base_ + tables_[table].offset + index * sizeof(Record), sizeof(Record));
    return record;
  }

  uint64_t count(Table table) const { return tables_[table].count; }

  std::string name(Name name) const {
    const uint64_t all = tables_[kNames].count;
    if (name.length > kMaxName || name.offset > all || name.length > all - name.offset) refuse("a name is none of its names");
    copied_ += name.length;
    if (copied_ > kMaxCopied) refuse("its names are too long together");  // many may share the same bytes
    const unsigned char* text = base_ + tables_[kNames].offset + name.offset;
    if (!is_text(text, name.length)) refuse("a name is no text");
    return {reinterpret_cast<const char*>(text), name.length};
  }

  Shape shape(uint32_t first, uint8_t rank) const {
    if (rank > kMaxRank || first > count(kDims) || rank > count(kDims) - first) refuse("a shape is none of its dims");
    Shape shape;
    for (uint64_t i = first; i < uint64_t{first} + rank; ++i) {
      const auto dim = at<DimRecord>(kDims, i);
      const uint32_t symbols = dim.symbols;
      const bool one = symbols == kBatch || symbols == kSequence || symbols == kPast || symbols == kKept;
      const bool size = symbols == 0 && dim.size >= 1 && dim.size <= kMaxSize;
      need(dim.zero == 0 && (size || (dim.size == 0 && (one || symbols == (kPast | kSequence)))), "dim", i);
      shape.push_back({dim.size, symbols});
    }
    return shape;
  }

  // Where a tensor's data begins: right behind what was before it.
  const void* data(uint64_t offset, uint64_t bytes, uint64_t index) {
    const uint64_t begin = aligned(end_);
    need(offset == begin && bytes <= size_ && begin <= size_ - bytes, "tensor", index);
    gap(end_, begin);
    end_ = begin + bytes;
    return base_ + begin;
  }

  void finish() const {
    if (end_ != size_) refuse("it goes on behind its last tensor");
  }

 private:
  void gap(uint64_t begin, uint64_t end) const {
    for (uint64_t i = begin; i < end && i < size_; ++i)
      if (base_[i]) refuse("there is something between its parts");
  }

  const unsigned char* base_;
  uint64_t size_, end_ = 0;
  mutable uint64_t copied_ = 0;
  Section tables_[kTables] = {};
};

Dtype dtype_of(uint8_t code, const char* what, uint64_t index) {
  if (code == 3)
    refuse(std::string(what) + " " + std::to_string(index) + " is of type 3, which this portlm cannot read");
  need(code == 1 || code == 2, what, index);
  return static_cast<Dtype>(code);
}

bool is_quantized(Dtype dtype) { return dtype == Dtype::int4 || dtype == Dtype::int8; }

// The types that matrices alone have, and the others.
Dtype tensor_dtype_of(uint8_t code, uint64_t index) {
  const auto dtype = static_cast<Dtype>(code);
  return in_panels(dtype) || is_quantized(dtype) ? dtype : dtype_of(code, "tensor", index);
}

// Bytes of a matrix whose numbers are small, which packed_linear and packed_rows may be given after this.
uint64_t quantized_bytes(const TensorRecord& record, Dtype dtype, const Shape& shape, uint64_t index) {
  const uint8_t bits = dtype == Dtype::int4 ? 4 : 8;
  need(record.bits == bits && record.has_zeros <= 1, "tensor", index);
  need(record.group == 32 || record.group == 64 || record.group == 128, "tensor", index);
  const int64_t N = shape[0].size, K = shape[1].size;
  need(K % record.group == 0 && N <= kMaxSize && K <= kMaxSize && N * (K / 32) <= int64_t{1} << 36, "tensor", index);
  return static_cast<uint64_t>(kernels().packed_size(N, K, record.group, bits, record.has_zeros));
}

Tensor read_tensor(Reader& reader, uint64_t index) {
  const auto record = reader.at<TensorRecord>(kTensorTable, index);
  const Dtype dtype = tensor_dtype_of(record.dtype, index);
  Shape shape = reader.shape(record.dims, record.rank);
  need(record.zero == 0 && (dtype <= Dtype::int64 || shape.size() == 2), "tensor", index);
  for (const Dim& dim : shape) need(dim.symbols == 0, "tensor", index);
  uint64_t bytes = dtype == Dtype::int64 ? 8 : is_half(dtype) ? 2 : 4;
  if (is_quantized(dtype)) {
    bytes = quantized_bytes(record, dtype, shape, index);
  } else {
    need(record.bits == 0 && record.has_zeros == 0 && record.group == 0, "tensor", index);
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      const auto size = static_cast<uint64_t>(shape[axis].size);
      bytes *= in_panels(dtype) && axis == 0 ? aligned(size) : size;  // at most 2^44 * 2^31; panels have 64 rows
      need(bytes <= kMaxBytes, "tensor", index);
    }
  }
  need(record.bytes == bytes, "tensor", index);
  const void* data = reader.data(record.offset, bytes, index);
  return {reader.name(record.name), dtype, std::move(shape), data, record.group, record.has_zeros != 0};
}

// The place in each table from which the next role or step takes its part.
struct Places {
  uint64_t specs = 0, values = 0, steps = 0, operands = 0, ints = 0, reals = 0;
};

Spec read_spec(const Reader& reader, uint64_t index, bool is_state) {
  const auto record = reader.at<SpecRecord>(kSpecs, index);
  const auto kind = static_cast<uint8_t>(is_state);
  need(record.zero == 0 && record.initial == kind && record.update == kind && record.below <= uint64_t{kMaxSize}, "spec",
       index);
  Spec spec{reader.name(record.name),
            reader.name(record.output),
            record.value,
            is_state && record.dtype == 7 ? Dtype::bytes : dtype_of(record.dtype, "spec", index),
            reader.shape(record.dims, record.rank),
            static_cast<int64_t>(record.below)};
  need(!spec.name.empty() && spec.output.empty() != is_state, "spec", index);
  return spec;
}

Value read_value(const Reader& reader, const Role& role, uint64_t tensors, uint64_t index, uint64_t place) {
  const auto record = reader.at<ValueRecord>(kValues, place);
  const uint64_t given = role.inputs.size() + role.states.size();
  need(record.zero == 0 && record.last == 0, "value", place);
  Value value{reader.name(record.name), static_cast<Kind>(record.kind), Dtype::none, {}, 0};
  const Kind wanted = index < role.inputs.size() ? Kind::input : Kind::state;
  if (index < given)
    need(value.kind == wanted, "value", place);
  else
    need(value.kind == Kind::weight || value.kind == Kind::computed, "value", place);
  if (value.kind == Kind::computed) {
    need(record.tensor == 0, "value", place);
    value.dtype = dtype_of(record.dtype, "value", place);
    value.shape = reader.shape(record.dims, record.rank);
    for (const Dim& dim : value.shape) need(!(dim.symbols & kPast), "value", place);
  } else {
    need(record.dtype == 0 && record.rank == 0 && record.dims == 0, "value", place);
    need(value.kind == Kind::weight ? record.tensor < tensors : record.tensor == 0, "value", place);
    value.tensor = record.tensor;
  }
  return value;
}

Step read_step(const Reader& reader, uint64_t values, uint64_t index, Places& places) {
  const auto record = reader.at<StepRecord>(kSteps, index);
  need(all_zero(record.zeros, 3), "step", index);
  const auto last = static_cast<uint32_t>(Opcode::linear_a8);
  if (record.opcode < 1 || record.opcode > last)
    refuse("step " + std::to_string(index) + " has opcode " + std::to_string(record.opcode) +
           ", which this portlm cannot run");
  need(record.inputs <= 64 && record.outputs <= 64 && record.ints <= 64 && record.reals <= 64, "step", index);
  Step step{reader.name(record.name), static_cast<Opcode>(record.opcode), {}, {}, {}, {}};
  for (uint32_t i = 0; i < record.inputs + record.outputs; ++i) {
    const auto value = reader.at<uint32_t>(kOperands, places.operands++);
    const bool input = i < record.inputs;
    need(value < values || (input && value == kNone), "step", index);
    (input ? step.inputs : step.outputs).push_back(value);
  }
  for (uint32_t i = 0; i < record.ints; ++i) step.ints.push_back(reader.at<int64_t>(kInts, places.ints++));
  for (uint32_t i = 0; i < record.reals; ++i) {
    step.reals.push_back(reader.at<double>(kReals, places.reals++));
    need(std::isfinite(step.reals.back()), "step", index);
  }
  return step;
}

Role read_role(const Reader& reader, const std::vector<Tensor>& tensors, uint64_t index, Places& places) {
  const auto record = reader.at<RoleRecord>(kRoles, index);
  need(all_zero(record.zeros, 3), "role", index);
  Role role;
  role.name = reader.name(record.name);
  need(!role.name.empty(), "role", index);
  for (uint32_t i = 0; i < record.inputs; ++i) role.inputs.push_back(read_spec(reader, places.specs++, false));
  for (uint32_t i = 0; i < record.outputs; ++i) role.outputs.push_back(read_spec(reader, places.specs++, false));
  for (uint32_t i = 0; i < record.states; ++i) role.states.push_back(read_spec(reader, places.specs++, true));
  for (uint32_t i = 0; i < record.values; ++i)
    role.values.push_back(read_value(reader, role, tensors.size(), i, places.values++));
  const size_t given = role.inputs.size() + role.states.size();
  need(role.values.size() >= given, "role", index);
  for (size_t i = 0; i < given; ++i) {
    const Spec& spec = i < role.inputs.size() ? role.inputs[i] : role.states[i - role.inputs.size()];
    need(spec.value == i, "role", index);
    role.values[i].dtype = spec.dtype;
    role.values[i].shape = spec.shape;
  }
  for (Value& value : role.values) {
    if (value.kind != Kind::weight) continue;
    value.dtype = tensors[value.tensor].dtype;
    value.shape = tensors[value.tensor].shape;
  }
  for (const Spec& spec : role.outputs) {
    need(spec.value < role.values.size(), "role", index);
    const Value& value = role.values[spec.value];
    need(value.kind == Kind::computed && value.dtype == spec.dtype && value.shape == spec.shape, "role", index);
  }
  for (uint32_t i = 0; i < record.steps; ++i)
    role.steps.push_back(read_step(reader, role.values.size(), places.steps++, places));
  return role;
}

}  // namespace

std::unique_ptr<PackedFile> PackedFile::open(int descriptor, Status& status) {
  struct stat found;
  if (fstat(descriptor, &found) != 0 || !S_ISREG(found.st_mode)) {
    status = Status::failed("it is no regular file");
    return nullptr;
  }
  std::unique_ptr<PackedFile> file(new (std::nothrow) PackedFile);
  if (!file) {
    status = Status::failed("out of memory");
    return nullptr;
  }
  file->size_ = static_cast<size_t>(found.st_size);
  if (file->size_) {
    void* base = mmap(nullptr, file->size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (base == MAP_FAILED) {
      status = Status::failed("it cannot be mapped into memory");
      return nullptr;
    }
    file->base_ = static_cast<const unsigned char*>(base);
#ifdef MADV_HUGEPAGE
    madvise(base, file->size_, MADV_HUGEPAGE);  // what is not in memory yet is read in large pages, if the file system has any
#endif
    guard_last_page(file->base_, file->size_, true);
  }
  status = file->read();
  return status.ok() ? std::move(file) : nullptr;
}

PackedFile::~PackedFile() {
  if (!base_) return;
  guard_last_page(base_, size_, false);
  munmap(const_cast<unsigned char*>(base_), size_);
}

Status PackedFile::read() {
  try {
    Reader reader(base_, size_);
    const Header header = reader.header();
    vocabulary = header.vocabulary, context = header.context;
    bool tiles = false;
    for (uint64_t i = 0; i < reader.count(kTensorTable); ++i) {
      tensors.push_back(read_tensor(reader, i));
      tiles = tiles || is_quantized(tensors.back().dtype);
    }
    need(header.layout == (tiles ? kTiles : 0), "header", 0);
    reader.finish();
    Places places;
    for (uint64_t i = 0; i < reader.count(kRoles); ++i) roles.push_back(read_role(reader, tensors, i, places));
    const bool whole = places.specs == reader.count(kSpecs) && places.values == reader.count(kValues) &&
                       places.steps == reader.count(kSteps) && places.operands == reader.count(kOperands) &&
                       places.ints == reader.count(kInts) && places.reals == reader.count(kReals);
    if (!whole) refuse("its tables hold more than its roles use");
    return {};
  } catch (const Refused& refused) {
    return Status::failed(refused.why);
  } catch (const std::bad_alloc&) {
    return Status::failed("out of memory");
  }
}

bool PackedFile::rounds_to_bytes() const {
  for (const Role& role : roles)
    for (const Step& step : role.steps)
      if (step.opcode == Opcode::linear_a8) return true;
  return false;
}

std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (const Dim& dim : shape) {
    if (text.size() > 1) text += ", ";
    if (!dim.symbols) {
      text += std::to_string(dim.size);
      continue;
    }
    std::string sum;
    const char* const names[] = {"batch", "sequence", "past", "kept"};
    for (const uint32_t symbol : {2u, 0u, 1u, 3u})
      if (dim.symbols >> symbol & 1) sum += (sum.empty() ? "" : " + ") + std::string(names[symbol]);
    text += sum;
  }
  return text + ")";
}

}  // namespace portlm::run
