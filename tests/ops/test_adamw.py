"""AdamW against PyTorch's own in float64, over many steps, and what it does when something is wrong."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from portlm.ops.adamw import AdamW, gradient_norm_reference
from portlm.ops.kernel_op import kernels

SHAPES = [
    (1,),
    (33,),
    (7, 129),
    (0, 3),
    (),
    (200, 300),
]  # odd sizes hit the tail, the last spans several norm blocks
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}


def _parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def _gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    scale = 10.0 ** (step % 4 - 2)  # some steps are clipped, some are not
    return [torch.randn(s, generator=generator) * scale for s in SHAPES]


def _groups(params: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "lr": 1e-3},
    ]


def _run(
    kind: type, dtype: torch.dtype, steps: int = 40, clip: float | None = 1.0
) -> tuple[list[Tensor], list[float]]:
    params = _parameters(dtype)
    ours = kind is AdamW
    optimizer = kind(_groups(params), **SETTINGS, **({"max_grad_norm": clip} if ours else {}))
    norms = []
    for step in range(steps):
        for p, g in zip(params, _gradients(step), strict=True):
            p.grad = g.to(dtype)
        if ours:
            norms.append(optimizer.step())
        else:
            norms.append(float(nn.utils.clip_grad_norm_(params, math.inf if clip is None else clip)))
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.97
    state = [t for p in params for t in (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    return [*(p.detach() for p in params), *state], norms


@pytest.mark.parametrize("clip", [1.0, None], ids=["clipped", "unclipped"])
def test_adamw_is_as_accurate_as_pytorch_over_many_steps(clip, as_accurate):
    ours, norms = _run(AdamW, torch.float32, clip=clip)
    eager, _ = _run(torch.optim.AdamW, torch.float32, clip=clip)
    oracle, exact = _run(torch.optim.AdamW, torch.float64, clip=clip)
    for o, e, r in zip(ours, eager, oracle, strict=True):
        as_accurate(o, e, r)
    assert norms == pytest.approx(exact, rel=1e-6)


@pytest.mark.no_kernel("it is about the reference")
def test_the_reference_is_pytorchs_adamw():
    """In float64 the kernel does not apply, so this runs adamw_reference."""
    ours, norms = _run(AdamW, torch.float64)
    oracle, exact = _run(torch.optim.AdamW, torch.float64)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    assert norms == pytest.approx(exact, rel=1e-12)


def test_adamw_does_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    def run():
        tensors, norms = _run(AdamW, torch.float32, steps=3)
        return [*tensors, torch.tensor(norms, dtype=torch.float64)]

    assert same_on_all_thread_counts(run)


def test_the_norm_neither_overflows_nor_underflows():
    for scale in (1e-30, 1e30):
        p = nn.Parameter(torch.ones(1000))
        p.grad = torch.full((1000,), scale)
        assert AdamW([p], max_grad_norm=1.0).step() == pytest.approx(scale * math.sqrt(1000), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="kernel"),
        pytest.param(torch.float64, id="reference", marks=pytest.mark.no_kernel("float64 has none")),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(bad, dtype):
    params = _parameters(dtype)
    optimizer = AdamW(params, max_grad_norm=1.0)

    def step(poison):
        for p, g in zip(params, _gradients(0), strict=True):
            p.grad = g.to(dtype)
        if poison:
            params[2].grad[3, 5] = bad
        return optimizer.step()

    assert math.isfinite(step(False))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    assert not math.isfinite(step(True))
    torch.testing.assert_close((params, optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert math.isfinite(step(False))
    assert optimizer.state[params[0]]["step"] == 2


def test_parameters_without_a_gradient_are_left_alone():
    params = _parameters()
    optimizer = AdamW(params, **SETTINGS)
    assert optimizer.step() == 0.0
    for steps, active in enumerate(([0, 2], [2, 5], [0, 1, 2, 3, 4, 5], [2]), 1):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in params]
        for i in active:
            params[i].grad = _gradients(steps)[i]
        optimizer.step()
        changed = [i for i, (p, b) in enumerate(zip(params, before, strict=True)) if not torch.equal(p, b)]
        assert changed == [i for i in active if params[i].numel()]
        assert optimizer.state[params[2]]["step"] == steps


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_dropped_or_zeroed_between_steps(set_to_none):
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
        optimizer = kind(model.parameters(), **SETTINGS)
        for _ in range(5):
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.no_kernel("it is about the reference")
def test_strided_parameters_and_gradients_take_the_reference(as_accurate):
    results = []
    for kind, dtype in (
        (AdamW, torch.float32),
        (torch.optim.AdamW, torch.float32),
        (torch.optim.AdamW, torch.float64),
    ):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 4).to(dtype).t())
        q = nn.Parameter(torch.randn(4, 6).to(dtype))
        optimizer = kind([p, q], **SETTINGS)
        for _ in range(3):
            p.grad, q.grad = torch.randn(4, 6).to(dtype), torch.randn(6, 4).to(dtype).t()
            optimizer.step()
        results.append((p.detach(), q.detach()))
    for o, e, r in zip(*results, strict=True):
        as_accurate(o, e, r)


def test_weights_may_move_between_steps():
    p = nn.Parameter(torch.ones(10))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones(10)
    optimizer.step()
    p.data = torch.zeros(10)
    p.grad = torch.ones(10)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((10,), -0.1))


def test_weights_that_change_shape_are_refused():
    p = nn.Parameter(torch.ones(10))
    optimizer = AdamW([p])
    p.grad = torch.ones(10)
    optimizer.step()
    p.grad = None
    p.data = torch.ones(11)
    p.grad = torch.ones(11)
    with pytest.raises(RuntimeError, match=r"\[adamw\] a parameter became \(\(11,\)"):
        optimizer.step()


@pytest.mark.parametrize("other", [AdamW, torch.optim.AdamW], ids=["portlm", "torch"])
def test_state_is_interchangeable_and_continues_exactly(other):
    def take(optimizer, params, first, last):
        for step in range(first, last):
            for p, g in zip(params, _gradients(step), strict=True):
                p.grad = g.clone()
            optimizer.step()

    straight = _parameters()
    whole = AdamW(straight, **SETTINGS)
    take(whole, straight, 0, 6)

    params = _parameters()
    first = other(params, **SETTINGS)
    take(first, params, 0, 3)
    assert set(first.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    second = AdamW(params, **SETTINGS)
    saved = first.state_dict()
    for state in saved[
        "state"
    ].values():  # as from a checkpoint: read-only maps, which must not be written to
        state["exp_avg"] = state["exp_avg"].clone()
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    take(second, params, 3, 6)
    torch.testing.assert_close(
        saved["state"], kept["state"], rtol=0, atol=0
    )  # it may be a read-only map of a file
    tolerance = 0 if other is AdamW else 1e-6
    torch.testing.assert_close(params, straight, rtol=tolerance, atol=tolerance)
    assert second.state[params[0]]["step"] == 6


def test_a_state_of_other_shapes_is_refused():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    first, second = AdamW([p]), AdamW([q])
    p.grad = torch.ones(3)
    first.step()
    with pytest.raises(
        ValueError, match=r"\[adamw\] the state has no exp_avg of the parameter's shape \(4,\)"
    ):
        second.load_state_dict(first.state_dict())


def test_a_deep_copy_steps_on_its_own():
    p = nn.Parameter(torch.ones(5))
    optimizer = AdamW([p], max_grad_norm=0.5)
    p.grad = torch.ones(5)
    optimizer.step()
    clone = copy.deepcopy(optimizer)
    before = p.detach().clone()
    clone.param_groups[0]["params"][0].grad = torch.ones(5)
    clone.step()
    assert torch.equal(p, before)
    assert clone.max_grad_norm == 0.5
    assert not torch.equal(clone.param_groups[0]["params"][0], p)


def test_parameter_groups_can_be_added_later():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.add_param_group({"params": [q], "lr": 0.01})
    q.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.99))


def test_a_closure_computes_the_gradients():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = AdamW([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure) == pytest.approx(5.0)


def test_a_graph_that_needs_the_old_weights_notices_the_step():
    p = nn.Parameter(torch.ones(3))
    y = (p * p).sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_hundreds_of_small_tensors_are_one_call():
    params = [nn.Parameter(torch.randn(i % 7)) for i in range(300)]
    for p in params:
        p.grad = torch.ones_like(p)
    before = kernels.kernel_calls()["adamw_step"][kernels.isa()]
    norm = AdamW(params).step()
    assert kernels.kernel_calls()["adamw_step"][kernels.isa()] - before == 1
    assert norm == pytest.approx(gradient_norm_reference([p.grad for p in params]))


@pytest.mark.no_kernel("refused before a kernel is called")
def test_sparse_gradients_are_refused():
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match=r"\[adamw\] gradients must be dense"):
        AdamW([p]).step()


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    "setting",
    [{"lr": -1.0}, {"lr": math.nan}, {"betas": (1.0, 0.9)}, {"betas": (0.9,)}, {"eps": -1e-8},
     {"weight_decay": math.inf}, {"max_grad_norm": 0.0}, {"max_grad_norm": math.nan}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=rf"\[adamw\] {next(iter(setting))}"):
        AdamW([nn.Parameter(torch.ones(1))], **setting)
