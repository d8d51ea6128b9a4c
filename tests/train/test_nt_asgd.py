"""NT-ASGD against its definition in float64, when averaging begins, what is kept, and how a run goes on."""

import math
import shutil

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from tiny_runs import TEXT, digest, newest, pretrain, tiny, told  # noqa: E402
from torch import nn  # noqa: E402

from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.models import build, load_model  # noqa: E402
from portlm.models.awd_lstm import AWDLSTMConfig  # noqa: E402
from portlm.train import state  # noqa: E402
from portlm.train.checkpoint import list_checkpoints  # noqa: E402
from portlm.train.config import OptimizerSettings  # noqa: E402
from portlm.train.nt_asgd import NTASGD, averages_in, observe  # noqa: E402
from portlm.train.setup import make_optimizer  # noqa: E402
from portlm.weights import load_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(5, 3), (7,)]
RATE, DECAY, CLIP = 0.3, 0.01, 0.5


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def test_it_is_gradient_descent_and_from_the_trigger_on_the_mean_of_its_iterates():
    params = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in SHAPES]
    ours = NTASGD(params, RATE, DECAY, patience=1, max_grad_norm=CLIP)
    weights = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    losses, iterates = [3.0, 2.0, 2.5], []
    for step in range(9):
        if (
            step % 2 == 0 and not iterates
        ):  # 3, 2 and 2.5, which is above neither 3 nor what came just before it
            loss = losses.pop(0) if losses else 4.0  # above 2
            if ours.validated(loss):
                iterates = [[w.clone() for w in weights]]
                assert step == 6
        grads = gradients(step)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        for p, w, g in zip(params, weights, grads, strict=True):
            p.grad = g
            w -= RATE * (DECAY * w + min(1, CLIP / (norm + 1e-6)) * g)
        assert ours.step() == pytest.approx(norm)
        if iterates:
            iterates.append([w.clone() for w in weights])
    assert len(iterates) == ours.count == 4
    torch.testing.assert_close([p.detach() for p in params], weights, rtol=1e-12, atol=1e-12)
    with ours.averaged():
        means = [torch.stack(each).mean(0) for each in zip(*iterates, strict=True)]
        torch.testing.assert_close([p.detach() for p in params], means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([p.detach() for p in params], weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("losses", "patience", "begins"),
    [
        ([5, 4, 3, 2, 1], 1, None),
        ([5, 4, 5], 1, None),  # 5 is not above 5, and 4 is the last one
        ([5, 4, 3, 4.5], 1, 3),  # above 4
        ([5, 4, 3, 4.5], 2, None),  # the 4 is one of the last two
        ([5, 4, 3, 4.5, 4.5], 2, 4),
        ([1, 2], 1, None),  # not before there are more than n
        ([1, 2, 3], 1, 2),
        ([1] * 9, 3, None),
    ],
    ids=str,
)
def test_averaging_begins_with_a_loss_above_the_best_of_all_but_the_last_ones(losses, patience, begins):
    optimizer = NTASGD([nn.Parameter(torch.ones(2))], patience=patience)
    said = [optimizer.validated(float(loss)) for loss in losses]
    assert said == [place == begins for place in range(len(losses))]


def test_averages_stand_in_for_the_weights_and_give_them_back_to_the_last_bit():
    model = build(AWDLSTMConfig.tiny())
    optimizer = make_optimizer(model, OptimizerSettings(name="nt-asgd", lr=0.1, weight_decay=0.0, patience=1))
    for loss in (1.0, 2.0, 3.0):
        began = observe(optimizer, loss)
    assert began
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        model(ids, ids).backward()
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with averages_in(optimizer):
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        with pytest.raises(RuntimeError, match="stop"), averages_in(optimizer):
            raise RuntimeError("stop")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.no_kernel("nothing is computed")
def test_an_optimizer_that_asks_for_no_losses_is_left_alone():
    model = build(AWDLSTMConfig.tiny())
    optimizer = make_optimizer(model, OptimizerSettings())
    assert not observe(optimizer, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    with averages_in(optimizer):
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = NTASGD([p], patience=1)
    for loss in (1.0, 2.0, 3.0):
        optimizer.validated(loss)
    p.grad = torch.tensor([1.0, math.inf, 0.0])
    assert optimizer.step() == math.inf
    assert torch.equal(p, torch.ones(3))
    assert optimizer.count == 1


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def descending(text, **more):
    """A rate that is far too high: the held-out loss goes up and down, and averaging begins soon."""
    values = {
        "model__family": "awd_lstm", "model__hidden": 24, "model__weight_dropout": 0.2, "optimizer__name": "nt-asgd",
        "optimizer__lr": 40.0, "schedule__min_lr": 40.0, "schedule__warmup": 0.0, "optimizer__weight_decay": 1.2e-6,
        "optimizer__patience": 2, "evaluation__interval": 2, "steps": 16, "checkpoint__interval": 2,
        "checkpoint__keep": 9,
    } | more  # fmt: skip
    return tiny_without_heads(text, values)


def tiny_without_heads(text, values):
    from portlm import settings
    from portlm.train.config import PretrainConfig

    given = {
        "log_interval": 3, "model.n_layer": 2, "model.width": 16, "model.context_length": 16, "data.batch_size": 4,
        "evaluation.max_tokens": 128, "evaluation.sample_tokens": 20, "data.texts": [str(text)], "threads": 1,
    } | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
    return settings.load(PretrainConfig, overrides=[*given.items()])


def begun(run):
    """Return the first step whose checkpoint has averages."""
    found = list_checkpoints(run / "checkpoints")
    return next(step for step, path in found if load_torch(path / "optimizer.safetensors"))


def test_a_resumed_run_repeats_the_uninterrupted_one_before_and_after_averaging_begins(text, tmp_path):
    config = descending(text)
    pretrain(config, tmp_path / "whole", quiet=True)
    first = begun(tmp_path / "whole")
    assert 6 <= first <= 10, "neither end of the run is a test of both"
    for name, kept in (("before", first - 2), ("at", first), ("after", first + 4)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "final")
        for step, path in list_checkpoints(tmp_path / name / "checkpoints"):
            if step > kept:
                shutil.rmtree(path)
        pretrain(config, tmp_path / name, resume="auto", quiet=True)
        ours, theirs = (newest(tmp_path / each) for each in (name, "whole"))
        assert (ours.name, digest(ours)) == ("step-16", digest(theirs))
        finals = [(tmp_path / each / "final" / "model.safetensors").read_bytes() for each in (name, "whole")]
        assert finals[0] == finals[1]
        evaluations = [
            [(line["step"], line["loss"]) for line in told(tmp_path / each) if line["kind"] == "eval"]
            for each in ("whole", name)
        ]
        assert evaluations[0] == evaluations[1]


def test_the_average_is_what_is_judged_and_kept_and_the_iterate_goes_on(text, tmp_path):
    done = pretrain(descending(text), tmp_path / "run", quiet=True)
    last = tmp_path / "run" / "checkpoints" / "step-16"
    averages = load_torch(last / "optimizer.safetensors")
    kept, gone_on = (dict(load_model(path).named_parameters()) for path in (done.checkpoint, last))
    assert {f"{name}/average" for name in kept} == {*averages}
    for name, p in kept.items():
        assert torch.equal(p, averages[f"{name}/average"])
        assert not torch.equal(p, gone_on[name])


@pytest.mark.no_kernel("refused before anything is computed")
def test_a_memory_that_does_not_fit_is_refused():
    model = build(AWDLSTMConfig.tiny())
    fresh = make_optimizer(model, OptimizerSettings(name="nt-asgd", weight_decay=0.0, patience=1))
    for loss in (1.0, 2.0, 3.0):
        fresh.validated(loss)
    tensors, numbers = state.optimizer_state(model, fresh)
    assert numbers == {"/losses": [1.0, 2.0, 3.0], "/count": 1}

    def put(tensors, numbers, name="nt-asgd"):
        other = make_optimizer(model, OptimizerSettings(name=name))
        state.set_optimizer_state(model, other, tensors, numbers)
        return other

    assert put(tensors, numbers).count == 1
    one = next(iter(tensors))
    for wrong in (
        (tensors, {"/losses": [1.0]}),
        (tensors, {"/count": 1}),
        (tensors, numbers | {"/losses": ["1"]}),
        (tensors, numbers | {"/count": 0}),
        ({}, numbers),
        ({key: value for key, value in tensors.items() if key != one}, numbers),
        ({**tensors, one: torch.ones(1)}, numbers),
        ({**{k: v for k, v in tensors.items() if k != one}, one + "s": tensors[one]}, numbers),
    ):
        with pytest.raises(FormatError, match="the checkpoint's optimiser"):
            put(*wrong)
    with pytest.raises(FormatError, match="remembers '/losses', which is no parameter"):
        put({}, numbers, name="adamw")


@pytest.mark.no_kernel("refused before anything is computed")
def test_settings_out_of_range_are_refused(text):
    weight = nn.Parameter(torch.ones(3))
    for name, value in (("lr", -1.0), ("lr", math.nan), ("weight_decay", math.inf)):
        with pytest.raises(ValueError, match=rf"\[nt-asgd\] {name} must be"):
            NTASGD([weight], **{name: value})
    with pytest.raises(ValueError, match=r"\[nt-asgd\] patience must be at least 1"):
        NTASGD([weight], patience=0)
    with pytest.raises(ValueError, match=r"\[nt-asgd\] max_grad_norm must be above 0"):
        NTASGD([weight], max_grad_norm=0.0)
    for more, message in (
        ({"optimizer__name": "adamw", "optimizer__patience": 3}, r"optimizer\.patience is NT-ASGD's"),
        ({"optimizer__name": "nt-asgd", "optimizer__patience": 0}, r"optimizer\.patience must be at least 1"),
        (
            {"optimizer__name": "nt-asgd", "optimizer__lr": 30.0},
            r"optimizer\.weight_decay 0\.1 times .* takes all",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(text, **more)
