// The packed file's runner for Python: addresses and sizes in, nothing of numpy. portlm.runtimes.packed sees to it that
// arrays are as large as the role says.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "python/run.h"
#include "run/generate.h"
#include "run/packed_file.h"
#include "run/program.h"
#include "run/state.h"

namespace py = pybind11;

namespace {

using portlm::run::Cache;
using portlm::run::Choice;
using portlm::run::Dim;
using portlm::run::Dtype;
using portlm::run::Extents;
using portlm::run::Generator;
using portlm::run::Limits;
using portlm::run::PackedFile;
using portlm::run::Program;
using portlm::run::Role;
using portlm::run::Spec;
using portlm::run::Status;

void expect(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

py::tuple shape_of(const Spec& spec) {
  py::list sizes;
  for (const Dim& dim : spec.shape) {
    if (dim.symbols)
      sizes.append(portlm::run::text_of({dim}).substr(1, portlm::run::text_of({dim}).size() - 2));
    else
      sizes.append(dim.size);
  }
  return py::tuple(sizes);
}

const char* name_of(Dtype dtype) {
  return dtype == Dtype::float32 ? "float32" : dtype == Dtype::bytes ? "int8" : "int64";
}

// (name, output, dtype, shape, below) of each
py::list specs(const std::vector<Spec>& specs) {
  py::list all;
  for (const Spec& spec : specs)
    all.append(py::make_tuple(spec.name, spec.output, name_of(spec.dtype), shape_of(spec), spec.below));
  return all;
}

// A program with what it needs to write whole texts, if it can.
struct Runner {
  std::unique_ptr<Program> program;
  std::unique_ptr<Generator> generator;
};

std::unique_ptr<Runner> open_role(const PackedFile& file, size_t role) {
  Status status;
  auto runner = std::make_unique<Runner>();
  runner->program = Program::make(file, role, status);
  expect(status);
  Status unable;
  runner->generator = Generator::make(*runner->program, unable);
  return runner;
}

template <typename T>
std::vector<T> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<T> all;
  for (const uintptr_t address : addresses) all.push_back(reinterpret_cast<T>(address));
  return all;
}

void call(Runner& runner, Cache& cache, int64_t sequence, int64_t kept, const std::vector<uintptr_t>& inputs,
          const std::vector<uintptr_t>& outputs) {
  const Role& role = runner.program->role();
  if (inputs.size() != role.inputs.size() || outputs.size() != role.outputs.size())
    throw py::value_error("another number of inputs or outputs");
  const auto in = pointers<const void*>(inputs);
  const auto out = pointers<void*>(outputs);
  Status status;
  {
    const py::gil_scoped_release release;
    status = runner.program->run({cache.rows(), sequence, cache.past(), kept}, in.data(), out.data(), cache);
  }
  expect(status);
}

// How probable tokens are, one for each that the role answers, instead of its logits: see Program::run.
void score(Runner& runner, Cache& cache, int64_t sequence, int64_t kept, const std::vector<uintptr_t>& inputs,
           uintptr_t targets, uintptr_t parts) {
  if (inputs.size() != runner.program->role().inputs.size() || !runner.program->has_head())
    throw py::value_error("another number of inputs, or a role without a head");
  const auto in = pointers<const void*>(inputs);
  void* const none[] = {nullptr};
  const portlm::run::Question question{reinterpret_cast<const int64_t*>(targets), runner.program->head_width(),
                                       reinterpret_cast<double*>(parts)};
  Status status;
  {
    const py::gil_scoped_release release;
    status = runner.program->run({cache.rows(), sequence, cache.past(), kept}, in.data(), none, cache, &question);
  }
  expect(status);
}

using Settings = std::tuple<double, int64_t, double, double, uint64_t, uint64_t, uint64_t>;

// Returns the number of tokens that each row got, and the row whose logits are no numbers or -1.
std::pair<int64_t, int64_t> advance(Runner& runner, Cache& cache, uintptr_t lengths, uintptr_t tokens,
                                    const std::vector<Settings>& rows, int64_t vocabulary, std::vector<int64_t> ends,
                                    int64_t count, double seconds, uintptr_t made) {
  if (!runner.generator || static_cast<int64_t>(rows.size()) != cache.rows() || count < 1)
    throw py::value_error("the role, the rows or the count do not fit");
  std::vector<Choice> choices;
  for (const auto& [temperature, top_k, top_p, min_p, seed, stream, step] : rows)
    choices.push_back({temperature, top_k, top_p, min_p, seed, stream, step});
  std::sort(ends.begin(), ends.end());
  const Limits limits{vocabulary, std::move(ends), count, seconds};
  std::pair<int64_t, int64_t> result;
  Status status;
  {
    const py::gil_scoped_release release;
    status = runner.generator->run(cache, reinterpret_cast<int64_t*>(lengths), reinterpret_cast<int64_t*>(tokens), choices,
                                   limits, reinterpret_cast<int64_t*>(made), result.first, result.second);
  }
  expect(status);
  return result;
}

}  // namespace

void bind_run(py::module_& m) {
  py::class_<Cache>(m, "Cache")
      .def_property_readonly("rows", &Cache::rows)
      .def_property_readonly("past", &Cache::past)
      .def("reorder", [](Cache& cache, const std::vector<int64_t>& rows, int64_t skip) { expect(cache.reorder(rows, skip)); })
      .def("crop", &Cache::crop)
      .def("join", [](Cache& cache, const std::vector<const Cache*>& others) { expect(cache.join(others)); })
      .def("copy_to", [](const Cache& cache, Cache& twin) { expect(cache.copy_to(twin)); })
      // (slots, addresses of all states), (number of a state, address): what the states of the role's specs hold
      .def("fill",
           [](Cache& cache, int64_t slots, const std::vector<uintptr_t>& states) {
             if (slots < 0 || states.size() != cache.tensors()) throw py::value_error("another number of states");
             expect(cache.fill(slots, pointers<const void*>(states)));
           })
      .def("read", [](const Cache& cache, size_t tensor, uintptr_t to) {
        if (tensor >= cache.tensors()) throw py::value_error("there is no such state");
        cache.read(tensor, reinterpret_cast<void*>(to));
      });
  py::class_<Runner>(m, "Role")
      .def("start", [](const Runner& runner, int64_t rows) { return std::make_unique<Cache>(runner.program->heads(), rows); })
      .def("run", &call)
      .def("score", &score)
      .def("advance", &advance)
      .def_property_readonly("can_score", [](const Runner& runner) { return runner.program->has_head(); })
      // floats of the memory that logits which nobody asked for were in
      .def_property_readonly("head_scratch", [](const Runner& runner) { return runner.program->head_scratch(); })
      .def_property_readonly("steps", [](const Runner& runner) { return runner.program->role().steps.size(); })
      .def("watch", [](Runner& runner) { runner.program->watch(); })
      // (name, opcode, nanoseconds) of each step
      .def("times",
           [](const Runner& runner) {
             py::list all;
             const auto& steps = runner.program->role().steps;
             for (size_t s = 0; s < runner.program->least().size(); ++s)
               all.append(py::make_tuple(steps[s].name, static_cast<uint32_t>(steps[s].opcode), runner.program->least()[s]));
             return all;
           })
      .def_property_readonly("can_advance", [](const Runner& runner) { return runner.generator != nullptr; })
      .def("logits", [](const Runner& runner) { return reinterpret_cast<uintptr_t>(runner.generator->logits()); });
  py::class_<PackedFile>(m, "PackedFile", "A packed.portlm, mapped and checked (docs/packed.md).")
      .def(py::init([](int descriptor) {
        Status status;
        auto file = PackedFile::open(descriptor, status);
        expect(status);
        return file;
      }))
      .def_property_readonly("vocabulary", [](const PackedFile& file) { return file.vocabulary; })
      .def_property_readonly("context", [](const PackedFile& file) { return file.context; })
      .def_property_readonly("rounds_to_bytes", &PackedFile::rounds_to_bytes)
      .def("roles",
           [](const PackedFile& file) {
             py::list all;
             for (const Role& role : file.roles)
               all.append(py::make_tuple(role.name, specs(role.inputs), specs(role.outputs), specs(role.states)));
             return all;
           })
      .def("open", &open_role, py::keep_alive<0, 1>());
}
