"""GPT-2 small beside GPT-2 as one writes it in PyTorch today: a forward pass with its loss, and a training step.

The rivals are those of benchmarks/bench_training.py. Weights and arithmetic are float32, once with matrix products in
full precision and once in TF32; everybody has the same setting.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from context import ROOT, Context
from timing import Call, Case, Limits, compiled, race
from torch import Tensor

from portlm import models, settings
from portlm.train.config import PretrainConfig
from portlm.train.loop import accumulate_gradients
from portlm.train.setup import make_optimizer
from portlm.train.step_graph import StepGraph

sys.path.append(str(ROOT / "benchmarks"))
import bench_training
import training_rivals

BATCH = 8
GATE_STEPS = 5
# Loss of a model at its start, about 10.8: float32 sums differ by 1e-6 of it, TF32 rounds each factor to 2^-11.
TOLERANCE = {"highest": 1e-4, "high": 1e-2}


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _setting(context: Context) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """Return configuration, weights, and a batch of random tokens with their targets."""
    config: Any = models.preset("gpt2")
    if context.dry:
        config = type(config)(vocab_size=61, context_length=16, n_layer=1, n_head=2, width=16)
    torch.manual_seed(0)
    with torch.device(context.device):
        weights = {name: t.clone() for name, t in models.build(config, context.device).state_dict().items()}
        batch = 2 if context.dry else BATCH
        ids, targets = torch.randint(config.vocab_size, (2, batch, config.context_length)).unbind()
    return config, weights, ids, targets


def forward_race(context: Context) -> str:
    """The loss of a batch, without gradients."""
    config, weights, ids, targets = _setting(context)
    limits = Limits(context.dry)
    with torch.device(context.device):
        ours, plain = models.build(config, context.device), training_rivals.EagerGPT2(config)
    for model in (ours, plain):
        model.load_state_dict(weights)
        model.eval()
    for precision, tolerance in TOLERANCE.items():
        with _precision(precision):
            contenders: dict[str, Callable[..., Any]] = {
                "portlm": ours, "eager": plain, "compile": compiled(plain, context.dry),
                "transformers": _transformers_loss(context, ours),
            }  # fmt: skip
            case = Case(
                f"forward with loss, float32 ({precision}), {tuple(ids.shape)} tokens",
                {name: _no_grad(f, ids, targets) for name, f in contenders.items()},
                flops=bench_training.step_flops(config, len(ids)) / 3, tokens=ids.numel(), tolerance=tolerance,
            )  # fmt: skip
            race(context, case, limits)
    return "agrees" if context.dry else "see the figures"


def _no_grad(function: Callable[..., Any], *inputs: Tensor) -> Call:
    @torch.no_grad()
    def call() -> Any:
        return function(*inputs)

    return call


def _transformers_loss(context: Context, model: Any) -> Callable[..., Tensor]:
    """Return the loss of transformers' model with a copy of the weights; without the package, calling it says so."""
    loaded: list[Any] = []

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        if not loaded:
            import transformers

            config = model.config.to_hf()
            with torch.device(context.device):
                other = transformers.AutoModelForCausalLM.from_config(
                    transformers.AutoConfig.for_model(**config)
                )
            other.load_state_dict(
                {n: t.to(context.device) for n, t in models.hf_tensors(model).items()}, strict=False
            )
            other.tie_weights()
            loaded.append(other.eval())
        return F.cross_entropy(loaded[0](ids).logits.flatten(0, 1), targets.flatten())

    return loss


def step_race(context: Context) -> str:
    """Forward, backward, clipping and AdamW."""
    config, weights, ids, targets = _setting(context)
    options = settings.load(PretrainConfig, overrides=[("data.batch_size", len(ids))])
    limits = Limits(context.dry)
    rivals = ("eager",) if context.dry else ("eager", "compile")
    for precision, tolerance in TOLERANCE.items():
        with _precision(precision):
            torch._dynamo.reset()
            contenders: dict[str, Call] = {}
            for name in ("portlm", *rivals):
                # Only the parameters are made there by default: counts of steps stay on the host.
                with torch.device(context.device):
                    step = training_rivals.CONTESTANTS[name](config, weights, options)
                contenders[name] = _steps(step, ids, targets)
            if not context.dry:
                with torch.device(context.device):
                    contenders["portlm, as a graph"] = _steps(
                        _graph_step(config, weights, options, context.device), ids, targets
                    )
            case = Case(
                f"training step, float32 ({precision}), {tuple(ids.shape)} tokens", contenders,
                flops=bench_training.step_flops(config, len(ids)), tokens=ids.numel(), tolerance=tolerance,
            )  # fmt: skip
            race(context, case, limits)
    return "agrees" if context.dry else "see the figures"


def _graph_step(
    config: Any, weights: dict[str, Tensor], options: PretrainConfig, device: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a step of portlm whose forward and backward are one CUDA graph."""
    model = models.build(config, device)
    model.load_state_dict(weights)
    optimizer = make_optimizer(model.train(), options.optimizer)
    gradients = StepGraph(partial(accumulate_gradients, lambda batch: model(*batch)), model)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = gradients([(inputs, targets)]).clone()
        optimizer.step()
        return loss

    return step


def _steps(step: Callable[[Tensor, Tensor], Tensor], ids: Tensor, targets: Tensor) -> Call:
    """Return a call that makes one step; the first call makes several and returns their losses, for the comparison."""
    gate: list[Tensor] = []

    def call() -> Tensor:
        if gate:
            return step(ids, targets)
        gate.extend(step(ids, targets).detach() for _ in range(GATE_STEPS))
        return torch.stack(gate)

    return call
