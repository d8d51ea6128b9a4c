"""Fused steps of a packed program beside the steps that they came from: the same numbers in fewer steps."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
kernels = pytest.importorskip("portlm._C", reason="portlm._C was not built")

from packable import PACKED  # noqa: E402

from portlm.compile.packed import lower  # noqa: E402
from portlm.compile.packed_file import write_packed  # noqa: E402
from portlm.compile.packed_fusion import Joins, fuse, without_unread  # noqa: E402
from portlm.compile.packed_weights import Weights  # noqa: E402
from portlm.compile.source import read_source  # noqa: E402
from portlm.quantization import at_activations  # noqa: E402

LENGTHS = (9, 4, 1)  # of the rows of a ragged batch, left-padded to the first
CUTS = (7, 8, 9)  # a prompt, which is all padding for the last row, and single tokens


def lowered(folder):
    """The steps of a decoder as they are lowered, and its weights."""
    model, manifest = read_source(folder, "decoder", "fused")
    weights = Weights(folder)
    return lower(model, "decoder", manifest.roles["decoder"], weights), weights.tensors, manifest.model


def fused(program, tensors):
    joins = Joins(list(tensors))
    (program,), tensors = without_unread([fuse(program, joins)], joins.tensors)
    return program, tensors


def answers(program, tensors, size, path, lengths):
    """Logits of every token of a ragged batch that is read in parts."""
    write_packed(path, [program], tensors, size.vocab_size, size.context_length)
    with path.open("rb") as opened:
        file = kernels.run.PackedFile(opened.fileno())
    role, B, total = file.open(0), len(lengths), lengths[0]
    ids = np.random.default_rng(1).integers(0, size.vocab_size, (B, total))
    mask = np.stack([[0] * (total - n) + [1] * n for n in lengths])
    given = {"input_ids": ids, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    cache, parts, start = role.start(B), [], 0
    for end in CUTS:
        arrays = {name: array[:, start:end] for name, array in given.items()}
        arrays |= {"attention_mask": mask[:, :end], "logits_to_keep": np.arange(end - start)}
        inputs = [np.ascontiguousarray(arrays[spec.name]) for spec in program.inputs]
        out = np.empty((B, end - start, size.vocab_size), np.float32)
        role.run(cache, end - start, end - start, [a.ctypes.data for a in inputs], [out.ctypes.data])
        parts.append(out)
        start = end
    return np.concatenate(parts, axis=1)


@pytest.fixture(scope="module")
def folders(exported, quantized):
    """Function: name -> artifact; "llama int4" is one with quantized weights."""

    def folder(name):
        return quantized(*name.split(), False) if " " in name else exported[name]

    return folder


NAMES = [*PACKED, "llama-one-kv-head", "llama-tied", "llama int4", "gpt_neox int8", "gpt2 int4"]


@pytest.mark.runs_kernel("cached_attention")
@pytest.mark.parametrize("lengths", [LENGTHS, (9,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fused_steps_give_the_same_bits(name, lengths, folders, tmp_path):
    """Of a prompt and of single tokens, one row and a ragged batch: only the order of calls changes, and no sum."""
    program, tensors, size = lowered(folders(name))
    plain = answers(program, tensors, size, tmp_path / "plain", lengths)
    found = answers(*fused(program, tensors), size, tmp_path / "fused", lengths)
    assert np.isfinite(plain).all()
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("gpt2", "linear 4, attention 1, add_layer_norm 2"),
        ("llama", "linear 4, heads 1, attention 1, swiglu 1, add_rms_norm 2"),
        ("llama int4", "linear 4, heads 1, attention 1, swiglu 1, add_rms_norm 2"),
        ("gpt_neox", "linear 4, heads 1, attention 1, layer_norm 1, add 1, add_layer_norm 1"),
    ],
)
def test_a_layer_has_so_many_steps(name, steps, folders):
    program, _ = fused(*lowered(folders(name))[:2])
    first, second = [i for i, step in enumerate(program.steps) if step.operation == "attention"][:2]
    found = Counter(step.operation for step in program.steps[first:second])
    assert found == {word: int(n) for word, n in (part.split() for part in steps.split(", "))}


@pytest.mark.runs_kernel("packed_linear_a8")
def test_products_with_activations_of_8_bits_are_joined_like_others(folders, tmp_path):
    folder = folders("llama int4")
    others, _ = fused(*lowered(folder)[:2])
    with at_activations("int8"):
        plain, tensors, size = lowered(folder)
    program, joined = fused(plain, tensors)
    kinds, wanted = (Counter(step.operation for step in p.steps) for p in (program, others))
    assert kinds["linear_a8"] == wanted["linear"] > 0
    assert kinds["linear"] == 0
    before = answers(plain, tensors, size, tmp_path / "plain.portlm", LENGTHS)
    assert np.array_equal(answers(program, joined, size, tmp_path / "fused.portlm", LENGTHS), before)


def test_the_weights_of_a_fused_file_are_those_of_the_plain_one(folders):
    """Joined ones take the place of their parts: none is there twice, and fewer panels are filled up."""
    program, tensors, _ = lowered(folders("llama"))
    _, joined = fused(program, tensors)
    rows, plain = (
        Counter(row.tobytes() for t in some for row in np.atleast_2d(t.read())) for some in (joined, tensors)
    )
    assert rows == plain
    assert sum(t.nbytes for t in joined) <= sum(t.nbytes for t in tensors)
    program, tensors, _ = lowered(folders("llama int4"))
    _, joined = fused(program, tensors)
    assert sum(t.nbytes for t in joined) == sum(t.nbytes for t in tensors)


def test_a_product_that_somebody_else_reads_stays_as_it_is(folders):
    program, tensors, _ = lowered(folders("llama"))
    gate = next(s for s in program.steps if s.operation == "swiglu").inputs[0]
    first = next(s for s in program.steps if s.operation == "rotary").inputs[0]
    for place in (gate, first):
        shown = replace(program, results=(*program.results, place))
        kept, _ = fused(shown, tensors)
        name = program.values[place].name
        assert kept.values[kept.results[-1]].name == name
        assert sum(name == kept.values[s.outputs[0]].name for s in kept.steps) == 1


def test_matrices_of_two_kinds_are_not_joined(folders):
    _, tensors, _ = lowered(folders("llama int4"))
    joins = Joins(tensors)
    matrix = next(i for i, t in enumerate(tensors) if t.layout and t.shape[0] % 16 == 0)
    tensors.append(replace(tensors[matrix], layout=tensors[matrix].layout._replace(group=64)))
    assert joins.fit([matrix, matrix])
    assert not joins.fit([matrix, len(tensors) - 1])
    tensors.append(replace(tensors[matrix], shape=(17, tensors[matrix].shape[1])))  # which ends inside a tile
    assert joins.fit([matrix, len(tensors) - 1])
    assert not joins.fit([len(tensors) - 1, matrix])
