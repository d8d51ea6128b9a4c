"""What the command line says of weights of 16 bits."""

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.models import WEIGHTS
from portlm.weights import read_header


def test_export_rounds_weights_on_purpose_and_says_what_cannot_be(checkpoints, tmp_path, portlm):
    folder, out = checkpoints["llama"], tmp_path / "out"
    assert portlm("export", folder, out, "--weights", "bfloat16").code == 0
    assert {info.dtype for info in read_header(out / WEIGHTS).values()} == {"BF16", "F32"}
    refused = tmp_path / "refused"
    for options, message in (
        (("--weights", "half"), "is not one of 'auto'"),
        (("--weights", "float16", "--quantize", "int4"), "leave one of quantize and weights out"),
        (("--weights", "float16", "--to", "hf"), "--to hf copies the weights"),
    ):
        found = portlm("export", folder, refused, *options)
        assert found.code == 2
        assert message in found.err
    assert not refused.exists()
    checked = portlm("verify", out, "-e", "torch:cpu:native")
    assert checked.code == 0
    assert "weights of 16 bits (bfloat16), computed with in float32" in checked.out
