"""What an exporter and an engine need to know of a live module: its functions, and the tensors that go in and out.

A model file declares its roles in `roles()`, beside the code they describe. `Role` is one of them; `decoder` makes the
usual one, of a causal decoder with a key/value cache, from the model's own `step`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from portlm.roles import StateSpec, TensorSpec

TOTAL = "past + sequence"


@dataclass(frozen=True)
class Role:
    """One function of a module.

    Attributes:
        function: takes the inputs and then the states, one positional tensor each, and returns one flat tuple: the
            outputs, and then the new value of every state that has an output.
        inputs: in the order of the arguments.
        outputs: in the order of the result.
        state: in the order of the arguments; those with an output also in the order of the result.
    """

    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...] = ()


def decoder(
    step: Callable[..., Any],
    *,
    vocab_size: int,
    caches: Sequence[tuple[int, int]],
    more: tuple[TensorSpec, ...] = (),
    given: tuple[StateSpec, ...] = (),
) -> Role:
    """Return the role of a causal decoder with a key/value cache.

    Args:
        step: bound method `step(input_ids, position_ids, attention_mask, past, logits_to_keep)` that returns logits
            (B, kept, V) and, layer by layer, keys and values (B, K, P + T, D). A wrapper such as `torch.no_grad()`
            is taken off: a graph has no gradient, and would keep the wrapper as a node.
        vocab_size: V.
        caches: (K, D) of each layer: key/value heads and their width.
        more: inputs that step takes beside these, behind logits_to_keep.
        given: constant states that it takes behind those.
    """
    plain, others = _unwrapped(step), len(more) + len(given)

    def function(
        input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, logits_to_keep: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        also, flat = rest[:others], rest[others:]
        past = list(zip(flat[::2], flat[1::2], strict=True))
        logits, present = plain(input_ids, position_ids, attention_mask, past, logits_to_keep, *also)
        return logits, *(tensor for layer in present for tensor in layer)

    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", TOTAL)),
        TensorSpec("position_ids", "int64", ("batch", "sequence")),
        TensorSpec("logits_to_keep", "int64", ("kept",)),
        *more,
    )
    state = given + tuple(
        StateSpec(
            f"past_key_values.{layer}.{kind}",
            f"present.{layer}.{kind}",
            "float32",
            ("batch", heads, "past", width),
            "empty",
            "append",
        )
        for layer, (heads, width) in enumerate(caches)
        for kind in ("key", "value")
    )
    outputs = (TensorSpec("logits", "float32", ("batch", "kept", vocab_size)),)
    return Role(function, inputs, outputs, state)


def roles_of(module: nn.Module) -> dict[str, Role] | None:
    """Return the roles that a module declares, or None where it declares none."""
    declare = getattr(module, "roles", None)
    return declare() if callable(declare) and not isinstance(declare, nn.Module) else None


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method without the wrappers around its function."""
    owner = getattr(method, "__self__", None)
    function = inspect.unwrap(getattr(method, "__func__", method))
    return function if owner is None else function.__get__(owner)
