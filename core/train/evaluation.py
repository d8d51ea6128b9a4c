"""Two ways to see what a model has learned: its loss on held-out text, and text it writes.

B batch, T time, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from portlm.data.batches import IGNORE, Tokens, evaluation_batches
from portlm.errors import ContextLengthError
from portlm.ops.token_selection import select_tokens

if TYPE_CHECKING:
    from portlm.models import Model
    from portlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """Text the model never trains on.

    Attributes:
        tokens: What the model is asked to predict.
        before: The token in front of it, so that the first one has some context as well.
        text_bytes: Bytes of UTF-8 that the tokens stand for.
    """

    tokens: Tokens
    before: int
    text_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts held-out text.

    Attributes:
        loss: Mean negative log-likelihood in nats per token. Depends on the tokenizer.
        bits_per_byte: The same total in bits, per byte of text. Comparable between tokenizers.
    """

    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class SampleOptions:
    """How a sample is drawn, by the names that decoding options have elsewhere.

    Attributes:
        max_new_tokens: Fewer when the text ends.
        temperature: 0 takes the most probable token.
        top_k: 0 means no limit.
        seed: The same weights and seed give the same text.
    """

    max_new_tokens: int
    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0


def never() -> bool:
    """Do not stop."""
    return False


def evaluate(
    model: "Model", held_out: HeldOut, batch_size: int, device: torch.device, stop: Callable[[], bool] = never
) -> Evaluation | None:
    """Predict every held-out token once, in windows of the model's context.

    A token at the start of a window sees little before it, so this is an upper bound on what a sliding window
    would measure. No random number is drawn.

    Args:
        model: Any mode; dropout is off meanwhile.
        held_out: What to predict.
        batch_size: Windows per forward pass.
        device: Where the model is.
        stop: Asked before each pass whether to give up; the result is then None.
    """
    total, count = 0.0, 0
    batches = evaluation_batches(held_out.tokens, batch_size, model.config.context_length, held_out.before)
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:  # both (B, T)
            if stop():
                return None
            predicted = int((targets != IGNORE).sum())
            loss = model(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
            total += loss.item() * predicted
            count += predicted
    return Evaluation(total / count, total / math.log(2) / held_out.text_bytes)


def sample(
    model: "Model",
    tokenizer: "Tokenizer",
    prompt: str,
    options: SampleOptions,
    *,
    device: torch.device | None = None,
    stop: Callable[[], bool] = never,
) -> str:
    """Return the prompt and the tokens that follow it, until the options, the end of the text or ``stop`` say so.

    When the context is full, writing goes on from its second half. PyTorch's generators are not touched.

    Raises:
        ContextLengthError: The prompt alone fills the context.
    """
    context = model.config.context_length
    ids = prompt_ids(tokenizer, prompt, context)
    window, past = list(ids), None
    with evaluating(model), torch.no_grad():
        for step in range(options.max_new_tokens):
            if stop():
                break
            slots = past[0][0].shape[2] if past else 0
            if slots + len(window) > context:
                window, past, slots = ids[-max(context // 2, 1) :], None, 0
            feed = torch.tensor([window], device=device)  # (1, T)
            positions = torch.arange(slots, slots + len(window), device=device)[None]
            mask = torch.ones(1, slots + len(window), dtype=torch.int64, device=device)
            logits, past = model.step(feed, positions, mask, past)
            last = logits[:, -1].float().cpu().numpy()  # (1, V)
            top_k = min(options.top_k, last.shape[1])
            token = int(select_tokens(last, options.temperature, top_k, seed=options.seed, step=step)[0])
            if token == tokenizer.eos_id:
                break
            ids.append(token)
            window = [token]
    return tokenizer.decode(ids)


def prompt_ids(tokenizer: "Tokenizer", prompt: str, context: int) -> list[int]:
    """Return the tokens a sample begins with, at least one and at most what the context holds.

    Raises:
        ContextLengthError: The prompt is longer than the context.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id or 0]
    if len(ids) > context:
        raise ContextLengthError(len(ids), context, "evaluation.prompt")
    return ids


@contextmanager
def evaluating(model: "Model | nn.Module") -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
