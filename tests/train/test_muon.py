"""Muon against its definition in float64 and PyTorch's own, and as the optimiser of whole runs of every family."""

import copy
import dataclasses
import math

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from tiny_runs import newest, pretrain, tiny  # noqa: E402
from torch import nn  # noqa: E402

from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.models import DECODERS, build  # noqa: E402
from portlm.models.layers import Linear  # noqa: E402
from portlm.ops.adamw import AdamW  # noqa: E402
from portlm.train import state  # noqa: E402
from portlm.train.config import OptimizerSettings  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.muon import Muon, MuonWithAdamW, hidden_groups  # noqa: E402
from portlm.train.setup import make_optimizer  # noqa: E402
from portlm.weights import load_torch  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.runs_kernel("gemm")]

SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3}
# (shape, maps, turns): wide, tall, one row; three maps one after the other; in turn, in four turns of two rows each
MATRICES = [((5, 9), 1, 1), ((17, 6), 1, 1), ((1, 4), 1, 1), ((24, 8), 3, 1), ((24, 7), 3, 4)]
# What stands for rounding by luck alone, in a step of that length (tests/ops/test_newton_schulz.py has the reason).
LUCK = 16 * torch.finfo(torch.float32).eps


def _gradients(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) * 10.0 ** (step % 3) for shape, *_ in MATRICES]


def _by_definition(dtype, steps):
    """The algorithm as published, map by map and row by row."""
    weights = [torch.ones(shape, dtype=dtype) for shape, *_ in MATRICES]
    means = [torch.zeros_like(weight) for weight in weights]
    lr, mu = SETTINGS["lr"], SETTINGS["momentum"]
    for step in range(steps):
        for weight, mean, grad, (shape, maps, turns) in zip(
            weights, means, _gradients(step, dtype), MATRICES, strict=True
        ):
            mean.copy_(mu * mean + (1 - mu) * grad)
            ahead = mu * mean + (1 - mu) * grad
            weight *= 1 - lr * SETTINGS["weight_decay"]
            in_turn = shape[0] // (maps * turns)
            for one in range(maps):
                rows = [r for r in range(shape[0]) if r // in_turn % maps == one]
                x = ahead[rows] / ahead[rows].norm()
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                weight[rows] -= lr * 0.2 * math.sqrt(max(x.shape)) * x
    return weights, means


def _muon(dtype=torch.float32):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, *_ in MATRICES]
    groups = [{"params": [p], "maps": m, "turns": t} for p, (_, m, t) in zip(params, MATRICES, strict=True)]
    return params, Muon(groups, **SETTINGS)


def _run(dtype, steps):
    params, muon = _muon(dtype)
    for step in range(steps):
        for p, g in zip(params, _gradients(step, dtype), strict=True):
            p.grad = g
        muon.step()
    return [p.detach() for p in params], [muon.state[p]["momentum_buffer"] for p in params]


def test_muon_is_as_accurate_as_its_definition_in_plain_pytorch():
    ours, eager, oracle = (
        _run(torch.float32, 6),
        _by_definition(torch.float32, 6),
        _by_definition(torch.float64, 6),
    )
    for o, e, r, (shape, *_) in zip(ours[0], eager[0], oracle[0], MATRICES, strict=True):
        length = 6 * SETTINGS["lr"] * 0.2 * math.sqrt(max(shape))
        rounding = LUCK * length + torch.finfo(torch.float32).eps * float(r.abs().max())
        assert (o - r).abs().max() <= 2 * (e - r).abs().max() + rounding
    torch.testing.assert_close(ours[1], [m.float() for m in oracle[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.no_kernel("float64 has none")
def test_maps_that_lie_side_by_side_move_as_matrices_of_their_own():
    start = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = nn.Parameter(start.clone())
    apart = [nn.Parameter(part.clone()) for part in start.chunk(3, 1)]
    both = Muon([{"params": [together], "maps": 3, "across": True}], **SETTINGS), Muon(apart, **SETTINGS)
    for step in range(3):
        together.grad = torch.randn(
            start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        )
        for part, grad in zip(apart, together.grad.chunk(3, 1), strict=True):
            part.grad = grad.clone()
        for muon in both:
            muon.step()
    torch.testing.assert_close(together.detach(), torch.cat([part.detach() for part in apart], 1))


@pytest.mark.no_kernel("float64 has none")
def test_muon_in_float64_is_the_definition():
    ours, oracle = _run(torch.float64, 6), _by_definition(torch.float64, 6)
    torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)


def test_muon_is_pytorchs_up_to_the_rounding_of_its_products_and_takes_its_state():
    """PyTorch multiplies in bfloat16, which moves a step by a few parts in 256."""
    start = torch.randn(12, 20)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([ours], **SETTINGS)
    other = torch.optim.Muon([theirs], **SETTINGS, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        ours.grad, theirs.grad = (torch.randn(12, 20, generator=torch.Generator().manual_seed(step)),) * 2
        muon.step()
        other.step()
    assert (ours - theirs).norm() < 0.05 * (ours - start).norm()
    mean = other.state[theirs]["momentum_buffer"]
    assert torch.equal(muon.state[ours]["momentum_buffer"], mean)
    again = Muon([ours], **SETTINGS)
    again.load_state_dict(
        {"state": other.state_dict()["state"], "param_groups": again.state_dict()["param_groups"]}
    )
    kept = again.state[ours]["momentum_buffer"]
    assert torch.equal(kept, mean)
    assert kept.data_ptr() != mean.data_ptr()


def test_without_a_gradient_nothing_moves_and_with_one_of_zeros_weights_decay():
    params, muon = _muon()
    muon.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    params[0].grad = torch.zeros_like(params[0])
    muon.step()
    torch.testing.assert_close(params[0].detach(), torch.full((5, 9), 1 - 0.02 * 0.3))
    assert torch.equal(params[1], torch.ones_like(params[1]))


@pytest.mark.no_kernel("refused before anything is computed")
def test_settings_out_of_range_are_refused():
    weight = nn.Parameter(torch.ones(6, 4))
    for name, value in (("lr", -1.0), ("lr", math.nan), ("momentum", 1.0), ("weight_decay", math.inf)):
        with pytest.raises(ValueError, match=rf"\[muon\] {name} must be"):
            Muon([weight], **{name: value})
    for shape, maps in (((6,), 1), ((2, 3, 4), 1), ((6, 4), 4)):
        with pytest.raises(ValueError, match=r"\[muon\] a parameter must be a matrix"):
            Muon([{"params": [nn.Parameter(torch.ones(shape))], "maps": maps}])
    muon = Muon([weight])
    groups = muon.state_dict()["param_groups"]
    for wrong in ({}, {"momentum_buffer": torch.zeros(4, 6)}):
        with pytest.raises(ValueError, match=r"no momentum_buffer of the parameter's shape \(6, 4\)"):
            muon.load_state_dict({"state": {0: {"other": 1.0, **wrong}}, "param_groups": groups})


def _model(family):
    torch.manual_seed(0)
    return build(dataclasses.replace(DECODERS[family].config_class().tiny(), context_length=50))


@pytest.mark.no_kernel("it is about which parameter goes where")
@pytest.mark.parametrize("family", DECODERS)
def test_every_parameter_has_one_optimiser_and_muon_has_the_matrices_of_the_blocks(family):
    model = _model(family)
    optimizer = make_optimizer(model, OptimizerSettings(name="muon"))
    muon, adamw = ([p for group in part.param_groups for p in group["params"]] for part in optimizer.parts)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names[p] for p in muon + adamw) == sorted(names.values())
    # By shape alone: of the matrices, tables and heads have a side of the vocabulary or of the context, others do not.
    outside = {model.config.vocab_size, model.config.context_length, model.config.context_length + 2}  # OPT's
    assert not outside & {model.config.width, model.config.hidden}
    assert {names[p] for p in muon} == {
        name for p, name in names.items() if p.dim() == 2 and p.shape[0] not in outside
    }
    assert {p.dim() for p in muon} == {2}


@pytest.mark.no_kernel("it is about which parameter goes where")
def test_decay_and_rates_are_those_of_adamw():
    """Matrices decay, vectors do not, whoever updates them, and all groups can be given a rate."""
    model = _model("gpt2")
    groups = {
        name: {
            p: group["weight_decay"]
            for group in make_optimizer(model, o).param_groups
            for p in group["params"]
        }
        for name in ("adamw", "muon")
        for o in (OptimizerSettings(name=name, weight_decay=0.25),)
    }
    assert groups["adamw"] == groups["muon"]
    optimizer = make_optimizer(model, OptimizerSettings(name="muon", lr=0.5))
    for group in optimizer.param_groups:
        assert group["lr"] == 0.5
        group["lr"] = 0.125
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.125}


@pytest.mark.no_kernel("it is about what a layer declares")
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_the_maps_that_a_layer_declares_are_the_ones_its_model_computes(family):
    """Without values attention gives zeros; without queries it weighs all alike, and so it does without keys."""
    block = next(m for m in _model(family).modules() if isinstance(m, nn.ModuleList))[0]
    attention = block.attn if family == "gpt2" else block.attention
    layers = [m for m in attention.modules() if isinstance(m, Linear)]
    [fused] = [layer for layer in layers if layer.maps == 3]
    for layer in layers:
        nn.init.zeros_(layer.bias)
    x, weight = torch.randn(2, 7, fused.weight.shape[1]), fused.weight.detach().clone()
    rotation = () if family == "gpt2" else (torch.ones(7, attention.rotary_dim // 2),) * 2

    def without(one):
        with torch.no_grad():
            fused.weight.copy_(weight)
            fused.weight.view(fused.turns, 3, -1, weight.shape[1])[:, one] = 0
            return attention(x, *rotation, None, None)[0]

    queries, keys, values = (without(one) for one in range(3))
    assert torch.equal(values, torch.zeros_like(values))
    assert keys.abs().max() > 0
    torch.testing.assert_close(queries, keys)


@pytest.mark.no_kernel("it is about which parameter goes where")
def test_a_model_without_hidden_matrices_is_refused_and_frozen_ones_are_left_out():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Linear(3, 5, bias=True)

    with pytest.raises(
        ConfigError, match=r"optimizer\.name muon .* this model has none: train it with adamw"
    ):
        make_optimizer(Bag(), OptimizerSettings(name="muon"))
    model = _model("llama")
    frozen = model.layers[0].requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerSettings(name="muon"))
    given = {p for group in optimizer.param_groups for p in group["params"]}
    assert given == set(model.parameters()) - set(frozen.parameters())


def _step_of_both(max_grad_norm, scale=1.0, poison=None):
    generator = torch.Generator().manual_seed(3)
    weight, bias = (nn.Parameter(torch.ones(shape)) for shape in ((8, 6), (8,)))
    optimizer = MuonWithAdamW(Muon([weight]), AdamW([bias]), max_grad_norm)
    for number in range(2):
        for p in (weight, bias):
            p.grad = scale * torch.randn(p.shape, generator=generator)
        if number and poison is not None:
            before = copy.deepcopy((weight, bias, [part.state_dict()["state"] for part in optimizer.parts]))
            bias.grad[2] = poison
            assert not math.isfinite(optimizer.step())
            after = (weight, bias, [part.state_dict()["state"] for part in optimizer.parts])
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        else:
            expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in (weight, bias)))
            assert optimizer.step() == pytest.approx(expected, rel=1e-6)
    return optimizer.parts[0].state[weight]["momentum_buffer"], optimizer.parts[1].state[bias]["exp_avg"]


def test_both_are_clipped_by_the_norm_of_all_gradients_together():
    """Seen in what they remember: a hundred times the gradients and the same bound leave the same running means."""
    loose, tight = _step_of_both(1e9), _step_of_both(0.5)
    torch.testing.assert_close(_step_of_both(0.5, scale=100.0), tight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(_step_of_both(None), loose, rtol=0, atol=0)
    assert all(clipped.norm() < 0.5 * free.norm() for clipped, free in zip(tight, loose, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_of_either(bad):
    _step_of_both(1.0, poison=bad)


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=pytest.mark.runs_kernel("gemm_bf16"))]
)
@pytest.mark.parametrize("family", DECODERS)
def test_every_family_learns_with_muon(text, tmp_path, family, precision):
    """40 steps at the default rate: enough that the held-out loss has fallen, and saved is what was trained."""
    config = tiny(
        text, model__family=family, precision=precision, steps=40, optimizer__name="muon",
        evaluation__sample_tokens=0, checkpoint__interval=40,
    )  # fmt: skip
    result = pretrain(config, tmp_path / "run", quiet=True)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert result.loss < 0.95 * next(r["loss"] for r in records if r["kind"] == "eval")
    assert all(math.isfinite(r["grad_norm"]) and r["lr"] > 0 for r in records if r["kind"] == "train")
    remembered = load_torch(newest(tmp_path / "run") / "optimizer.safetensors")
    assert {t.dtype for t in remembered.values()} == {torch.float32}
    assert {name.rpartition("/")[2] for name in remembered} == {
        "momentum_buffer",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }


@pytest.mark.no_kernel("it is about what a resume refuses")
def test_a_run_of_one_optimiser_cannot_be_resumed_with_the_other(text, tmp_path):
    for first, second in (("adamw", "muon"), ("muon", "adamw")):
        run = tmp_path / first
        pretrain(tiny(text, steps=4, optimizer__name=first), run, quiet=True)
        before = (run / "config.toml").read_bytes()
        message = f"optimizer.name is '{first}' in the checkpoint and '{second}' now: leave it out to resume"
        with pytest.raises(ConfigError, match=message):
            pretrain(tiny(text, steps=6, optimizer__name=second), run, resume="auto", quiet=True)
        assert (run / "config.toml").read_bytes() == before


@pytest.mark.no_kernel("refused before anything is computed")
def test_what_the_checkpoint_remembers_must_be_muons():
    model = _model("llama")
    optimizer = make_optimizer(model, OptimizerSettings(name="muon"))
    name = "layers.0.mlp.up_proj.weight"
    shape = dict(model.named_parameters())[name].shape
    with pytest.raises(FormatError, match=r"cannot go on here: .*no momentum_buffer"):
        state.set_optimizer_state(model, optimizer, {f"{name}/exp_avg": torch.zeros(shape)}, {})


@pytest.mark.no_kernel("refused before anything is computed")
def test_names_and_settings_that_do_not_exist_are_errors(text):
    with pytest.raises(
        ConfigError, match=r"optimizer\.name: expected one of adamw, muon, adagrad, nt-asgd, got 'adam'"
    ):
        tiny(text, "optimizer.name=adam")
    with pytest.raises(ConfigError, match="optimizer is a section, not a value"):
        tiny(text, "optimizer=muon")
    with pytest.raises(ConfigError, match=r"optimizer\.momentum is Muon's: leave it out, or set"):
        tiny(text, "optimizer.momentum=0.8")
    with pytest.raises(ConfigError, match=r"optimizer\.momentum must be at least 0"):
        tiny(text, "optimizer.momentum=1", "optimizer.name=muon")
    assert tiny(text, "optimizer.momentum=0.8", "optimizer.name=muon").optimizer.momentum == 0.8
    assert tiny(text).optimizer.name == "adamw"


@pytest.mark.no_kernel("it is about groups")
def test_hidden_groups_hold_a_layer_once_and_by_what_it_declares():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.ModuleList([Linear(3, 3, bias=True), Linear(3, 9, bias=False, maps=3)])
            self.blocks = nn.ModuleList([nn.ModuleDict({"experts": inner})])

    model = Nested()
    first, second = model.blocks[0]["experts"]
    assert hidden_groups(model) == [
        {"params": [first.weight], "maps": 1, "turns": 1, "across": False},
        {"params": [second.weight], "maps": 3, "turns": 1, "across": False},
    ]
