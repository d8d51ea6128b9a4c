"""Two ways to see what a model has learned: its loss on held-out text, and text it writes.

B batch, T time, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from portlm.arguments import whole
from portlm.data.batches import IGNORE, Tokens, evaluation_batches
from portlm.errors import ContextLengthError
from portlm.runtimes.decoding import Decoding

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
    decoding: Decoding,
    *,
    device: torch.device | None = None,
    stop: Callable[[], bool] = never,
) -> str:
    """Return the prompt and the tokens that follow it, until the options, the end of the text or ``stop`` say so.

    When the context is full, writing goes on from its second half, with the next seed. PyTorch's generators are not
    touched.

    Args:
        model: Any mode; dropout is off meanwhile.
        tokenizer: Its own.
        prompt: How the text begins.
        decoding: How it goes on; its max_new_tokens may be more than the context holds.
        device: Where the model is.
        stop: Asked before each piece of text whether to give up; the result is then what there is so far.

    Raises:
        ContextLengthError: The prompt is longer than the context.
    """
    from portlm.runtimes.eager import TorchEngine
    from portlm.runtimes.session import Session

    context = model.config.context_length
    ids = prompt_ids(tokenizer, prompt, context)
    window, left, seed = list(ids), whole("max_new_tokens", decoding.max_new_tokens, low=1), decoding.seed
    with evaluating(model):
        session = Session(TorchEngine.of(model, str(device or "cpu")), tokenizer)
        while left:
            if len(window) == context:
                window = ids[-max(context // 2, 1) :]
            part = replace(decoding, max_new_tokens=min(left, context - len(window)), seed=seed)
            stream = session.stream(window, decoding=part)
            for _ in stream:
                if stop():
                    stream.close()
                    break
            if stream.generation is None:
                break
            new = stream.generation.token_ids
            ended = stream.generation.finish_reason == "eos"
            ids += new[:-1] if ended else new
            if ended:
                break
            window, left, seed = list(ids[-context:]), left - len(new), whole("seed", seed) + 1
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
