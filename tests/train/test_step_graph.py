"""Whole steps as recorded graphs, with what stands for CUDA's, and with those where there is a GPU."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from recorded_graph import RecordedGraph  # noqa: E402
from tiny_runs import digest, newest, pretrain, stop_at, tiny, told  # noqa: E402

from portlm.errors import ConfigError, PortlmError  # noqa: E402
from portlm.models import DECODERS, build  # noqa: E402
from portlm.ops.kernel_op import without_kernels  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.loop import accumulate_gradients  # noqa: E402
from portlm.train.step_graph import StepGraph  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES = ("loss", "grad_norm", "bits_per_byte")


@pytest.fixture
def stand_in(monkeypatch):
    """Graphs of PyTorch's operators in the place of CUDA's, and on the CPU, where settings refuse them."""
    monkeypatch.setattr(PretrainConfig, "_check_graph", lambda config: None)
    monkeypatch.setattr(StepGraph.__init__, "__defaults__", (RecordedGraph,))
    with without_kernels():
        yield


@pytest.mark.no_kernel("PyTorch's operators are what can be recorded without a GPU")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_recorded_steps_is_the_same_bit_for_bit(text, tmp_path, stand_in, accumulate):
    """With dropout: what prepares a recording must not use up the random numbers of steps."""
    settings = {"steps": 6, "model__dropout": 0.2, "data__accumulate": accumulate}
    before = RecordedGraph.replays
    runs = [
        pretrain(tiny(text, **settings, cuda_graph=graph), tmp_path / str(graph), quiet=True)
        for graph in (False, True)
    ]
    assert RecordedGraph.replays == before + 6
    assert digest(newest(runs[0].run)) == digest(newest(runs[1].run))
    figures = [[line.get(name) for line in told(run.run) for name in FIGURES] for run in runs]
    assert figures[0] == figures[1]


@pytest.mark.no_kernel("PyTorch's operators are what can be recorded without a GPU")
def test_a_run_of_recorded_steps_goes_on_bit_for_bit_where_it_was_stopped(
    text, tmp_path, stand_in, monkeypatch
):
    whole = pretrain(tiny(text, steps=8, model__dropout=0.2, cuda_graph=True), tmp_path / "whole", quiet=True)

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_at(patch, 5, stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(text, steps=8, model__dropout=0.2, cuda_graph=True), tmp_path / "parts", quiet=True)
    resumed = pretrain(
        tiny(text, steps=8, model__dropout=0.2, cuda_graph=True),
        tmp_path / "parts",
        resume="auto",
        quiet=True,
    )
    assert digest(newest(whole.run)) == digest(newest(resumed.run))


@pytest.mark.no_kernel("PyTorch's operators are what can be recorded without a GPU")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_a_recorded_step_has_the_gradients_of_other_tokens_than_it_was_recorded_with(family, stand_in):
    """Experts, too, which are chosen anew: nothing of a step may have been decided by Python."""
    model = build(DECODERS[family].config_class().tiny()).train()

    def step(parts):
        return accumulate_gradients(lambda part: model(*part), parts)

    graph = StepGraph(step, model)
    parts = [[tuple(torch.randint(100, (2, 2, 8)).unbind()) for _ in range(2)] for _ in range(2)]
    graph(parts[0])
    loss = graph(parts[1]).clone()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert loss == step(parts[1])
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


@pytest.mark.no_kernel("PyTorch's operators are what can be recorded without a GPU")
def test_parts_of_another_shape_and_steps_that_look_at_results_are_refused(stand_in):
    model = torch.nn.Linear(3, 2)

    def loss(part):
        return model(part[0]).sum()

    def step(parts):
        return accumulate_gradients(loss, parts)

    graph = StepGraph(step, model)
    graph([(torch.ones(4, 3),)])
    for parts in ([(torch.ones(5, 3),)], [(torch.ones(4, 3),)] * 2):
        with pytest.raises(PortlmError, match="set cuda_graph = false"):
            graph(parts)
    looking = StepGraph(lambda parts: step(parts) if float(parts[0][0].sum()) else None, model)
    with pytest.raises(ConfigError, match="a step of this model cannot be recorded"):
        looking([(torch.ones(4, 3),)])


@pytest.mark.no_kernel("nothing is run")
@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["device=cpu"], "cuda_graph is for device cuda, not 'cpu'"),
        (["recompute=true"], "recompute asks for the state of random numbers"),
        (["layers.unfreeze=3"], r"layers\.unfreeze changes what a step computes"),
        (["data.packing=documents"], "is for decoders of objective causal with data.packing = stream"),
        (["objective=masked", "model.family=bert"], "is for decoders of objective causal"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_settings_that_no_graph_can_follow_are_refused(overrides, problem):
    from portlm import settings

    with pytest.raises(ConfigError, match=problem):
        settings.load(PretrainConfig, overrides=["device=cuda", "cuda_graph=true", *overrides])
    assert settings.load(PretrainConfig, overrides=["device=cuda", "cuda_graph=true"]).cuda_graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_of_recorded_steps_on_a_gpu_learns_what_one_without_learns(text, tmp_path):
    """Sums of PyTorch's kernels may have another order, so the losses are near and not the same."""
    runs = [
        pretrain(tiny(text, steps=6, device="cuda", cuda_graph=graph), tmp_path / str(graph), quiet=True)
        for graph in (False, True)
    ]
    assert runs[0].loss == pytest.approx(runs[1].loss, rel=1e-4)
