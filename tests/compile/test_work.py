"""The work of a decoded token is counted from the graph, whatever the model calls its weights."""

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.artifact import read_manifest
from portlm.compile.export import export, export_module
from portlm.compile.work import token_work
from portlm.models import DECODERS, build

PLACES = ("wpe.weight", "embed_positions.weight", "positions_embed.weight")  # tables of positions


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_weight_is_read_once_and_of_a_table_one_row(family, profile, tmp_path):
    model = build(DECODERS[family].config_class().tiny())
    folder = export_module(model, tmp_path / "model", profiles=[profile])
    read, multiplies = token_work(folder, read_manifest(folder))
    tables, matrices, others = 0, 0, 0
    tied = model.roles()["decoder"].outputs[0].shape[-1]  # V: of the head, and of the table of tokens
    parameters = dict(model.named_parameters())
    heads = [name for name, p in parameters.items() if p.dim() == 2 and p.shape[0] == tied]
    for name, p in parameters.items():
        if p.dim() < 2:
            others += p.numel()
        elif (name == heads[0] and len(heads) > 1) or name.endswith(PLACES):
            tables += p.shape[1]
        else:
            matrices += p.numel()
    assert multiplies == matrices
    rotary = read - 4 * (tables + matrices + others)
    assert 0 <= rotary <= 8 * model.config.width  # a row of the tables of angles


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize(("bits", "asymmetric"), [("int4", True), ("int8", False)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_quantized_weights_count_as_the_bytes_that_they_are(
    divisible, family, bits, asymmetric, profile, tmp_path
):
    """And as many products as the matrices that they stand for."""
    options = {"profiles": [profile], "group": 32}
    plain = export(divisible[family], tmp_path / "plain", options["profiles"])
    small = export(divisible[family], tmp_path / "small", quantize=bits, asymmetric=asymmetric, **options)
    before, products = token_work(plain, read_manifest(plain))
    after, same = token_work(small, read_manifest(small))
    assert same == products
    width = int(bits[3:])
    table = 0 if family == "gpt2" else 96  # of the token table one row, unless it is the head as well
    each = width / 8 + 4 / 32 + (width / 8 / 32 if asymmetric else 0)  # numbers, scales, zero points
    expected = before - 4 * products + products * each - table * (4 - each)
    assert abs(after - expected) <= 0.01 * before  # zero points of a row are whole bytes


def test_scales_that_kernels_keep_in_two_bytes_count_as_two(divisible, tmp_path):
    folder = export(divisible["llama"], tmp_path / "small", quantize="int4", group=32)
    manifest = read_manifest(folder)
    (whole, products), (half, same) = (
        token_work(folder, manifest, half_scales) for half_scales in (False, True)
    )
    assert same == products
    assert whole - half == 2 * (products + 64) // 32  # a row of the token table is 64 numbers
