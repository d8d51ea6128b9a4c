"""Nobody is timed before its logits agree with the model's own: eager PyTorch in float32 on the checkpoint.

The text is random tokens, read as a prompt and then one by one, so that the prompt's path, the cache and the path of
a single token are all in the comparison. Which token comes next is given, not chosen: an engine that would choose
another one is still compared on the same text.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portlm.agreement import within
from portlm.errors import EngineUnavailableError, ParityError
from portlm.flows.race.contender import Array, Contender

BYTE_CACHE = "f32, cache of 8 bits"
PROMPT, STEPS = 64, 64  # tokens, less where the model's context is shorter


@dataclass(frozen=True)
class Bar:
    """How far logits of a precision may be from the reference, as a share of the reference's standard deviation.

    Attributes:
        largest: of any logit; None where the typical one says enough.
        typical: root of the mean square over all logits.
        reason: why there.
    """

    largest: float | None
    typical: float
    reason: str


BARS = {
    "f32": Bar(
        1e-3, 1e-3,
        "float32 summed in another order stayed below 1e-5; one cache or product in half precision moves 2e-3 "
        "and more",
    ),
    "f32, GELU from a table": Bar(
        5e-3, 5e-3,
        "llama.cpp looks GELU up in a table of half precision, whatever its weights are: 2e-3 in GPT-2 and GPT-NeoX",
    ),
    BYTE_CACHE: Bar(
        None, 0.03,
        "a number of a key or value in 8 bits is off by 1/254 of its vector's largest at most, and layers add up; "
        "weights of 4 bits move ten times as much",
    ),
    "f16": Bar(None, 0.03, "half precision has 8 or 11 bits, and some ten roundings lie behind each other"),
    "q8": Bar(None, 0.1, "a weight in 8 bits is off by 1/250 of its block's largest, activations as well"),
    "q4": Bar(
        None, 0.7,
        "a weight in 4 bits is off by 1/15 of its block's largest: 0.1 for each matrix, and they add up. The logits of "
        "another model are 1.4 away, those of one layer left out about 1",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """What the comparison gave.

    Attributes:
        largest: difference of any logit, as a share of the reference's standard deviation.
        typical: root of the mean square difference, as the same share.
        top1: share of positions at which the same token is the most probable.
        kl: Kullback-Leibler divergence from the reference, in nats per token.
        tokens: positions compared.
    """

    largest: float
    typical: float
    top1: float
    kl: float
    tokens: int


def reference(checkpoint: Path, seed: int = 7) -> tuple[Array, Array, str]:
    """The text, the logits behind its prompt and behind every further token, and who computed them.

    transformers in eager mode where it is installed, else portlm's model without kernels.

    Returns:
        ids (P + S,) int64, logits (S + 1, V) float32, and a name.

    Raises:
        EngineUnavailableError: PyTorch is not installed.
    """
    from portlm.models import load_config

    config = load_config(checkpoint)
    room = config.context_length
    prompt, steps = min(PROMPT, max(1, room // 2)), min(STEPS, max(1, room // 4))
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, prompt + steps)
    if importlib.util.find_spec("torch") is None:
        raise EngineUnavailableError(
            "the race compares logits with eager PyTorch first, which is not installed: pip install portlm[train]"
        )
    import torch

    text = torch.from_numpy(ids)[None]
    with torch.inference_mode():
        if importlib.util.find_spec("transformers") is not None:
            import transformers

            open_model = transformers.AutoModelForCausalLM.from_pretrained
            theirs = open_model(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
            logits, who = theirs(text).logits, f"transformers {transformers.__version__}, eager, float32"
        else:
            from portlm.models import load_model
            from portlm.ops.kernel_op import without_kernels

            model: Any = load_model(checkpoint)
            with without_kernels():
                logits = model.step(text, torch.arange(len(ids))[None], torch.ones_like(text))[0]
            who = "portlm's model on PyTorch's operators, float32"
    return ids, logits[0, prompt - 1 :].float().numpy(), who


def answer(contender: Contender, ids: Array, steps: int) -> Array:
    """What a contender says behind the prompt and behind each of the last `steps` tokens: (steps + 1, V) float32."""
    contender.reset()
    prompt = len(ids) - steps
    rows = [np.array(contender.read(ids[:prompt]))]
    rows += [np.array(contender.read(ids[i : i + 1])) for i in range(prompt, len(ids))]
    return np.stack(rows).astype(np.float32)


def compare(got: Array, wanted: Array) -> Agreement:
    """Compare logits (n, V) with the reference's.

    Raises:
        ParityError: another number of them.
    """
    if got.shape != wanted.shape:
        raise ParityError(f"its logits are {got.shape}, the model's {wanted.shape}")
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    scale = wanted.std() or 1.0
    error = np.abs(got - wanted)
    log_p, log_q = _log_softmax(wanted), _log_softmax(got)
    return Agreement(
        largest=float(error.max() / scale),
        typical=float(np.sqrt((error**2).mean()) / scale),
        top1=float((got.argmax(1) == wanted.argmax(1)).mean()),
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
        tokens=len(wanted),
    )


def check(agreement: Agreement, bar: str) -> None:
    """Raise ParityError if a contender is further away than one of BARS allows; NaN always is."""
    bars, figures = asdict(BARS[bar]), asdict(agreement)
    for name in ("largest", "typical"):
        if bars[name] is not None and not within(figures[name], bars[name]):
            raise ParityError(
                f"not timed: its logits are wrong. The {name} difference is {figures[name]:.2g} of their standard "
                f"deviation, and {bar} allows {bars[name]:g}"
            )


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result
