"""What llama.cpp calls the families, their tensors and their settings, and in which order it keeps rows.

The names are those of the package `gguf`, which llama.cpp's authors publish. One row of ARCHITECTURES is all that is
known of a family; both ways, out of a checkpoint and into one, are read from it (gguf_models.py).

H heads, D head width, R the rotated part of it, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from portlm.errors import FormatError, UsageError
from portlm.files import shown

Array = np.ndarray


@dataclass(frozen=True)
class Turn:
    """How llama.cpp keeps a tensor otherwise: there and back, each (tensor, config) -> tensor.

    Attributes:
        there: Into a GGUF file.
        back: Out of one.
        computes: Whether numbers become others, for which those of 16 bits are widened first, and not only their order.
        transposes: Whether rows become columns.
    """

    there: Callable[[Array, Any], Array]
    back: Callable[[Array, Any], Array]
    computes: bool = False
    transposes: bool = False


def neighbours(matrix: Array, heads: int) -> Array:
    """Rows of a query or key matrix (heads * D, C), from pairs (i, i + D/2) of a head to pairs (2i, 2i + 1).

    llama.cpp rotates neighbours in the architecture llama, Hugging Face's files the halves of a head.
    """
    D = len(matrix) // heads
    return matrix.reshape(heads, 2, D // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def halves(matrix: Array, heads: int) -> Array:
    """The inverse of `neighbours`."""
    D = len(matrix) // heads
    return matrix.reshape(heads, D // 2, 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def apart(tensor: Array, heads: int) -> Array:
    """Rows of a joint matrix or bias (3 * C, ...), from (q, k, v) of each head in turn to all q, all k, all v."""
    return tensor.reshape(heads, 3, len(tensor) // heads // 3, -1).swapaxes(0, 1).reshape(tensor.shape)


def in_turn(tensor: Array, heads: int) -> Array:
    """The inverse of `apart`."""
    return tensor.reshape(3, heads, len(tensor) // heads // 3, -1).swapaxes(0, 1).reshape(tensor.shape)


def kv_heads(config: Any) -> int:
    """Return how many heads of keys and values a configuration has."""
    return int(getattr(config, "n_kv_head", config.n_head))


def _turned(tensor: Array, _: Any) -> Array:
    return tensor.T if tensor.ndim == 2 else tensor


_MATRIX = Turn(_turned, _turned, transposes=True)  # GPT-2's Conv1D keeps its matrices (in, out)
_QUERY = Turn(lambda x, c: neighbours(x, c.n_head), lambda x, c: halves(x, c.n_head))
_KEY = Turn(lambda x, c: neighbours(x, kv_heads(c)), lambda x, c: halves(x, kv_heads(c)))
_JOINT = Turn(lambda x, c: apart(x, c.n_head), lambda x, c: in_turn(x, c.n_head))
# The norms of Gemma multiply by 1 + weight; llama.cpp keeps the sum.
_GAIN = Turn(lambda x, _: x + np.float32(1), lambda x, _: x - np.float32(1), computes=True)


@dataclass(frozen=True)
class Architecture:
    """A family as llama.cpp knows it.

    Attributes:
        name: what llama.cpp calls it.
        whole: modules outside the layers, by their names in Hugging Face's files.
        layer: the prefix of layer 0 there, without its number.
        modules: modules of a layer.
        settings: entries of the metadata, after the architecture's name, and their keys in config.json.
        fixed: keys of config.json that the architecture stands for.
        optional: entries of `settings` and `used` that may be missing.
        turns: tensors that are kept otherwise.
        derived: makes the remaining keys of config.json, from the entries that are named in `used`.
        used: those entries.
        extra: makes the remaining entries from a configuration; UsageError for what llama.cpp cannot be told.
        shown: keys of config.json that are true if there is such a tensor.
        tied: whether config.json says if embedding and output are one matrix.
    """

    name: str
    whole: dict[str, str]
    layer: str
    modules: dict[str, str]
    settings: dict[str, str]
    fixed: dict[str, Any]
    optional: frozenset[str] = frozenset()
    turns: dict[str, Turn] = field(default_factory=dict)
    derived: Callable[[dict[str, Any]], dict[str, Any]] = lambda entries: {}
    used: frozenset[str] = frozenset()
    extra: Callable[[Any], dict[str, Any]] = lambda config: {}
    shown: dict[str, str] = field(default_factory=dict)
    tied: bool = True


def _unwritten(what: str) -> UsageError:
    return UsageError(f"llama.cpp: no GGUF is written for {what}")


_ORIGINAL_CONTEXT, _ATTENTION_FACTOR = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
# YaRN's bounds, which llama.cpp has one set of for these architectures, whatever a file says.
_YARN_BOUNDS = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
_YARN = frozenset((_ORIGINAL_CONTEXT, _ATTENTION_FACTOR, *_YARN_BOUNDS))
_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")


def _same(entries: dict[str, Any], *names: str) -> int | None:
    """Return what the entries say that are there, which must be alike."""
    said = {name: entries[name] for name in names if name in entries}
    if len(set(said.values())) > 1:
        raise FormatError(f"has heads of different widths: {', '.join(f'{k} {v}' for k, v in said.items())}")
    return next(iter(said.values()), None)


def _head_width(entries: dict[str, Any]) -> dict[str, Any]:
    """Return head_dim where it is said, which must be said alike of queries, values and rotation."""
    width = _same(entries, *_WIDTHS)
    return {} if width is None else {"head_dim": width}


def _scaling(entries: dict[str, Any], yarn: bool = False) -> dict[str, Any]:
    """Return the key for positions that are stretched evenly or, if the row of the family has its entries, by YaRN."""
    kind, factor = entries.get("rope.scaling.type", "none"), entries.get("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear", *["yarn"] * yarn):
        raise FormatError(
            f"stretches positions by {shown(kind)}, and portlm reads linear{' and yarn' * yarn}"
        )
    if kind == "yarn":
        return {"rope_scaling": _yarn_keys(entries, factor)}
    stretched = kind == "linear" and factor != 1
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}} if stretched else {}


def _grouped_keys(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the keys for heads, and for positions that are stretched evenly."""
    return _head_width(entries) | _scaling(entries, yarn=True)


def _sharpened(factor: float) -> float:
    """Return what llama.cpp multiplies queries and keys by, beside attn_factor, where YaRN stretches positions."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_keys(entries: dict[str, Any], factor: float) -> dict[str, Any]:
    """Return rope_scaling of YaRN; llama.cpp's own numbers are those that portlm takes for None."""
    said = {"rope_type": "yarn", "factor": factor}
    said["original_max_position_embeddings"] = entries.get(_ORIGINAL_CONTEXT, entries["context_length"])
    for entry, usual in _YARN_BOUNDS.items():
        if entries.get(entry, usual) != usual:
            raise FormatError(f"has {entry} {entries[entry]:g}, for which llama.cpp takes {usual:g}")
    share = entries.get(_ATTENTION_FACTOR, 1.0)
    return said if share == 1 else said | {"attention_factor": share * _sharpened(factor)}


def _yarn_entries(scaling: Any) -> dict[str, Any]:
    """Return the entries of YaRN."""
    if not scaling.truncate or (scaling.beta_fast, scaling.beta_slow) != (*_YARN_BOUNDS.values(),):
        raise _unwritten("YaRN with other bounds than from 32 turns to 1, rounded to whole pairs")
    factor, share = float(scaling.factor), scaling.size / _sharpened(scaling.factor)
    entries = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    entries[_ORIGINAL_CONTEXT] = scaling.original_max_position_embeddings
    return entries if share == 1 else entries | {_ATTENTION_FACTOR: share}


def _rotary_entries(config: Any, yarn: bool = False) -> dict[str, Any]:
    """Return what is said of the rotated part of heads and of stretched positions."""
    entries, scaling = {"rope.dimension_count": config.rotary_dim}, config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # that lies in a tensor
        return entries
    if scaling.kind == "longrope":  # whose factors lie in tensors
        original = scaling.original_max_position_embeddings
        return entries | {_ORIGINAL_CONTEXT: original, _ATTENTION_FACTOR: float(scaling.size)}
    if scaling.kind == "yarn" and yarn:
        return entries | _yarn_entries(scaling)
    if scaling.kind != "linear":
        raise _unwritten(f"rotary positions that are stretched by {scaling.kind}")
    return entries | {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}


def _head_entries(config: Any, yarn: bool = False) -> dict[str, Any]:
    """Return that and what is said of heads."""
    return dict.fromkeys(_WIDTHS, config.head_dim) | _rotary_entries(config, yarn)


def _grouped_entries(config: Any) -> dict[str, Any]:
    """Return the same of a family whose windows llama.cpp does not know."""
    if getattr(config, "window", 0):
        raise _unwritten(f"a sliding window, here of {config.window} positions")
    return _head_entries(config, yarn=True)


def _rotary_share(entries: dict[str, Any]) -> dict[str, Any]:
    width, heads = entries["embedding_length"], entries["attention.head_count"]
    return {"rotary_pct": entries["rope.dimension_count"] / (width // max(heads, 1))} | _scaling(entries)


def _partly_rotated(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of families that may rotate a part of each head."""
    width = _same(entries, *_WIDTHS[:2])
    keys = {} if width is None else {"head_dim": width}
    whole = width or entries["embedding_length"] // max(entries["attention.head_count"], 1)
    return keys | {"partial_rotary_factor": entries["rope.dimension_count"] / max(whole, 1)}


def _stablelm_keys(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the same for StableLM, whose heads divide the width."""
    keys = _partly_rotated(entries)
    width = keys.pop("head_dim", None)
    if width not in (None, entries["embedding_length"] // max(entries["attention.head_count"], 1)):
        raise FormatError(f"has heads of width {width}, which do not divide its width")
    return keys | _scaling(entries, yarn=True)


def _phi3_keys(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the same for Phi-3, with its window; what stretches its positions lies in tensors."""
    keys = _partly_rotated(entries) | _scaling(entries)
    original = entries.get(_ORIGINAL_CONTEXT, entries["context_length"])
    window = entries.get("attention.sliding_window", 0)
    return keys | {"sliding_window": window or None, "original_max_position_embeddings": original}


def _smollm3_entries(config: Any) -> dict[str, Any]:
    if config.unplaced_interval != 4:
        raise _unwritten("SmolLM3 with other layers without positions than every fourth")
    if config.attention_bias or config.mlp_bias:
        raise _unwritten("SmolLM3 with biases")
    return _grouped_entries(config)


def _scores_by(n_layer: int, width: int, n_head: int, head_dim: int, largest: int) -> int:
    """Return the number by whose root llama.cpp divides Gemma's scores: that of its largest model is another."""
    return width // max(n_head, 1) if n_layer == largest else head_dim


def _gemma(turn: int, largest: int) -> dict[str, Any]:
    """Return the functions of a row for Gemma 2 or 3.

    Args:
        turn: How many layers follow each other until one sees everything.
        largest: The number of layers of the largest published model.
    """

    def derived(entries: dict[str, Any]) -> dict[str, Any]:
        if entries.get("attention.sliding_window_pattern", turn) != turn:
            raise FormatError(
                f"has a window in {shown(entries['attention.sliding_window_pattern'])}, not {turn}, layers in turn"
            )
        keys = _grouped_keys(entries)
        heads, width = entries["attention.head_count"], entries["embedding_length"]
        keys.setdefault("head_dim", width // max(heads, 1))
        scalar = _scores_by(entries["block_count"], width, heads, keys["head_dim"], largest)
        return keys | {"query_pre_attn_scalar": scalar}

    def extra(config: Any) -> dict[str, Any]:
        scalar = _scores_by(config.n_layer, config.width, config.n_head, config.head_dim, largest)
        if config.query_scalar != scalar:
            raise _unwritten(
                f"scores that are divided by the root of {config.query_scalar}: llama.cpp takes that of {scalar}"
            )
        kinds = [kind == "full_attention" for kind in config.kinds]
        if kinds != [(layer + 1) % turn == 0 for layer in range(config.n_layer)]:
            raise _unwritten(f"other layers with a window than all but every {turn}th")
        return _head_entries(config)

    return {"derived": derived, "extra": extra}


def _gemma2_entries(config: Any) -> dict[str, Any]:
    if not (config.score_cap and config.logit_cap):
        raise _unwritten("Gemma 2 without a soft cap of scores or of logits")
    entries: dict[str, Any] = _GEMMA_2["extra"](config)
    return entries


_GEMMA_2 = _gemma(2, largest=46)
_GEMMA_3 = _gemma(6, largest=62)
_GROUPED = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}  # fmt: skip
_GROUPED_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GROUPED_MODULES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_GAINS = (
    "attn_norm",
    "post_attention_norm",
    "ffn_norm",
    "post_ffw_norm",
    "attn_q_norm",
    "attn_k_norm",
    "output_norm",
)
_GPT2 = Architecture(
    name="gpt2",
    whole={"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"},
    layer="transformer.h",
    modules={
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    },
    settings={
        "context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
        "feed_forward_length": "n_inner", "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon", "vocab_size": "vocab_size",
    },
    fixed={"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    turns=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _MATRIX),
    used=frozenset(("attention.head_count_kv",)),
    optional=frozenset(("attention.head_count_kv",)),
    tied=False,
)  # fmt: skip
_NEOX = Architecture(
    name="gptneox",
    whole={"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output"},
    layer="gpt_neox.layers",
    modules={
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    settings={
        "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads", "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual", "rope.freq_base": "rotary_emb_base",
        "vocab_size": "vocab_size",
    },
    fixed={"model_type": "gpt_neox"},
    turns={"attn_qkv": _JOINT},
    optional=frozenset(("rope.freq_base", "attention.head_count_kv")),
    derived=_rotary_share,
    used=frozenset(("rope.dimension_count", "attention.head_count_kv")),
    extra=_rotary_entries,
)  # fmt: skip
_LLAMA = Architecture(
    name="llama",
    whole=_GROUPED_WHOLE,
    layer="model.layers",
    modules=_GROUPED_MODULES,
    settings=_GROUPED,
    fixed={"model_type": "llama"},
    turns={"attn_q": _QUERY, "attn_k": _KEY},
    optional=frozenset(("attention.head_count_kv", "rope.freq_base", *_WIDTHS)) | _YARN,
    derived=_grouped_keys,
    used=frozenset(_WIDTHS) | _YARN,
    extra=_grouped_entries,
    shown={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
)


def _after_llama(family: str, name: str = "", **changes: Any) -> Architecture:
    """Return the row of a family that differs from LLaMA's in little; its rows are kept in the order of their files."""
    known: dict[str, Any] = {"fixed": {"model_type": family}, "turns": {}, "shown": {}}
    return replace(_LLAMA, name=name or family, **known | changes)


_SCORED = {"attention_bias": "blk.0.attn_q.bias"}
_GEMMA_SETTINGS = _GROUPED | {
    "attention.sliding_window": "sliding_window",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_USED = frozenset((*_WIDTHS, "attention.sliding_window_pattern"))
_GEMMA_OPTIONAL = _LLAMA.optional | {"attention.sliding_window_pattern", "final_logit_softcapping"}

# portlm's family -> what llama.cpp knows of it.
ARCHITECTURES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "gpt_neox": _NEOX,
    "mistral": replace(_LLAMA, fixed={"model_type": "mistral", "sliding_window": None}, shown={}),
    "qwen2": _after_llama("qwen2"),
    "qwen3": _after_llama("qwen3", modules=_GROUPED_MODULES | _HEAD_NORMS, shown=_SCORED),
    "olmo2": _after_llama(
        "olmo2",
        modules={
            **{name: part for name, part in _GROUPED_MODULES.items() if part not in ("attn_norm", "ffn_norm")},
            **{name: part for name, part in _FOUR_NORMS.items() if part != "ffn_norm"},
            **_HEAD_NORMS,
        },
        shown=_SCORED,
    ),
    "gemma2": _after_llama(
        "gemma2",
        modules=_GROUPED_MODULES | _FOUR_NORMS,
        settings=_GEMMA_SETTINGS | {"attn_logit_softcapping": "attn_logit_softcapping"},
        turns=dict.fromkeys(_GAINS, _GAIN),
        optional=_GEMMA_OPTIONAL | {"attention.sliding_window", "attn_logit_softcapping"},
        used=_GEMMA_USED,
        derived=_GEMMA_2["derived"],
        extra=_gemma2_entries,
    ),
    "gemma3_text": _after_llama(
        "gemma3_text",
        "gemma3",
        modules=_GROUPED_MODULES | _FOUR_NORMS | _HEAD_NORMS,
        settings=_GEMMA_SETTINGS | {"rope.freq_base_swa": "rope_local_base_freq"},
        turns=dict.fromkeys(_GAINS, _GAIN),
        optional=_GEMMA_OPTIONAL | {"rope.freq_base_swa"},
        used=_GEMMA_USED,
        **_GEMMA_3,
    ),
    "phi3": _after_llama(
        "phi3",
        modules={
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        },
        optional=_LLAMA.optional
        - {"rope.dimension_count"}
        | {"attention.sliding_window", _ORIGINAL_CONTEXT, _ATTENTION_FACTOR},
        used=frozenset((*_WIDTHS, "attention.sliding_window", _ORIGINAL_CONTEXT, _ATTENTION_FACTOR)),
        derived=_phi3_keys,
        extra=lambda config: _grouped_entries(config) | {"attention.sliding_window": 0},
    ),
    "stablelm": _after_llama(
        "stablelm",
        settings={
            **{entry: key for entry, key in _GROUPED.items() if key != "rms_norm_eps"},
            "attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual",
        },
        optional=_LLAMA.optional - {"rope.dimension_count"},
        derived=_stablelm_keys,
        shown={"use_qkv_bias": "blk.0.attn_q.bias"},
    ),
    "smollm3": _after_llama("smollm3", turns=_LLAMA.turns, extra=_smollm3_entries),
}  # fmt: skip
