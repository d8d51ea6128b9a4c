"""Attention without an order: every query sees every key that a mask does not hide, of its own sequence or of another.

Shapes: B sequences, T queries and S keys of each, H query heads, K key/value heads (K divides H: query head h uses
h // (H / K)), D the width of a head. Encoders look at themselves with it (T = S; Devlin et al. 2018, arXiv:1810.04805),
decoders at what an encoder made (Vaswani et al. 2017, arXiv:1706.03762), and a bias on the scores says how far apart
two positions are (Raffel et al. 2020, arXiv:1910.10683).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import kernel_op, lazy
from portlm.ops.cached_attention import MASKED, stacked_heads, unstacked_heads
from portlm.ops.kernel_op import KernelOp
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["masked_attention", "masked_attention_reference"]


def masked_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    G = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, S, D)
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill((mask == 0)[:, None, None, :], float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # a query that sees nothing gives 0
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (weights @ v).transpose(1, 2)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(q k^T scale + bias) v over the keys j of row b with mask[b, j] != 0.

    Differentiable in q, k, v and bias.

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D); query head h uses key/value head h // (H / K).
        v: (B, S, K, D).
        mask: (B, S) int64, 0 where a key is padding; None if none is.
        bias: (H or 1, T, S), or (B or 1, H or 1, T, S) where rows differ; added to the scores.
        scale: of the scores before the bias; None means 1 / sqrt(D).

    Returns:
        (B, T, H, D). A query that sees nothing gives 0.

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    _check(q, k, v, mask, bias)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    if not kernel_op._exporting:
        return masked_attention_reference(q, k, v, mask, bias, scale)
    return _fused(q, k, v, mask, bias, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    def wrong(what: str) -> ValueError:
        return ValueError(f"[masked_attention] {what}")

    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]
    if not fits or q.shape[3] != k.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise wrong(
            "q must be (B, T, H, D), k and v (B, S, K, D) with K a divisor of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    (B, T, H, _), S = q.shape, k.shape[1]
    if mask is not None and (mask.shape != (B, S) or mask.dtype is not torch.int64):
        raise wrong(f"mask must be int64 ({B}, {S}), got {mask.dtype} {tuple(mask.shape)}")
    if bias is None:
        return
    rows, heads = (1, *bias.shape[:-2])[-2:] if bias.dim() in (3, 4) else (-1, -1)
    if rows not in (1, B) or heads not in (1, H) or bias.shape[-2:] != (T, S):
        raise wrong(f"bias must be ({H} or 1, {T}, {S}), got {tuple(bias.shape)}")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    return masked_attention_reference(q, k, v, mask, bias, scale).contiguous()


def _empty(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape)


_fused = KernelOp("masked_attention", _forward, fake=_empty)


def _hidden_keys(g: Builder, mask: str) -> tuple[str, str]:
    """Return what is added to scores (B, 1, 1, S): 0, or -1e30 where the mask hides; and (B, 1, 1): 0 if all are."""

    def seen() -> str:
        return g.op("Gather", (g.floats("mask.values", range(2)), mask), g.unique("keys.seen"), axis=0)

    def added() -> str:
        hidden = g.op("Sub", (g.scalar(1.0), ones), g.unique("keys.hidden"))  # (B, S)
        bias = g.op("Mul", (hidden, g.scalar(MASKED)), g.unique("keys.masked"))
        return g.op("Unsqueeze", (bias, g.ints(1, 2)), g.unique("keys.bias"))

    def any_seen() -> str:
        most = g.op("ReduceMax", (ones, g.ints(-1)), g.unique("keys.any"), keepdims=1)  # (B, 1)
        return g.op("Unsqueeze", (most, g.ints(2)), g.unique("keys.rows"))

    ones = g.shared(f"keys that {mask} shows", seen)
    return g.shared(f"bias of keys by {mask}", added), g.shared(f"rows with keys by {mask}", any_seen)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    """Attention in plain products; the queries that share a key/value head are stacked along time, (B, K, G*T, D)."""
    q, k, v, mask, bias = inputs
    (out,) = outputs
    H, K, D = (attributes[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
    across = g.op("Transpose", (k,), f"{out}.keys_across", perm=[0, 2, 3, 1])  # (B, K, D, S)
    values = g.op("Transpose", (v,), f"{out}.values", perm=[0, 2, 1, 3])  # (B, K, S, D)
    scaled = g.op("Mul", (q, g.scalar(attributes["scale"])), f"{out}.scaled")
    scores = g.op("MatMul", (stacked_heads(g, scaled, out, H, K, D), across), f"{out}.scores")
    if bias:
        if H != K:
            scores = g.op("Reshape", (scores, g.ints(0, H, -1, 0)), f"{out}.apart")  # (B, H, T, S)
        scores = g.op("Add", (scores, bias), f"{out}.near")
        if H != K:
            scores = g.op("Reshape", (scores, g.ints(0, K, -1, 0)), f"{out}.stacked")
    if mask:
        hidden, rows = _hidden_keys(g, mask)
        scores = g.op("Add", (scores, hidden), f"{out}.biased")
    shares = g.op("Softmax", (scores,), f"{out}.shares", axis=-1)
    context = g.op("MatMul", (shares, values), f"{out}.context")  # (B, K, G*T, D)
    unstacked_heads(g, context, f"{out}.seen" if mask else out, H, K, D)
    if mask:
        g.op("Mul", (f"{out}.seen", rows), out)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    _, _, H, D = arguments["q"].shape
    return {
        "num_heads": H,
        "num_kv_heads": arguments["k"].shape[2],
        "head_dim": D,
        "scale": arguments["scale"],
    }


SPEC = OpSpec(
    name="masked_attention",
    summary="attention to every key that a mask shows, with a bias",
    nodes=(
        Node(
            op_type="MaskedAttention",
            torch=("portlm::masked_attention",),
            inputs=(
                Input("q", heads="num_heads"),
                Input("k", heads="num_kv_heads"),
                Input("v", heads="num_kv_heads"),
                Input("mask", dtype="int64", optional=True),
                Input("bias", optional=True),
            ),
            outputs=("y",),
            attributes=(
                Attribute("num_heads", int),
                Attribute("num_kv_heads", int),
                Attribute("head_dim", int),
                Attribute("scale", float),
            ),
            read=_read,
            shapes=lambda shapes, attributes: [shapes[0]],
            portable=_portable,
        ),
    ),
)
