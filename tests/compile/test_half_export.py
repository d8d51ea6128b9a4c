"""Weights of 16 bits from a checkpoint into an artifact: their numbers, their sizes, and what is refused."""

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from packable import PACKED  # noqa: E402

from portlm.artifact import half_weights, read_manifest  # noqa: E402
from portlm.compile import halves  # noqa: E402
from portlm.compile.build import build  # noqa: E402
from portlm.compile.check import check_model  # noqa: E402
from portlm.compile.export import export, export_module  # noqa: E402
from portlm.compile.work import token_work  # noqa: E402
from portlm.errors import FormatError, UsageError  # noqa: E402
from portlm.hub import import_hf  # noqa: E402
from portlm.models import DECODERS, WEIGHTS, load_model  # noqa: E402
from portlm.weights import load_numpy, load_torch, save_tensors  # noqa: E402

KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DATA = "onnx/decoder.onnx.data"


def halved(folder, out, dtype):
    """A Hugging Face folder like a checkpoint, with all weights in a type of 16 bits; imported."""
    hf = out / "hf"
    hf.mkdir()
    for path in folder.iterdir():
        if path.name != WEIGHTS:
            (hf / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.to(dtype) for name, tensor in load_torch(folder / WEIGHTS).items()}
    save_tensors(hf / WEIGHTS, tensors, metadata={"format": "pt"})
    import_hf(hf, out / "checkpoint")
    return out / "checkpoint"


def weights_of(artifact, profile="fused"):
    """Every weight of a graph as float32, by name, and their types."""
    tensors = check_model(artifact / f"onnx/decoder.{profile}.onnx").graph.initializer
    arrays = {t.name: onnx.numpy_helper.to_array(t, str(artifact / "onnx")) for t in tensors}
    return {n: a.astype(np.float32) for n, a in arrays.items()}, {n: a.dtype.name for n, a in arrays.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PACKED)
def test_a_checkpoint_of_16_bits_stays_half_as_large(family, kind, checkpoints, artifacts, tmp_path):
    """Of the files that engines read the matrices are half, and what is small beside them float32."""
    checkpoint = halved(checkpoints[family], tmp_path, KINDS[kind])
    whole, half = ((folder / WEIGHTS).stat().st_size for folder in (checkpoints[family], checkpoint))
    assert half < 0.55 * whole
    artifact = export(checkpoint, tmp_path / "artifact")
    build(artifact, [("packed", "cpu", "fused")])
    assert half_weights(read_manifest(artifact)) == (kind,)
    arrays, types = weights_of(artifact)
    wide = sum(4 * arrays[name].size for name, dtype in types.items() if dtype == "float32")
    small = sum(2 * arrays[name].size for name, dtype in types.items() if dtype == kind)
    assert (artifact / DATA).stat().st_size <= wide + small + 64 * len(arrays)
    assert (artifact / DATA).stat().st_size < 0.6 * (artifacts[family] / DATA).stat().st_size
    assert (artifact / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    bytes_read, multiplies = token_work(artifact, read_manifest(artifact))
    assert (token_work(artifact, read_manifest(artifact), widened=True)) == token_work(
        artifacts[family], read_manifest(artifacts[family])
    )
    assert bytes_read < 0.6 * token_work(artifact, read_manifest(artifact), widened=True)[0]
    assert multiplies > 0


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize("family", DECODERS)
def test_graphs_hold_the_numbers_of_the_checkpoint_to_the_bit(family, profile, checkpoints, tmp_path):
    checkpoint = halved(checkpoints[family], tmp_path, torch.bfloat16)
    artifact = export(checkpoint, tmp_path / "artifact")
    wide = export(checkpoint, tmp_path / "wide", weights="float32")
    (arrays, types), (same, floats) = weights_of(artifact, profile), weights_of(wide, profile)
    assert set(types.values()) - {"int64"} == {"bfloat16", "float32"}
    assert set(floats.values()) - {"int64"} == {"float32"}
    for name, dtype in types.items():
        if dtype == "bfloat16":
            assert any(np.array_equal(arrays[name], turned) for turned in (same[name], same[name].T))
    nodes = check_model(artifact / f"onnx/decoder.{profile}.onnx").graph.node
    used = {node.op_type for node in nodes}
    assert ("Cast" in used) == (profile == "portable")
    assert ({"HalfLinear", "HalfEmbedding"} <= used) == (profile == "fused")
    names = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "tokens_embed.weight")
    tied = [name for name in types if name.endswith(names)]
    assert len(tied) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_on_purpose_is_rounding_the_checkpoint_first(kind, checkpoints, tmp_path):
    """Matrices to the nearest, vectors not at all; and what is rounded already stays as it is."""
    artifact = export(checkpoints["gpt2"], tmp_path / "rounded", weights=kind)
    before, after = (load_torch(folder / WEIGHTS) for folder in (checkpoints["gpt2"], artifact))
    assert all(
        torch.equal(after[name], tensor.to(KINDS[kind]) if tensor.dim() > 1 else tensor)
        for name, tensor in before.items()
    )
    again = export(artifact, tmp_path / "again", weights=kind)
    kept = export(artifact, tmp_path / "kept")
    for other in (again, kept):
        assert (other / DATA).read_bytes() == (artifact / DATA).read_bytes()
        assert (other / WEIGHTS).read_bytes() == (artifact / WEIGHTS).read_bytes()


def test_a_module_in_memory_is_rounded_for_its_artifact_and_gets_its_own_back(checkpoints, tmp_path):
    model = load_model(checkpoints["llama"])
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    artifact = export_module(model, tmp_path / "module", weights="bfloat16")
    same = export(checkpoints["llama"], tmp_path / "checkpoint", weights="bfloat16")
    assert (artifact / DATA).read_bytes() == (same / DATA).read_bytes()
    assert (artifact / WEIGHTS).read_bytes() == (same / WEIGHTS).read_bytes()
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())


def test_types_may_differ_from_tensor_to_tensor(checkpoints, tmp_path):
    """A perceptron of which one matrix is float32 is one with float32 matrices; all others stay as they are."""
    folder = halved(checkpoints["gpt2"], tmp_path, torch.bfloat16)
    tensors = load_torch(folder / WEIGHTS)
    first, *_, last = (name for name in sorted(tensors) if name.endswith("mlp.c_fc.weight"))
    tensors[first] = tensors[first].float()
    tensors[last] = tensors[last].to(torch.float16)
    save_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})
    artifact = export(folder, tmp_path / "mixed")
    arrays, types = weights_of(artifact)
    assert [types[name] for name in (first, first.replace("c_fc", "c_proj"), last)] == [
        "float32", "float32", "float16",
    ]  # fmt: skip
    assert np.array_equal(arrays[last].T, tensors[last].float().numpy())
    wanted = tensors[first.replace("c_fc", "c_proj")].float().numpy()
    assert np.array_equal(arrays[first.replace("c_fc", "c_proj")], wanted)
    assert half_weights(read_manifest(artifact)) == ("float16", "bfloat16")


def test_what_cannot_be_is_refused(checkpoints, tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    for file in checkpoints["llama"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.copy() for name, tensor in load_numpy(path / WEIGHTS).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = -70000.0
    save_tensors(path / WEIGHTS, tensors, metadata={"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(
        FormatError, match=f"{name} holds 70000, which is too large for float16: bfloat16 holds"
    ):
        export(path, out, weights="float16")
    with pytest.raises(FormatError, match=r"layers\.1.* holds 70000, which is too large for float16"):
        export_module(load_model(path), out, weights="float16")
    with pytest.raises(UsageError, match="weights must be auto, float32, bfloat16 or float16, got 'half'"):
        export(path, out, weights="half")
    with pytest.raises(UsageError, match="weights are either int8 or bfloat16: leave one of"):
        export(path, out, weights="bfloat16", quantize="int8")
    assert not out.exists()
    export(path, out, weights="bfloat16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_refused_by_name(kind, value, checkpoints, tmp_path):
    folder = halved(checkpoints["llama"], tmp_path, KINDS[kind])
    tensors = load_torch(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0, 0] = value
    save_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"{name} holds NaN or infinity"):
        export(folder, tmp_path / "out")


def test_numbers_are_rounded_as_pytorch_rounds_them():
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) ** 5
    for kind, dtype in KINDS.items():
        assert np.array_equal(
            halves.rounded("x", x, kind).astype(np.float32), torch.from_numpy(x).to(dtype).float().numpy()
        )
    with pytest.raises(
        FormatError, match=r"x holds 3\.4\d*e\+38, which is too large for bfloat16: keep it float32"
    ):
        halves.rounded("x", np.full(2, 3.4028e38, np.float32), "bfloat16")
