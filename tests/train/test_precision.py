"""Training in bf16: that it happens where it was asked for, learns as well, and keeps what it saves in float32."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from tiny_runs import newest, pretrain, tiny  # noqa: E402

from portlm.errors import ConfigError  # noqa: E402
from portlm.ops.precision import rounds_products  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.weights import load_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = (
    "linear_bf16_fwd",
    "linear_bf16_bwd",
    "gelu_mlp_bf16_fwd",
    "gelu_mlp_bf16_bwd",
    "linear_cross_entropy_bf16",
)


@pytest.mark.runs_kernel(*KERNELS)
def test_a_run_in_bf16_learns_as_much_as_one_in_fp32_and_saves_float32(text, tmp_path):
    """150 steps of a tiny model on 6 kB: losses fall by a third; rounding moves them by much less than that."""
    runs = {
        precision: pretrain(
            tiny(text, steps=150, precision=precision, evaluation__sample_tokens=0, checkpoint__interval=150),
            tmp_path / precision,
            quiet=True,
        )
        for precision in ("fp32", "bf16")
    }
    assert not rounds_products()
    first = next(r["loss"] for r in read_metrics(tmp_path / "bf16" / "metrics.jsonl") if r["kind"] == "eval")
    assert runs["bf16"].loss < 0.8 * first
    assert runs["bf16"].loss != runs["fp32"].loss
    assert runs["bf16"].loss == pytest.approx(runs["fp32"].loss, rel=0.01)
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_torch(newest(tmp_path / "bf16") / name)
        assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.runs_kernel("linear_bf16_fwd", "linear_bf16_bwd", "linear_cross_entropy_bf16")
def test_a_llama_trains_in_bf16_with_its_gated_matrices(text, tmp_path):
    config = tiny(text, model__family="llama", model__n_kv_head=1, steps=4, precision="bf16")
    assert pretrain(config, tmp_path / "run", quiet=True).steps == 4


@pytest.mark.no_kernel("refused before anything is computed")
def test_bf16_is_refused_elsewhere_and_other_precisions_by_name(text):
    with pytest.raises(ConfigError, match="precision bf16 is for device cpu, not 'cuda'"):
        tiny(text, precision="bf16", device="cuda")
    with pytest.raises(ConfigError, match="precision: expected one of fp32, bf16, got 'fp16'"):
        tiny(text, precision="fp16")
