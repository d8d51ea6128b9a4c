"""Artifacts with quantized weights: what is in them, what is refused, and graphs whose sizes lie."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from portlm.artifact import check_files, read_manifest, replace, write_manifest
from portlm.compile import export as exporting
from portlm.compile.check import check_model
from portlm.compile.export import export, export_module
from portlm.compile.isolated import ensure_checked, weights_of
from portlm.compile.ort_lowering import lower_model
from portlm.compile.quantize import RoundToNearest, Scheme, dequantize, pack, quantize
from portlm.compile.source import read_source
from portlm.compile.tables import table_limits
from portlm.errors import FormatError, StorageError, UsageError
from portlm.models import load_model

FAMILIES = ("gpt2", "llama", "gpt_neox")
NUMBERS = [("int4", False), ("int4", True), ("int8", False), ("int8", True)]


def graph(folder, profile="fused"):
    return onnx.load(folder / f"onnx/decoder.{profile}.onnx", load_external_data=False)


def matrices(folder):
    """Name in the files -> every matrix of a linear map and token table of a checkpoint, in PyTorch's orientation."""
    model = load_model(folder)
    found = {
        model.hf_name(name)[0]: p.detach().numpy() for name, p in model.named_parameters() if p.dim() == 2
    }
    return {name: array for name, array in found.items() if "wpe" not in name}  # positions are no tokens


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize(("bits", "asymmetric"), NUMBERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_and_the_token_table_are_quantized_and_nothing_else(
    divisible, quantized, family, bits, asymmetric, profile
):
    folder, wanted = quantized(family, bits, asymmetric), matrices(divisible[family])
    scheme = Scheme(4 if bits == "int4" else 8, 32, not asymmetric)
    external = {t.name: t for t in graph(folder, profile).graph.initializer if t.external_data}
    small = {name: t for name, t in external.items() if t.data_type == TensorProto.UINT8}
    parts = ("q", "zero") if asymmetric else ("q",)
    assert small.keys() == {f"{name}.{part}" for name in wanted for part in parts}
    assert not wanted.keys() & external.keys()
    for name, weight in wanted.items():
        numbers = quantize(name, np.ascontiguousarray(weight), RoundToNearest(scheme))
        read = numpy_helper.to_array(small[f"{name}.q"], str(folder / "onnx"))
        assert np.array_equal(read, pack(numbers.q, scheme))
        scale = numpy_helper.to_array(external[f"{name}.scale"], str(folder / "onnx"))
        assert np.array_equal(scale, numbers.scale)
    assert check_model(folder / f"onnx/decoder.{profile}.onnx")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_graph_has_one_node_for_each_use_of_a_matrix(quantized, family):
    """The perceptron of GPT-2 and GPT-NeoX becomes two, the first of which has its activation."""
    nodes = [n for n in graph(quantized(family, "int4")).graph.node if n.domain == "ai.portlm"]
    kinds = [n.op_type for n in nodes]
    assert kinds.count("QuantizedEmbedding") == 1
    assert kinds.count("Embedding") == (family == "gpt2")  # of positions
    assert not {"Linear", "GeluMlp"} & set(kinds)
    layers, per_layer = 2, {"gpt2": 4, "gpt_neox": 4, "llama": 7}[family]
    assert kinds.count("QuantizedLinear") == layers * per_layer + 1
    activations = [a.s for n in nodes for a in n.attribute if a.name == "activation"]
    assert activations == {"gpt2": [b"gelu_tanh"], "gpt_neox": [b"gelu"], "llama": []}[family] * layers


def test_a_tied_table_is_stored_once_and_read_by_both(quantized):
    model = graph(quantized("gpt2", "int4"))
    name = "transformer.wte.weight.q"
    assert [t.name for t in model.graph.initializer].count(name) == 1
    assert [n.op_type for n in model.graph.node if name in n.input] == [
        "QuantizedEmbedding",
        "QuantizedLinear",
    ]


def test_the_manifest_says_what_the_weights_are_and_an_older_portlm_refuses_the_folder(quantized):
    folder = quantized("llama", "int4", True)
    manifest = check_files(folder)
    said = manifest.quantization
    assert (said.bits, said.group, said.symmetric, said.method) == (4, 32, False, "round to nearest")
    types = set(manifest.roles["decoder"].dtypes.items())
    assert {kind for _, kind in types} == {"uint8"}
    assert len(types) == 2 * sum(n.name.endswith(".scale") for n in graph(folder).graph.initializer)
    assert "model.safetensors" not in manifest.files
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 3  # 2 is without


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_an_artifact_takes_little_more_than_its_numbers(divisible, tmp_path, bits):
    """Bits for each weight, a scale of 4 bytes for each group, and float32 for the rest."""
    folder = export(divisible["gpt2"], tmp_path / "out", quantize=bits, group=32, profiles=["fused"])
    count = sum(array.size for array in matrices(divisible["gpt2"]).values())
    rest = sum(p.numel() for p in load_model(divisible["gpt2"]).parameters()) - count
    expected = count * (int(bits[3:]) / 8 + 4 / 32) + 4 * rest
    size = (folder / "onnx/decoder.onnx.data").stat().st_size
    assert expected <= size <= expected + 64 * 64  # each begins at a multiple of 64 bytes


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_same_checkpoint_gives_the_same_bytes(divisible, quantized, tmp_path, asymmetric):
    again = export(divisible["llama"], tmp_path / "again", quantize="int4", group=32, asymmetric=asymmetric)
    first = quantized("llama", "int4", asymmetric)
    assert (again / "manifest.json").read_bytes() == (first / "manifest.json").read_bytes()


def test_a_quantizer_sees_every_matrix_once_under_the_name_of_its_parameter(divisible, tmp_path, monkeypatch):
    """Whoever chooses otherwise takes the place of round to nearest, and nothing else changes."""
    model = load_model(divisible["gpt_neox"])
    seen = {}

    class Watching(RoundToNearest):
        method = "watching"

        def __call__(self, name, weight):
            assert name not in seen
            seen[name] = np.array(weight)
            return super().__call__(name, weight)

    monkeypatch.setattr(exporting, "RoundToNearest", Watching)
    folder = export_module(model, tmp_path / "out", quantize="int8", group=32)
    parameters = dict(model.named_parameters())
    assert len(seen) == len(matrices(divisible["gpt_neox"]))
    assert all(np.array_equal(weight, parameters[name].detach()) for name, weight in seen.items())
    assert read_manifest(folder).quantization.method == "watching"


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group": 32}, "say int8 or int4 as well"),
        ({"asymmetric": True}, "say int8 or int4 as well"),
        ({"quantize": "int3"}, "quantize must be int8 or int4, got 'int3'"),
        ({"quantize": 4}, "quantize must be int8 or int4, got 4"),
        ({"quantize": "int4", "group": 48}, "group must be one of 32, 64, 128, got 48"),
        ({"quantize": "int4", "group": 32.0}, "group must be one of"),
        ({"quantize": "int4", "asymmetric": "no"}, "asymmetric must be"),
        ({"quantize": "int4", "group": 64}, r"wte\.weight has 96 inputs, .* choose 32"),
        ({"quantize": "int4"}, r"has 96 inputs, which groups of 64 do not divide"),
    ],
    ids=range(9),
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(divisible, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        export(divisible["gpt2"], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_quantizing_twice_is_refused(quantized, divisible, tmp_path):
    folder = quantized("gpt2", "int4")
    for options in ({"quantize": "int8", "group": 32}, {}):
        with pytest.raises(UsageError, match=r"artifact with quantized weights.* give its checkpoint"):
            export(folder, tmp_path / "out", **options)
    checkpoint = shutil.copytree(divisible["gpt2"], tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="quantized already, give those before"):
        export(checkpoint, tmp_path / "out", quantize="int4", group=32)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named_before_anything_is_written(divisible, tmp_path):
    model = load_model(divisible["llama"])
    with torch.no_grad():
        model.get_parameter(_last_matrix(model))[0, 0] = float("nan")
    with pytest.raises(FormatError, match=rf"{_last_matrix(model)} holds NaN or infinity"):
        export_module(model, tmp_path / "out", quantize="int4", group=32)
    assert not (tmp_path / "out").exists()


def _last_matrix(model):
    return [name for name, p in model.named_parameters() if p.dim() == 2][-1]


def test_a_full_disk_leaves_what_was_there(divisible, tmp_path, monkeypatch):
    out = export(divisible["llama"], tmp_path / "out", profiles=["fused"])
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("portlm.compile.graph.write_all", full)
    with pytest.raises(StorageError, match="No space left"):
        export(divisible["llama"], out, quantize="int4", group=32)
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


# --- graphs that lie ----------------------------------------------------------------------------------------


def first(model, op_type):
    return next(n for n in model.graph.node if n.op_type == op_type)


def tensor(model, name):
    return next(t for t in model.graph.initializer if t.name == name)


def resized(place, *dims):
    """Give a weight of the first node that has one other dimensions, of as many bytes as the file has for it."""

    def change(model, node):
        weight = tensor(model, node.input[place])
        weight.ClearField("dims")
        weight.dims.extend(dims)
        item = 1 if weight.data_type == TensorProto.UINT8 else 4
        next(e for e in weight.external_data if e.key == "length").value = str(item * int(np.prod(dims)))

    return change


def said(name, value):
    def change(model, node):
        for attribute in node.attribute:
            if attribute.name == name:
                attribute.i = value

    return change


def reads(place, other):
    return lambda model, node: node.input.__setitem__(place, other(model, node))


LIES = {  # GPT-2's first matrix is (288, 96): 3 groups of 32
    "weight of another group": resized(1, 288, 3, 15),
    "weight of fewer rows": resized(1, 287, 3, 16),
    "weight of fewer groups": resized(1, 288, 2, 16),
    "weight without groups": resized(1, 288, 48),
    "weight of rank 0": resized(1),
    "scales of fewer groups": resized(2, 288, 2),
    "scales in one row": resized(2, 864),
    "zeros of fewer bytes": resized(3, 288, 1),
    "zeros of fewer rows": resized(3, 287, 2),
    "bias of fewer": resized(4, 287),
    "8 bits": said("bits", 8),
    "5 bits": said("bits", 5),
    "0 bits": said("bits", 0),
    "computed scales": reads(2, lambda model, node: node.input[0]),
    "float32 for a weight": reads(1, lambda model, node: node.input[2]),
    "the weight for zeros": reads(3, lambda model, node: node.input[1]),
    "zeros for the weight": reads(1, lambda model, node: node.input[3]),
    "tokens for x": reads(0, lambda model, node: "input_ids"),
}


@pytest.fixture
def lying(quantized, tmp_path):
    """Function (op_type, kind, change) -> a path of a graph of which one node lies."""
    folder = shutil.copytree(quantized("gpt2", "int4", True), tmp_path / "artifact")

    def write(op_type, kind, change):
        model = graph(folder, "portable" if kind == "portable" else "fused")
        if kind.startswith("ort"):
            model = lower_model(model, 48, "cpu")
        change(model, first(model, op_type))
        path = folder / "onnx" / "mutant.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path

    return write


@pytest.fixture
def only_ours(monkeypatch):
    """No library may be asked about a graph that ought to be refused."""

    def asked(*arguments):
        pytest.fail("a graph was handed on that our own check ought to refuse")

    monkeypatch.setattr(onnx.checker, "check_model", asked)


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize("kind", ["fused", "ort-cpu"])
@pytest.mark.parametrize("lie", LIES)
def test_sizes_of_a_linear_map_that_contradict_each_other_are_refused(lying, kind, lie):
    change = LIES[lie]
    if kind != "fused" and "bias" in lie:
        change = resized(5, 287)
    path = lying("QuantizedLinear" if kind == "fused" else "MatMulNBits", kind, change)
    with pytest.raises(FormatError, match=r"mutant\.onnx: .*; export again"):
        check_model(path)


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize(("name", "value"), [("K", 128), ("N", 287), ("block_size", 64), ("block_size", 16)])
def test_sizes_that_are_said_twice_must_agree(lying, name, value):
    with pytest.raises(FormatError, match="export again"):
        check_model(lying("MatMulNBits", "ort-cpu", said(name, value)))


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("fused", resized(1, 257, 3, 15)),
        ("fused", resized(1, 256, 3, 16)),
        ("fused", resized(3, 257, 1)),
        ("fused", said("bits", 8)),
        ("ort-cpu", said("bits", 8)),
        ("ort-cpu", said("block_size", 64)),
        ("ort-cpu", said("quantize_axis", 0)),
        ("ort-cpu", resized(2, 256, 3)),
        ("ort-cpu", reads(0, lambda model, node: "transformer.wte.weight.q")),
        ("ort-cpu", reads(0, lambda model, node: "transformer.h.0.attn.c_attn.weight.q")),
    ],
    ids=range(10),
)
def test_sizes_of_a_table_that_contradict_each_other_are_refused(lying, kind, change):
    path = lying("QuantizedEmbedding" if kind == "fused" else "GatherBlockQuantized", kind, change)
    with pytest.raises(FormatError, match="export again"):
        check_model(path)


def in_the_graph(model, node):
    weight = tensor(model, "transformer.wte.weight.q")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((257, 3, 16), np.uint8), weight.name))


def as_input(model, node):
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.UINT8, [1]))


def as_output(model, node):
    model.graph.output.append(helper.make_tensor_value_info("transformer.wte.bytes", TensorProto.UINT8, None))


def of_another_type(kind):
    def change(model, node):
        tensor(model, "transformer.wte.weight.q").data_type = kind

    return change


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize(
    ("op_type", "change"),
    [
        ("Cast", said("to", TensorProto.DOUBLE)),
        ("Cast", said("to", TensorProto.INT64)),
        ("Cast", reads(0, lambda model, node: "input_ids")),
        ("Cast", reads(0, lambda model, node: "transformer.wte.weight.scale")),
        ("Floor", reads(0, lambda model, node: "transformer.wte.weight.q")),
        ("Concat", reads(0, lambda model, node: "transformer.wte.weight.q")),
        ("Unsqueeze", reads(0, lambda model, node: "transformer.wte.weight.q")),
        ("MatMul", reads(1, lambda model, node: "transformer.wte.weight.q")),
        ("Gather", in_the_graph),
        ("Gather", as_input),
        ("Gather", as_output),
        ("Gather", of_another_type(TensorProto.INT8)),
        ("Gather", of_another_type(TensorProto.UINT4)),
        ("Gather", of_another_type(TensorProto.FLOAT)),
        ("Gather", resized(0, 2**20, 3, 16)),
    ],
    ids=range(15),
)
def test_bytes_are_weights_in_the_file_and_go_nowhere_but_into_numbers(lying, op_type, change):
    with pytest.raises(FormatError, match="export again"):
        check_model(lying(op_type, "portable", change))


def test_a_weight_of_another_type_than_the_manifest_says_is_refused(quantized, tmp_path):
    folder = shutil.copytree(quantized("gpt2", "int4"), tmp_path / "artifact")
    manifest = read_manifest(folder)
    role = manifest.roles["decoder"]
    for dtypes, problem in (
        ({}, "is uint8, and the manifest says float32"),
        (role.dtypes | {"transformer.wte.weight.scale": "uint8"}, "is float32, and the manifest says uint8"),
    ):
        write_manifest(folder, replace(manifest, roles={"decoder": replace(role, dtypes=dtypes)}))
        with pytest.raises(FormatError, match=problem):
            read_source(folder, "decoder", "fused")


@pytest.mark.parametrize("asymmetric", [False, True])
def test_graphs_from_elsewhere_are_read_in_a_child_process(quantized, tmp_path, monkeypatch, asymmetric):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))
    folder = quantized("llama", "int4", asymmetric)
    manifest = read_manifest(folder)
    lines = []
    ensure_checked(folder, manifest, weights_of(manifest), lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize("kind", ["portable", "fused", "ort-cpu", "ort-vulkan"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_rows_of_a_quantized_table_bound_the_tokens(quantized, kind, asymmetric):
    """The manifest is compared with them: an engine may read beyond its end."""
    model = graph(quantized("gpt2", "int4", asymmetric), "portable" if kind == "portable" else "fused")
    if kind.startswith("ort"):
        model = lower_model(model, 48, kind.removeprefix("ort-"))
    assert table_limits(model.graph)["input_ids"] == 257


def test_what_the_numbers_mean_is_near_the_weights(divisible):
    """A step of 8 bits is a hundredth of the spread and less, one of 4 bits a sixth: the model is still the model."""
    for weight in matrices(divisible["llama"]).values():
        for bits, share in ((8, 0.02), (4, 0.2)):
            scheme = Scheme(bits, 32)
            means = dequantize(quantize("w", np.ascontiguousarray(weight), RoundToNearest(scheme)), scheme)
            assert np.sqrt(np.mean((means - weight) ** 2)) <= share * weight.std()
