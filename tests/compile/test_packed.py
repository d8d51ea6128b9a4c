"""packed.portlm: what is written, and that a damaged file is refused or does no harm (docs/packed.md)."""

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packed_bytes import damage_everywhere, open_bytes, places

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
kernels = pytest.importorskip("portlm._C", reason="portlm._C was not built")

from packable import PACKED, UNPACKED  # noqa: E402

from portlm.artifact import read_manifest  # noqa: E402
from portlm.compile.packed import FILE, compile_packed, lower  # noqa: E402
from portlm.compile.packed_file import NONE, OPCODES, write_packed  # noqa: E402
from portlm.compile.packed_fusion import Joins, fuse, without_unread  # noqa: E402
from portlm.compile.packed_weights import Weights  # noqa: E402
from portlm.compile.source import read_source  # noqa: E402
from portlm.errors import EngineUnavailableError  # noqa: E402
from portlm.ops.narrow import ACTIVATIONS  # noqa: E402
from portlm.weights import load_numpy  # noqa: E402

HEADER = 256


@pytest.fixture(scope="module")
def written(packed):
    """The file of a small GPT-2."""
    return (packed["gpt2"] / FILE).read_bytes()


@pytest.mark.parametrize("family", PACKED)
def test_a_file_describes_its_roles_as_the_manifest_does(family, packed):
    manifest = read_manifest(packed[family])
    file = open_bytes((packed[family] / FILE).read_bytes(), packed[family].parent)
    ((name, inputs, outputs, states),) = file.roles()
    role = manifest.roles[name]
    assert [(i[0], i[2], i[3], i[4] or None) for i in inputs] == [
        (s.name, s.dtype, s.shape, s.below) for s in role.inputs
    ]
    assert [(o[0], o[2], o[3]) for o in outputs] == [(s.name, s.dtype, s.shape) for s in role.outputs]
    assert [s[:4] for s in states] == [(s.name, s.output, s.dtype, s.shape) for s in role.state]
    assert (file.vocabulary, file.context) == (manifest.model.vocab_size, manifest.model.context_length)


@pytest.mark.parametrize("family", PACKED)
def test_every_weight_is_there_once_and_can_be_read_by_the_document_alone(family, packed, checkpoints):
    """A tied table, too, and matrices that are one. The rotation's tables come on top, which no checkpoint holds."""
    raw = (packed[family] / FILE).read_bytes()
    names, dims, (table, count) = (place for place in places(raw)[:3])
    found = []
    for i in range(count):
        at, length, dtype, rank, _, _, _, first, _, offset, size = struct.unpack_from(
            "<2I4B3I2Q", raw, table + 40 * i
        )
        name = raw[names[0] + at : names[0] + at + length].decode()
        shape = [struct.unpack_from("<q", raw, dims[0] + 16 * d)[0] for d in range(first, first + rank)]
        array = np.frombuffer(raw, "<f4", size // 4, offset)
        if dtype == 6:
            panels = array.reshape(-1, shape[1], 64)
            array = panels.transpose(0, 2, 1).reshape(-1, shape[1])[: shape[0]]
        if "rotary_" not in name:
            found.append(array.ravel())
    unread = {"model.decoder.embed_positions.weight": 2}  # OPT's first rows, which no position has
    weights = load_numpy(checkpoints[family] / "model.safetensors")
    stored = [array[unread.get(name, 0) :].ravel() for name, array in weights.items()]
    np.testing.assert_array_equal(*(np.sort(np.concatenate(arrays)) for arrays in (found, stored)))


@pytest.mark.parametrize("exposed", [False, True])
def test_relu_goes_into_the_map_before_it_unless_that_is_asked_for(exposed, artifacts):
    folder = artifacts["opt"]
    (model, manifest), weights = read_source(folder, "decoder", "fused"), Weights(folder)
    sums = [node.input[0] for node in model.graph.node if node.op_type == "Relu"]
    program = lower(model, "decoder", manifest.roles["decoder"], weights, sums if exposed else ())
    maps = [step.ints for step in program.steps if step.operation == "linear"]
    assert maps.count((ACTIVATIONS.index("relu"),)) == len(sums) == 2
    assert len(maps) == 6 * 2 + 1 + (
        2 if exposed else 0
    )  # four of attention, two of the perceptron, and the head


def test_the_same_artifact_gives_the_same_bytes(artifacts, tmp_path):
    folder = shutil.copytree(artifacts["llama"], tmp_path / "model")
    first = compile_packed(folder, "cpu", "fused")
    raw = (folder / FILE).read_bytes()
    assert compile_packed(folder, "cpu", "fused") == first
    assert (folder / FILE).read_bytes() == raw
    assert first.files[FILE].size == len(raw)


def test_a_node_without_a_form_is_named(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    import portlm

    class Odd(torch.nn.Module):
        context_length = 16

        def __init__(self):
            super().__init__()
            self.tokens, self.head = torch.nn.Embedding(61, 32), torch.nn.Linear(32, 61)

        def forward(self, ids):
            return self.head(torch.sigmoid(self.tokens(ids)))

    with pytest.warns(UserWarning, match="without a cache"):
        folder = portlm.export(Odd(), tmp_path / "odd")
    with pytest.raises(
        EngineUnavailableError, match=r"node 'sigmoid' \(Sigmoid\) has no form in a packed file"
    ):
        compile_packed(folder, "cpu", "fused")
    assert not (folder / FILE).exists()
    from portlm.compile.build import build_choice

    said = []
    made = build_choice(folder, device="cpu", profile="fused", note=said.append)
    assert "packed" not in {entry.engine for entry in made}
    assert any("packed:cpu:fused left out" in line for line in said)


@pytest.mark.parametrize("family", UNPACKED)
def test_a_family_with_other_steps_is_refused_by_the_first_of_them(family, artifacts):
    node = UNPACKED[family]
    with pytest.raises(EngineUnavailableError, match=rf"node {node} has no form in a packed file"):
        compile_packed(artifacts[family], "cpu", "fused")


# --- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"\x00", "does not begin as a packed file does"),
        (8, b"\x01\x02\x03\x04", "of the other byte order"),
        (8, b"\x01\x02\x03\x05", "its mark of the byte order is none"),
        (12, b"\x01\x00\x00\x00", "of version 1, this portlm reads 2"),
        (24, b"\x02\x00\x00\x00", "packed in layout 2, which this portlm cannot read"),
        (24, b"\x01\x00\x00\x00", "header 0 says what cannot be"),
        (36, b"\x01", "header 0 says what cannot be"),
        (64, b"\x40", "names do not begin where they should"),
        (72, b"\xff" * 8, "has 18446744073709551615 names"),
        (252, b"\x01", "header 0 says what cannot be"),
    ],
)
def test_a_header_that_is_not_right_is_an_error_that_says_so(at, value, words, written, tmp_path):
    with pytest.raises(RuntimeError, match=words):
        open_bytes(written[:at] + value + written[at + len(value) :], tmp_path)


def test_a_file_that_is_cut_anywhere_is_refused(written, tmp_path):
    for size in [*range(0, len(written), 64), len(written) - 1]:
        with pytest.raises(RuntimeError, match="truncated"):
            open_bytes(written[:size], tmp_path)
        cut = bytearray(written[:size])
        if size >= HEADER:  # one that says of itself that it is as long as it is
            struct.pack_into("<Q", cut, 16, size)
            with pytest.raises(RuntimeError):
                open_bytes(bytes(cut), tmp_path)
    with pytest.raises(RuntimeError, match="it has"):
        open_bytes(written + b"\0", tmp_path)


def test_a_tensor_of_a_reserved_type_says_so(written, tmp_path):
    (offset, _) = places(written)[2]
    raw = bytearray(written)
    raw[offset + 8] = 3
    with pytest.raises(RuntimeError, match="tensor 0 is of type 3, which this portlm cannot read"):
        open_bytes(bytes(raw), tmp_path)


@pytest.fixture(scope="module")
def small(quantized, tmp_path_factory):
    """Function (family, numbers, asymmetric) -> the artifact with quantized weights, and its packed file."""
    made = {}

    def packed(family, numbers, asymmetric=False):
        key = (family, numbers, asymmetric)
        if key not in made:
            folder = tmp_path_factory.mktemp("small") / "model"
            made[key] = shutil.copytree(quantized(*key), folder)
            compile_packed(folder, "cpu", "fused")
        return made[key]

    return packed


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("numbers", ["int4", "int8", "int8 asymmetric"])
def test_a_quantized_file_holds_each_matrix_once_as_the_kernel_reads_it(family, numbers, small):
    """Group 32: half a byte or one for a weight, 2 for each scale, 1 for each zero point, in whole tiles of 16 rows."""
    raw = (small(family, numbers[:4], "asymmetric" in numbers) / FILE).read_bytes()
    assert raw[24] == 1
    _, dims, (table, count) = places(raw)[:3]
    found = 0
    for i in range(count):
        _, _, dtype, rank, bits, zeros, group, first, _, _, size = struct.unpack_from(
            "<2I4B3I2Q", raw, table + 40 * i
        )
        if dtype in (4, 5):
            N, K = (struct.unpack_from("<q", raw, dims[0] + 16 * d)[0] for d in (first, first + 1))
            assert (rank, bits, zeros, group) == (2, int(numbers[3]), int("asymmetric" in numbers), 32)
            tile = K // 32 * (16 * 32 * bits // 8 + 16 * 2 + 16 * zeros)
            assert size == -(-N // 16) * (-(-tile // 64) * 64)
            found += 1
        else:
            assert (dtype, bits, zeros, group) == (1, 0, 0, 0)
    assert found == {"gpt2": 9, "llama": 10, "gpt_neox": 10}[family]


@pytest.mark.parametrize(
    ("at", "value"),
    [(10, 8), (10, 0), (11, 2), (12, 16), (12, 0), (8, 5), (9, 1), (32, 0), (8, 6), (8, 1)],
    ids=str,
)
def test_numbers_of_a_quantized_matrix_that_do_not_fit_are_refused(at, value, small, tmp_path):
    raw = bytearray((small("llama", "int4", False) / FILE).read_bytes())
    (table, count) = places(raw)[2]
    place = next(table + 40 * i for i in range(count) if raw[table + 40 * i + 8] == 4)
    raw[place + at] = value
    with pytest.raises(RuntimeError, match="tensor"):
        open_bytes(bytes(raw), tmp_path)


# The reader knows steps and tables, and no family: learned positions, rotations, ReLU, quantized matrices.
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "llama int4", "gpt2 int8"])
def test_damaged_headers_and_tables_are_refused_or_harmless(family, packed, small, tmp_path):
    """In a process of its own, which a read outside of memory would end."""
    path = tmp_path / FILE
    folder = small(*family.split(), asymmetric=True) if " " in family else packed[family]
    path.write_bytes((folder / FILE).read_bytes())
    damage_everywhere(path)


# --- files that are well formed, of programs that are not ------------------------------------------------


@pytest.fixture(scope="module")
def program(packed):
    """The steps of a small LLaMA as they are lowered, and its weights."""
    folder = packed["llama"]
    model, manifest = read_source(folder, "decoder", "fused")
    weights = Weights(folder)
    return lower(model, "decoder", manifest.roles["decoder"], weights), weights.tensors


@pytest.fixture(scope="module")
def fused_program(program):
    """The same in fewer steps."""
    joins = Joins(list(program[1]))
    (steps,), tensors = without_unread([fuse(program[0], joins)], joins.tensors)
    return steps, tensors


def step_of(program, operation):
    return next(i for i, step in enumerate(program.steps) if step.operation == operation)


def changed(program, kind, **fields):
    """The program with the first step of a kind changed; a function of the step gives each new field."""
    place = step_of(program, kind)
    step = program.steps[place]
    new = replace(step, **{name: make(step) for name, make in fields.items()})
    return replace(program, steps=(*program.steps[:place], new, *program.steps[place + 1 :]))


def value(program, kind):
    return next(i for i, v in enumerate(program.values) if v.kind == kind)


LARGE = 2**62
WRONG = {
    "more heads than columns": lambda p: changed(p, "rotary", ints=lambda s: (LARGE, 0)),
    "no heads": lambda p: changed(p, "rotary", ints=lambda s: (0, 0)),
    "heads below zero": lambda p: changed(p, "rotary", ints=lambda s: (-4, 0)),
    "columns behind the last": lambda p: changed(p, "rotary", ints=lambda s: (s.ints[0], 8)),
    "columns before the first": lambda p: changed(p, "rotary", ints=lambda s: (s.ints[0], -8)),
    "a column far away": lambda p: changed(p, "attention", ints=lambda s: (*s.ints[:4], 2**63 - 1)),
    "more query heads than columns": lambda p: changed(p, "attention", ints=lambda s: (8, *s.ints[1:])),
    "heads that are shared unevenly": lambda p: changed(p, "attention", ints=lambda s: (3, *s.ints[1:])),
    "another number of key heads": lambda p: changed(p, "attention", ints=lambda s: (4, 4, *s.ints[2:])),
    "one state for keys and values": lambda p: changed(
        p, "attention", inputs=lambda s: (*s.inputs[:3], s.inputs[3], s.inputs[3], s.inputs[5])
    ),
    "no state": lambda p: changed(p, "attention", inputs=lambda s: (*s.inputs[:3], NONE, *s.inputs[4:])),
    "a weight in place of a state": lambda p: changed(
        p, "attention", inputs=lambda s: (*s.inputs[:3], value(p, 3), *s.inputs[4:])
    ),
    "ids in place of a mask": lambda p: changed(p, "attention", inputs=lambda s: (*s.inputs[:5], 0)),
    "a value that comes later": lambda p: changed(
        p, "rms_norm", inputs=lambda s: (p.steps[-1].outputs[0], s.inputs[1])
    ),
    "its own output": lambda p: changed(p, "rms_norm", inputs=lambda s: (s.outputs[0], s.inputs[1])),
    "a value that is known": lambda p: changed(p, "rms_norm", outputs=lambda s: p.steps[0].outputs),
    "an input as output": lambda p: changed(p, "rms_norm", outputs=lambda s: (0,)),
    "a weight as output": lambda p: changed(p, "rms_norm", outputs=lambda s: (value(p, 3),)),
    "no epsilon": lambda p: changed(p, "rms_norm", reals=lambda s: ()),
    "an activation that there is not": lambda p: changed(p, "linear", ints=lambda s: (5,)),
    "a matrix that is not in panels": lambda p: changed(
        p, "linear", inputs=lambda s: (s.inputs[0], p.steps[1].inputs[1], NONE)
    ),
    "activations of 8 bits for a float32 matrix": lambda p: changed(
        p, "linear", operation=lambda s: "linear_a8"
    ),
    "too few inputs": lambda p: changed(p, "linear", inputs=lambda s: s.inputs[:1]),
    "a matrix of another size": lambda p: changed(
        p, "linear", inputs=lambda s: (s.inputs[0], p.steps[0].inputs[1], NONE)
    ),
    "a matrix as bias": lambda p: changed(p, "linear", inputs=lambda s: (*s.inputs[:2], s.inputs[1])),
    "a mask in place of ids": lambda p: changed(p, "embedding", inputs=lambda s: (1, s.inputs[1])),
    "floats in place of ids": lambda p: changed(p, "embedding", inputs=lambda s: (s.inputs[1], s.inputs[1])),
    "tokens in place of places": lambda p: changed(p, "rows", inputs=lambda s: (s.inputs[0], 0)),
    "another operation": lambda p: changed(p, "swiglu", operation=lambda s: "concat"),
    "a step less": lambda p: replace(p, steps=p.steps[:-1]),
    "a state that nothing reads": lambda p: replace(
        p, steps=tuple(s for i, s in enumerate(p.steps) if i != step_of(p, "attention"))
    ),
    "a view of more elements": lambda p: changed(
        p, "embedding", operation=lambda s: "view", inputs=lambda s: s.inputs[:1]
    ),
    "a slice that is too wide": lambda p: changed(
        p, "rms_norm", operation=lambda s: "slice", inputs=lambda s: s.inputs[:1], ints=lambda s: (1,),
        reals=lambda s: (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_step_that_does_not_fit_its_values_is_refused(case, program, tmp_path):
    good, tensors = program
    path = tmp_path / FILE
    write_packed(path, [good], tensors, 257, 48)
    open_bytes(path.read_bytes(), tmp_path).open(0)
    write_packed(path, [WRONG[case](good)], tensors, 257, 48)
    with pytest.raises(RuntimeError, match=r"step|computes|reads|says what cannot be"):
        open_bytes(path.read_bytes(), tmp_path).open(0)


def part(place, number):
    """Function of a step: its ints, one of them changed."""
    return lambda s: (*s.ints[:place], number, *s.ints[place + 1 :])


FUSED_WRONG = {
    "heads that are wider than what is turned": lambda p: changed(p, "heads", ints=part(0, 1)),
    "heads of no width": lambda p: changed(p, "heads", ints=part(0, 0)),
    "heads as wide as memory": lambda p: changed(p, "heads", ints=part(0, LARGE)),
    "no heads": lambda p: changed(p, "heads", ints=part(1, 0)),
    "more heads than there are": lambda p: changed(p, "heads", ints=part(1, 2**31)),
    "more heads than memory": lambda p: changed(p, "heads", ints=part(5, LARGE)),
    "columns before the first": lambda p: changed(p, "heads", ints=part(2, -1)),
    "columns behind the last": lambda p: changed(p, "heads", ints=part(6, 2**31)),
    "heads over each other": lambda p: changed(p, "heads", ints=part(3, 1)),
    "heads far apart": lambda p: changed(p, "heads", ints=part(3, 2**31)),
    "heads farther apart": lambda p: changed(p, "heads", ints=part(7, 2**63 - 1)),
    "neither turned nor not": lambda p: changed(p, "heads", ints=part(4, 2)),
    "half a part": lambda p: changed(p, "heads", ints=lambda s: s.ints[:-2]),
    "no parts": lambda p: changed(p, "heads", ints=lambda s: s.ints[:1]),
    "a part more": lambda p: changed(p, "heads", ints=lambda s: (*s.ints, 1, 0, s.ints[0], 0)),
    "ids of another shape as positions": lambda p: changed(
        p, "heads", inputs=lambda s: (s.inputs[0], 3, *s.inputs[2:])
    ),
    "no table": lambda p: changed(p, "heads", inputs=lambda s: (*s.inputs[:3], NONE)),
    "a table of another size": lambda p: changed(
        p, "heads", inputs=lambda s: (*s.inputs[:3], p.steps[0].inputs[1])
    ),
    "a state in place of a product": lambda p: changed(
        p, "heads", inputs=lambda s: (value(p, 2), *s.inputs[1:])
    ),
    "one half": lambda p: changed(p, "swiglu", inputs=lambda s: p.steps[1].outputs),
    "halves of ids": lambda p: changed(p, "swiglu", inputs=lambda s: (0,)),
    "three inputs": lambda p: changed(p, "swiglu", inputs=lambda s: s.inputs * 3),
    "no inputs": lambda p: changed(p, "swiglu", inputs=lambda s: ()),
}


@pytest.mark.parametrize("case", FUSED_WRONG)
def test_a_fused_step_that_does_not_fit_its_values_is_refused(case, fused_program, tmp_path):
    good, tensors = fused_program
    path = tmp_path / FILE
    write_packed(path, [good], tensors, 257, 48)
    open_bytes(path.read_bytes(), tmp_path).open(0)
    write_packed(path, [FUSED_WRONG[case](good)], tensors, 257, 48)
    with pytest.raises(RuntimeError, match=r"step"):
        open_bytes(path.read_bytes(), tmp_path).open(0)


def test_every_step_is_of_a_kind_that_the_document_lists():
    text = (Path(__file__).parents[2] / "docs" / "packed.md").read_text()
    for name, number in OPCODES.items():
        title = name.replace("add_layer", "add, layer").replace("add_rms", "add, rms").replace("_", " ")
        assert f"| {number} | {title} |" in text


@pytest.mark.parametrize("kind", ["program", "fused_program"])
def test_ids_and_places_outside_of_their_tables_are_errors_and_the_state_stays(kind, request, tmp_path):
    good, tensors = request.getfixturevalue(kind)
    path = tmp_path / FILE
    write_packed(path, [good], tensors, 257, 48)
    role = open_bytes(path.read_bytes(), tmp_path).open(0)
    cache, out = role.start(1), np.empty((1, 1, 257), np.float32)
    fine = {"ids": 3, "mask": 1, "position": 0, "place": 0}
    for name, wrong in (
        ("ids", 257),
        ("ids", -1),
        ("position", 48),
        ("position", -1),
        ("place", 1),
        ("place", -1),
    ):
        arrays = [np.full((1,) if key == "place" else (1, 1), wrong if key == name else number)
                  for key, number in fine.items()]  # fmt: skip
        with pytest.raises(RuntimeError, match=f"must be from 0 to .*, got {wrong}"):
            role.run(cache, 1, 1, [a.ctypes.data for a in arrays], [out.ctypes.data])
        assert cache.past == 0
