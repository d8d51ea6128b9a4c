"""What every operator takes, gives and says, against all graphs that export and lowering write here.

No library is asked about a graph that ought to be refused: not all of them answer.
"""

import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from portlm.compile.check import OPERATORS, check_model
from portlm.compile.forms import WHOLE_OPS
from portlm.compile.onnx_reader import MalformedError, Message, read_onnx
from portlm.compile.ort_lowering import lower_model
from portlm.errors import FormatError

FAMILIES = ("gpt2", "llama", "gpt_neox")
VARIANTS = ("gpt2-erf", "gpt2-one-head", "llama-tied", "llama-one-kv-head")
KINDS = ("portable", "fused", "ort-cpu", "ort-vulkan")
CHECKER = onnx.checker.check_model


@pytest.fixture(scope="module")
def written(exported, tmp_path_factory):
    """Function: (model, kind) -> a graph as export or lowering writes it, and a path for it beside its weights."""
    folders = {}

    def graph(name, kind):
        if name not in folders:
            folders[name] = shutil.copytree(exported[name] / "onnx", tmp_path_factory.mktemp("graphs") / name)
        lowered = kind.startswith("ort-")
        profile = "fused" if lowered else kind
        model = onnx.load(folders[name] / f"decoder.{profile}.onnx", load_external_data=False)
        if lowered:
            model = lower_model(model, 48, kind.removeprefix("ort-"))
        return model, folders[name] / "mutant.onnx"

    return graph


@pytest.fixture(autouse=True)
def _no_other_library(monkeypatch):
    def asked(*arguments):
        pytest.fail("a graph was handed on that our own check ought to refuse")

    monkeypatch.setattr(onnx.checker, "check_model", asked)


def refused(model, path):
    """Whether our own check refuses a graph. Nobody else sees it."""
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        check_model(path)
    except FormatError:
        return True
    except pytest.fail.Exception:
        return False
    raise AssertionError("the guard above was not reached")


def changed(model, place, change):
    """A copy of a graph in which a node is changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    change(copy.graph.node[place])
    return copy


def places(model):
    """One place of each form of node: its operator, which inputs it has, how many outputs, and what it says."""
    found = {}
    for place, node in enumerate(model.graph.node):
        pattern = tuple(map(bool, node.input)), len(node.output), tuple(a.name for a in node.attribute)
        found.setdefault((node.domain, node.op_type, *pattern), place)
    return found.values()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES + VARIANTS)
def test_every_graph_that_is_written_is_accepted(written, monkeypatch, name, kind):
    monkeypatch.setattr(onnx.checker, "check_model", CHECKER)
    model, path = written(name, kind)
    path.write_bytes(model.SerializeToString(deterministic=True))
    assert check_model(path) == model


def form_of(model, node):
    """What a node may be: lowered graphs have a few operators on whole numbers, too."""
    whole = {
        value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.INT64
    }
    whole |= {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT64}
    whole |= {name for n in model.graph.node if n.op_type in ("Shape", "Sub") for name in n.output}
    forms = OPERATORS[node.domain]
    return (
        WHOLE_OPS.get(node.op_type) or forms[node.op_type] if node.input[0] in whole else forms[node.op_type]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_input_that_is_taken_away_added_or_left_out_is_refused(written, name, kind):
    model, path = written(name, kind)
    tried = 0
    for place in places(model):
        node = model.graph.node[place]
        form = form_of(model, node)
        least = sum(not operand.optional for operand in form.inputs)
        most = 64 if form.inputs[-1].many else len(form.inputs)
        for i, value in enumerate(node.input):
            if value:
                assert refused(changed(model, place, lambda n, i=i: n.input.__setitem__(i, "")), path), (
                    node,
                    i,
                )
                tried += 1
            if len(node.input) - 1 < least or node.op_type == "Split":
                assert refused(changed(model, place, lambda n, i=i: n.input.pop(i)), path), (node, i)
                tried += 1
        if len(node.input) + 1 > most:
            assert refused(changed(model, place, lambda n: n.input.append(n.input[0])), path), node
            tried += 1
        many = changed(model, place, lambda n: n.input.extend([n.input[0]] * 64))
        assert refused(many, path), node
    assert tried > 25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_attributes_and_types_that_do_not_belong_to_an_operator_are_refused(written, name, kind):
    model, path = written(name, kind)
    for place in places(model):
        node = model.graph.node[place]
        form = form_of(model, node)
        changes = [
            lambda n: n.output.append("one more"),
            lambda n: n.output.__delitem__(slice(None)),
            lambda n: n.output.__setitem__(0, ""),
            lambda n: n.output.__setitem__(0, "input_ids"),
            lambda n: n.input.__setitem__(0, "nowhere"),
            lambda n: n.input.__setitem__(0, n.output[0]),
            lambda n: n.attribute.append(helper.make_attribute("auto_pad", "VALID")),
        ]
        for i, attribute in enumerate(node.attribute):
            name = attribute.name
            if form.attributes[name].required:
                changes.append(lambda n, i=i: n.attribute.pop(i))
            for wrong in (2**40, float("inf"), "linear", [3, 3, 3], numpy_helper.from_array(np.zeros(1))):
                wrong = helper.make_attribute(name, wrong)
                changes.append(lambda n, i=i, wrong=wrong: n.attribute[i].CopyFrom(wrong))
            changes.append(lambda n, i=i: n.attribute.append(n.attribute[i]))
        for i, operand in enumerate(form.inputs[: len(node.input)]):
            other = {"float32": "input_ids", "int64": "past_key_values.0.key"}.get(operand.kind)
            if other:
                changes.append(lambda n, i=i, other=other: n.input.__setitem__(i, other))
            if operand.constant:  # int64, and not in the graph
                changes.append(lambda n, i=i: n.input.__setitem__(i, "input_ids"))
            if operand.absent:
                changes.append(lambda n, i=i: n.input.__setitem__(i, n.input[0]))
        for i, change in enumerate(changes):
            assert refused(changed(model, place, change), path), (node, i)


def constant(values):
    return numpy_helper.from_array(np.array(values, np.int64), "ours")


@pytest.mark.parametrize(
    ("operator", "values"),
    [
        ("Reshape", [0, -2, 4]),
        ("Reshape", [0, 2**40]),
        ("Reshape", [1] * 65),
        ("Reshape", [[0, -1]]),
        ("Unsqueeze", [8]),
        ("Unsqueeze", [-9]),
        ("ReduceMean", [100]),
        ("CumSum", 9),
        ("Split", [16, 16, 16, 16]),
        ("Split", [-16, 48]),
    ],
)
def test_numbers_that_no_shape_or_axis_has_are_refused(written, operator, values):
    model, path = written("gpt2" if operator == "Split" else "llama", "portable")
    place = next(i for i, n in enumerate(model.graph.node) if n.op_type == operator and len(n.input) == 2)
    model.graph.initializer.append(constant(values))
    assert refused(changed(model, place, lambda n: n.input.__setitem__(1, "ours")), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.initializer.append(g.initializer[0]),
        lambda g: g.input.append(g.input[0]),
        lambda g: g.output.append(g.output[0]),
        lambda g: g.output.append(g.input[0]),
        lambda g: g.output.add(name="nowhere").type.CopyFrom(g.output[0].type),
        lambda g: g.initializer.add(name="input_ids", data_type=TensorProto.INT64),
        lambda g: setattr(g.output[0].type.tensor_type, "elem_type", TensorProto.INT64),
        lambda g: setattr(g.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT),
        lambda g: setattr(g.input[0].type.tensor_type, "elem_type", TensorProto.STRING),
        lambda g: setattr(g.input[0].type.tensor_type.shape.dim[0], "dim_value", 0),
        lambda g: setattr(g.input[0].type.tensor_type.shape.dim[0], "dim_value", -1),
        lambda g: setattr(g.input[0].type.tensor_type.shape.dim[0], "dim_param", ""),
        lambda g: g.input[0].type.tensor_type.shape.dim.add(),
        lambda g: g.input[0].type.tensor_type.ClearField("shape"),
        lambda g: setattr(g.input[0], "doc_string", "x"),
        lambda g: setattr(g.input[0].type, "denotation", "x"),
        lambda g: g.input[0].type.sequence_type.elem_type.tensor_type.CopyFrom(g.input[0].type.tensor_type),
        lambda g: g.node.reverse(),
    ],
    ids=range(18),
)  # fmt: skip
def test_values_are_there_once_and_of_the_type_that_is_said(written, change):
    model, path = written("llama", "portable")
    if isinstance(model.graph.node, list):
        raise AssertionError
    change(model.graph)
    assert refused(model, path)


# --- the reader ---------------------------------------------------------------------------------------------


def same(read, known):
    """Whether what we read is what the package onnx reads."""
    fields = {field.name: value for field, value in known.ListFields()}
    for name in read.present | fields.keys():
        ours, theirs = getattr(read, name), fields[name]
        if isinstance(ours, Message):
            assert same(ours, theirs)
        elif isinstance(ours, list):
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert same(a, b) if isinstance(a, Message) else a == b
        else:
            assert ours == theirs
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reader_reads_what_onnx_reads(written, name, kind):
    model, _ = written(name, kind)
    assert same(read_onnx(model.SerializeToString(deterministic=True)), model)


UNKNOWN = b"\xa0\x06\x01"  # field 100 of a model: the number 1
VERSION = b"\x08\x09"  # ir_version, as it is at the beginning


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw + UNKNOWN,
        lambda raw: raw + VERSION,
        lambda raw: VERSION + raw,
        lambda raw: b"\x08\x89\x00" + raw[2:],  # 9 in two bytes
        lambda raw: b"\x88\x00\x09" + raw[2:],  # the key in two bytes
        lambda raw: raw[2:] + VERSION,
        lambda raw: raw + b"\x0b\x0c",  # a group, empty
        lambda raw: raw + b"\x7a\x00",  # field 15, empty
        lambda raw: raw + b"\xff" * 11,
        lambda raw: raw + b"\x72\x05\x0a",  # longer than what follows
        lambda raw: raw + b"\x72\x03\x0a\x01\xff",  # no UTF-8
    ],
    ids=range(11),
)
def test_bytes_that_another_reader_could_take_otherwise_are_refused(written, change):
    model, path = written("gpt2", "portable")
    raw = model.SerializeToString(deterministic=True)
    assert raw.startswith(VERSION)
    with pytest.raises(MalformedError):
        read_onnx(change(raw))
    path.write_bytes(change(raw))
    with pytest.raises(FormatError, match=r"mutant\.onnx: .*; export again"):
        check_model(path)


def test_a_file_of_millions_of_fields_is_refused_early(monkeypatch):
    from portlm.compile import onnx_reader

    monkeypatch.setattr(onnx_reader, "MAX_FIELDS", 1000)
    with pytest.raises(MalformedError, match="more than 1000 fields"):
        read_onnx(b"\x72\x00" * 1001)
