"""What float32 may do to large logits, and what a fault does: the certificate tells one from the other.

Heads 256 wide with large weights, as in no model that this suite has otherwise: scores of attention reach 60 and
logits 15 to 21, and PyTorch's own float32 is more than 1e-4 from float64.
"""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from random_weights import randomise  # noqa: E402

from portlm.compile.parity import TOLERANCE, allowed_error, make_probe, make_reference, measure  # noqa: E402
from portlm.engine import OpenRequest  # noqa: E402
from portlm.models import build  # noqa: E402
from portlm.models.gpt2 import GPT2Config  # noqa: E402
from portlm.models.llama import LlamaConfig  # noqa: E402
from portlm.ops.kernel_op import without_kernels  # noqa: E402
from portlm.runtimes.eager import TorchEngine  # noqa: E402

V, CONTEXT, STD = 512, 64, 0.2
SIZES = {"vocab_size": V, "context_length": CONTEXT, "n_layer": 2, "n_head": 2, "width": 512}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, n_kv_head=2, hidden=1024, rms_norm_eps=1e-6),
    "gpt2": GPT2Config(**SIZES),
}


def wide(family, seed=0):
    return randomise(build(CONFIGS[family]).eval(), STD, seed)


def answer(model):
    """Eager PyTorch's answer to the probe, on its own operators."""
    with without_kernels():
        return make_reference(TorchEngine.of(model, "cpu"), V, CONTEXT)


def float64_logits(model):
    probe = make_probe(V, CONTEXT)
    rows = [ids[mask == 1] for ids, mask in zip(probe.input_ids, probe.attention_mask, strict=True)]
    with torch.no_grad(), without_kernels():
        return np.concatenate([model.double()(torch.tensor(row[None]))[0].numpy() for row in rows])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", CONFIGS)
def test_rounding_of_wide_heads_is_allowed(family, seed):
    """Of portlm's kernels beside eager PyTorch, which is itself as far from float64."""
    model = wide(family, seed)
    reference = answer(model)
    measurement = measure(TorchEngine.of(model, "cpu"), reference)
    assert measurement.problem() is None
    scale = float(np.abs(reference.logits).max())
    assert 15 < scale < 22
    assert measurement.row.logit_scale == scale
    assert np.abs(reference.logits - float64_logits(model)).max() <= allowed_error(scale)


def test_onnx_runtime_on_wide_heads_is_allowed_its_rounding(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")
    from portlm.artifact import read_manifest
    from portlm.compile.export import export
    from portlm.models import save_model
    from portlm.runtimes.ort import OrtEngine

    model = wide("llama")
    save_model(tmp_path / "checkpoint", model)
    folder = export(tmp_path / "checkpoint", tmp_path / "model")
    request = OpenRequest(folder, read_manifest(folder), "cpu", "portable", threads=1)
    assert measure(OrtEngine.open(request), answer(model)).problem() is None


def attention_scale_that_lost_its_last_digit(model):
    """0.0625 became 0.062."""
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.mul_(0.062 / 0.0625)


def epsilon_of_another_family(model):
    replacement = build(replace(model.config, rms_norm_eps=1e-5)).eval()
    replacement.load_state_dict(model.state_dict())
    return replacement


def one_matrix_in_half_precision(model):
    with torch.no_grad():
        weight = model.layers[0].mlp.down_proj.weight
        weight.copy_(weight.half().float())


def positions_off_by_one(model):
    with torch.no_grad():
        model.wpe.weight.copy_(model.wpe.weight.roll(1, 0))


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("llama", attention_scale_that_lost_its_last_digit),
        ("llama", epsilon_of_another_family),
        ("llama", one_matrix_in_half_precision),
        ("gpt2", positions_off_by_one),
    ],
)
def test_a_small_fault_is_found_at_large_logits(family, fault):
    model = wide(family)
    reference = answer(model)
    broken = fault(model) or model
    problem = measure(TorchEngine.of(broken, "cpu"), reference).problem()
    assert "its logits are off by" in problem
    assert "for logits up to" in problem


def test_the_bar_grows_with_the_logits_from_the_absolute_one():
    assert allowed_error(0.0) == allowed_error(1.0) == TOLERANCE
    assert allowed_error(31.0) == pytest.approx(31 * 6e-5)
    assert np.isnan(allowed_error(float("nan")))
