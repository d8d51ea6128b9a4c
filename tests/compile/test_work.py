"""The work of a decoded token is counted from the graph, whatever the model calls its weights."""

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.artifact import read_manifest
from portlm.compile.export import export_module
from portlm.compile.work import token_work
from portlm.models import FAMILIES, build


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_read_once_and_of_a_table_one_row(family, profile, tmp_path):
    model = build(FAMILIES[family].config_class().tiny())
    folder = export_module(model, tmp_path / "model", profiles=[profile])
    read, multiplies = token_work(folder, read_manifest(folder))
    tables, matrices, others = 0, 0, 0
    tied = model.roles()["decoder"].outputs[0].shape[-1]  # V: of the head, and of the table of tokens
    parameters = dict(model.named_parameters())
    heads = [name for name, p in parameters.items() if p.dim() == 2 and p.shape[0] == tied]
    for name, p in parameters.items():
        if p.dim() < 2:
            others += p.numel()
        elif (name == heads[0] and len(heads) > 1) or name.endswith("wpe.weight"):
            tables += p.shape[1]
        else:
            matrices += p.numel()
    assert multiplies == matrices
    rotary = read - 4 * (tables + matrices + others)
    assert 0 <= rotary <= 8 * model.config.width  # a row of the tables of angles


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize(("quantize", "bits"), [("int4", 4), ("int8", 8)])
def test_quantized_weights_count_with_their_scales_and_multiply_as_before(quantize, bits, profile, tmp_path):
    config = FAMILIES["llama"].config_class()(
        vocab_size=96, context_length=16, n_layer=1, n_head=2, n_kv_head=1, width=64, hidden=96
    )
    plain = export_module(build(config), tmp_path / "plain", profiles=[profile])
    small = export_module(build(config), tmp_path / "small", profiles=[profile], quantize=quantize, group=32)
    read, multiplies = token_work(plain, read_manifest(plain))
    manifest = read_manifest(small)
    assert token_work(small, manifest)[1] == multiplies
    for half, scale in ((False, 4), (True, 2)):
        saved = 4 - (bits / 8 + scale / 32)  # bytes of a weight; one row of the token table is read, too
        constants = token_work(small, manifest, half)[0] - (read - saved * (multiplies + config.width))
        assert 0 <= constants <= 16  # a few float32 numbers, with which a portable graph unpacks nibbles
