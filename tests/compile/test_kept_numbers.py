"""Whole numbers of GGUF files: an export has those of the file bit for bit, rows where the model has them."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install portlm[gguf]")

from random_weights import randomise  # noqa: E402

import portlm as package  # noqa: E402
from portlm.artifact import read_manifest  # noqa: E402
from portlm.compile.export import export  # noqa: E402
from portlm.compile.quantize import Scheme, unpack  # noqa: E402
from portlm.errors import FormatError, UsageError  # noqa: E402
from portlm.gguf_file import GgufFile  # noqa: E402
from portlm.gguf_writer import write_gguf  # noqa: E402
from portlm.hub_gguf import export_gguf, import_gguf  # noqa: E402
from portlm.kept_scales import SCALES, load_scales  # noqa: E402
from portlm.models import FAMILIES, build, load_model, save_model  # noqa: E402

V, WIDE = 64, {"width": 64, "vocab_size": 64, "eos_token_ids": ()}
SHAPES = {"llama": WIDE | {"hidden": 96}, "gpt2": WIDE, "gpt_neox": WIDE | {"hidden": 96}}


def blocks(file, name):
    """Whole numbers (N, K) and scales (N, G) of a matrix, read from its bytes as ggml describes them."""
    tensor = file.tensors[name]
    N, K = tensor.shape
    size = {"Q4_0": 18, "Q8_0": 34}[tensor.kind]
    raw = np.frombuffer(file.raw(name), np.uint8).reshape(N, K // 32, size)
    scales, body = raw[..., :2].copy().view("<f2")[..., 0], raw[..., 2:]
    if tensor.kind == "Q8_0":
        return body.copy().view(np.int8).astype(np.int16).reshape(N, K), scales
    low_then_high = np.concatenate(
        (body & 15, body >> 4), axis=-1
    )  # of 32 numbers the first 16 are low halves
    return low_then_high.astype(np.int16).reshape(N, K) - 8, scales


def quantized_file(folder, family, kind, other=None):
    """Write a tiny model whose matrices are blocks of a kind, `other` ones of one tensor; return the path."""
    config = replace(FAMILIES[family].config_class().tiny(), **SHAPES[family])
    save_model(folder / "plain", randomise(build(config), 0.3, seed=4))
    export_gguf(folder / "plain", folder / "plain.gguf")
    file, kinds, raws = GgufFile.open(folder / "plain.gguf"), {}, {}
    for name, tensor in file.tensors.items():
        kinds[name], raws[name] = (tensor.kind, tensor.shape), file.raw(name)
        if len(tensor.shape) == 2 and name != "position_embd.weight":
            own = other if other and name == "token_embd.weight" else kind
            packed = gguf.quants.quantize(file.numbers(name), gguf.GGMLQuantizationType[own])
            kinds[name], raws[name] = (own, tensor.shape), packed.tobytes()
    write_gguf(folder / "model.gguf", file.entries, kinds, raws.__getitem__)
    return folder / "model.gguf"


def stored(artifact):
    """Name of each quantized matrix in an artifact -> (numbers (N, K), scales (N, G))."""
    graph = onnx.load(artifact / "onnx/decoder.fused.onnx", load_external_data=False).graph
    arrays = {
        t.name: numpy_helper.to_array(t, str(artifact / "onnx")) for t in graph.initializer if t.external_data
    }
    bits = read_manifest(artifact).quantization.bits
    names = [name.removesuffix(".q") for name in arrays if name.endswith(".q")]
    scheme = Scheme(bits, 32)
    found = {
        n: (unpack(arrays[f"{n}.q"], scheme).astype(np.int16) - scheme.middle, arrays[f"{n}.scale"])
        for n in names
    }
    assert not any(name.endswith(".zero") for name in arrays)
    return found


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Function (family, kind) -> the GGUF file and the checkpoint that kept its scales."""
    made = {}

    def make(family, kind):
        if (family, kind) not in made:
            folder = tmp_path_factory.mktemp(family)
            path = quantized_file(folder, family, kind)
            import_gguf(path, folder / "kept", keep_integers=True)
            made[family, kind] = path, folder / "kept"
        return made[family, kind]

    return make


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", "int4"), ("Q8_0", "int8"), ("Q4_0", "int8")])
@pytest.mark.parametrize("family", SHAPES)
def test_an_export_has_the_numbers_and_scales_of_the_file(imported, tmp_path, family, kind, bits):
    """Llama's queries and keys and GPT-NeoX's joint matrix lie in another order of rows there."""
    path, checkpoint = imported(family, kind)
    artifact = export(checkpoint, tmp_path / "out", quantize=bits, profiles=["fused"])
    file, found = GgufFile.open(path), stored(artifact)
    config, seen = load_model(checkpoint).config, 0
    for place, (name, turn) in names_of(file, family).items():
        if len(file.tensors[place].shape) != 2 or place == "position_embd.weight":
            continue
        q, scale = blocks(file, place)
        if turn is not None and not turn.transposes:
            q, scale = turn.back(q, config), turn.back(scale, config)
        numbers, scales = found[name]
        assert np.array_equal(numbers, q), name
        assert np.array_equal(scales, scale.astype(np.float32)), name
        seen += 1
    assert seen == len(found)
    manifest = read_manifest(artifact)
    assert manifest.quantization.group == 32
    assert manifest.quantization.method == f"the numbers of {seen} matrices kept"


def names_of(file, family):
    from portlm.gguf_models import hf_names

    return hf_names(file.tensors, family, file.path)


def test_even_numbers_keep_their_scale(tmp_path):
    """The weights alone do not say it: of 2, 4 and 6 times d another scale, 2 d, is as good."""
    path = quantized_file(tmp_path, "llama", "Q4_0")
    file = GgufFile.open(path)
    raw = bytearray(file.raw("blk.0.attn_output.weight"))
    raw[2:18] = bytes([0x8A] * 8 + [0xC6] * 8)  # of the first group: 2 and 0, -2 and 4
    raws = {name: file.raw(name) for name in file.tensors} | {"blk.0.attn_output.weight": bytes(raw)}
    kinds = {name: (t.kind, t.shape) for name, t in file.tensors.items()}
    write_gguf(tmp_path / "even.gguf", file.entries, kinds, raws.__getitem__)
    import_gguf(tmp_path / "even.gguf", tmp_path / "kept", keep_integers=True)
    artifact = export(tmp_path / "kept", tmp_path / "out", quantize="int4", profiles=["fused"])
    q, scale = blocks(GgufFile.open(tmp_path / "even.gguf"), "blk.0.attn_output.weight")
    numbers, scales = stored(artifact)["model.layers.0.self_attn.o_proj.weight"]
    assert (q[0, :32] % 2 == 0).all()
    assert np.array_equal(numbers, q)
    assert np.array_equal(scales, scale.astype(np.float32))
    (tmp_path / "kept" / SCALES).unlink()
    rounded = export(tmp_path / "kept", tmp_path / "rounded", quantize="int4", group=32, profiles=["fused"])
    assert not np.array_equal(stored(rounded)["model.layers.0.self_attn.o_proj.weight"][0], q)


@pytest.mark.parametrize("target", [("ort", "cpu", "portable"), ("ort", "cpu", "fused")], ids=":".join)
def test_logits_are_those_of_the_widened_weights(imported, tmp_path, target):
    """The numbers are the same, so only sums in float32 of another order lie between, over two layers.

    On engines that keep activations in float32; the others round those to 15 bits, as with any quantized weights.
    """
    _, checkpoint = imported("llama", "Q8_0")
    artifact = export(checkpoint, tmp_path / "out", quantize="int8")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        expected = load_model(checkpoint)(torch.tensor([ids])).log_softmax(-1)[0]
    wanted = [float(expected[t, ids[t + 1]]) for t in range(len(ids) - 1)]
    with package.load(artifact, *target) as session:
        found = session.score([ids])[0].logprobs
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_what_has_no_scale_is_rounded_and_said(tmp_path):
    path = quantized_file(tmp_path, "gpt2", "Q4_0", other="Q8_0")
    done = import_gguf(path, tmp_path / "kept", keep_integers=True)
    assert (
        "the scales of 9 matrices were kept: export --quantize int8 has the file's own numbers" in done.notes
    )
    assert {bits for bits, _ in load_scales(tmp_path / "kept").values()} == {4, 8}
    four = export(tmp_path / "kept", tmp_path / "four", quantize="int4", profiles=["fused"])
    said = read_manifest(four).quantization.method
    assert said == "the numbers of 8 matrices kept, 1 rounded to nearest"
    eight = export(tmp_path / "kept", tmp_path / "eight", quantize="int8", profiles=["fused"])
    assert read_manifest(eight).quantization.method == "the numbers of 9 matrices kept"


def test_another_group_is_rounded_as_without_scales(imported, tmp_path):
    _, checkpoint = imported("llama", "Q4_0")
    artifact = export(
        checkpoint, tmp_path / "out", quantize="int4", group=32, asymmetric=True, profiles=["fused"]
    )
    assert read_manifest(artifact).quantization.method == "round to nearest"


def test_weights_that_have_changed_since_are_refused(imported, tmp_path):
    _, checkpoint = imported("llama", "Q4_0")
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    model = load_model(folder)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    save_model(folder, model)
    with pytest.raises(
        FormatError, match=r"layers\.0\.mlp\.up_proj\.weight is not made of whole numbers times"
    ):
        export(folder, tmp_path / "out", quantize="int4")
    (folder / SCALES).write_bytes(b"nothing")
    with pytest.raises(FormatError, match=SCALES):
        export(folder, tmp_path / "out", quantize="int4")


def test_a_file_of_plain_numbers_has_no_integers_to_keep(imported, tmp_path):
    path, _ = imported("llama", "Q4_0")
    with pytest.raises(UsageError, match="the file has no matrix in Q4_0 or Q8_0: leave --keep-integers out"):
        import_gguf(path.with_name("plain.gguf"), tmp_path / "out", keep_integers=True)
    assert not (tmp_path / "out").exists()
