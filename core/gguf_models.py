"""What llama.cpp calls the families, their tensors and their settings, and in which order it keeps rows.

The names are those of the package `gguf`, which llama.cpp's authors publish. One row of ARCHITECTURES is all that is
known of a family; both ways, out of a checkpoint and into one, are read from it.

H heads, D head width, C width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from portlm.errors import FormatError, UsageError
from portlm.files import shown

Array = np.ndarray


@dataclass(frozen=True)
class Turn:
    """How llama.cpp keeps a tensor otherwise: there and back, each (tensor, config) -> tensor."""

    there: Callable[[Array, Any], Array]
    back: Callable[[Array, Any], Array]


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


def _turned(tensor: Array, _: Any) -> Array:
    return tensor.T if tensor.ndim == 2 else tensor


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "n_kv_head", config.n_head))


_MATRIX = Turn(_turned, _turned)  # GPT-2's Conv1D keeps its matrices (in, out)
_QUERY = Turn(lambda x, c: neighbours(x, c.n_head), lambda x, c: halves(x, c.n_head))
_KEY = Turn(lambda x, c: neighbours(x, _kv_heads(c)), lambda x, c: halves(x, _kv_heads(c)))
_JOINT = Turn(lambda x, c: apart(x, c.n_head), lambda x, c: in_turn(x, c.n_head))


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
        optional: entries of `settings` that may be missing.
        turns: tensors that are kept otherwise.
        derived: makes the remaining keys of config.json, from the entries that are named in `used`.
        used: those entries.
        extra: makes the remaining entries, from a configuration.
        shown: keys of config.json that are true if there is such a tensor.
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


def _rotary_share(entries: dict[str, Any]) -> dict[str, Any]:
    width, heads = entries["embedding_length"], entries["attention.head_count"]
    return {"rotary_pct": entries["rope.dimension_count"] / (width // max(heads, 1))}


def _head_width(entries: dict[str, Any]) -> dict[str, Any]:
    """Return head_dim where it is said, which must be said alike of queries, values and rotation."""
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    said = {name: entries[name] for name in names if name in entries}
    if len(set(said.values())) > 1:
        raise FormatError(f"has heads of different widths: {', '.join(f'{k} {v}' for k, v in said.items())}")
    return {"head_dim": next(iter(said.values()))} if said else {}


def _grouped_keys(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the keys for heads, and for positions that are stretched evenly."""
    kind, factor = entries.get("rope.scaling.type", "none"), entries.get("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise FormatError(f"stretches positions by {shown(kind)}, and portlm reads linear")
    scaling = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
    return _head_width(entries) | ({} if scaling is None else {"rope_scaling": scaling})


def _grouped_entries(config: Any) -> dict[str, Any]:
    """Return what is said of heads and of stretched positions."""
    entries = dict.fromkeys(sorted(_WIDTHS), config.head_dim)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # that lies in a tensor
        return entries
    if scaling.kind != "linear":
        raise UsageError(
            f"llama.cpp: no GGUF is written for rotary positions that are stretched by {scaling.kind}"
        )
    return entries | {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}


def rotary_factors(width: int, theta: float, scaling: Any) -> Array:
    """Return how many times more slowly each pair of a head turns (D/2,), as llama.cpp keeps Llama 3.1's positions."""
    import torch

    plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / scaling.slowed(plain, theta)).float().numpy()


def rotary_scaling(factors: Array, width: int, theta: float) -> dict[str, Any] | None:
    """Return the published scaling of Llama 3.1 or 3.2 that has these factors, as rope_scaling of config.json."""
    from portlm.models.rope import Llama3

    for factor in (8.0, 32.0):
        scaling = Llama3(factor, 1.0, 4.0, 8192)
        if factors.shape == (width // 2,) and np.allclose(
            factors, rotary_factors(width, theta, scaling), rtol=1e-4
        ):
            return scaling.to_hf()
    return None


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
_WIDTHS = frozenset(("attention.key_length", "attention.value_length", "rope.dimension_count"))

# portlm's family -> what llama.cpp knows of it.
ARCHITECTURES = {
    "gpt2": Architecture(
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
    ),
    "llama": Architecture(
        name="llama",
        whole=_GROUPED_WHOLE,
        layer="model.layers",
        modules=_GROUPED_MODULES,
        settings=_GROUPED,
        fixed={"model_type": "llama"},
        turns={"attn_q": _QUERY, "attn_k": _KEY},
        optional=frozenset(("attention.head_count_kv", "rope.freq_base")),
        derived=_grouped_keys,
        used=_WIDTHS,
        extra=_grouped_entries,
        shown={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    "gpt_neox": Architecture(
        name="gptneox",
        whole={
            "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
        },
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
        optional=frozenset(("rope.freq_base",)),
        derived=_rotary_share,
        used=frozenset(("rope.dimension_count", "attention.head_count_kv")),
        extra=lambda config: {"rope.dimension_count": config.rotary_dim},
    ),
}  # fmt: skip
_ROTATED = {
    "llama": ARCHITECTURES["llama"],
    "mistral": replace(ARCHITECTURES["llama"], fixed={"model_type": "mistral", "sliding_window": None}, shown={}),
    "qwen2": replace(ARCHITECTURES["llama"], name="qwen2", fixed={"model_type": "qwen2"}, turns={}, shown={}),
    "qwen3": replace(
        ARCHITECTURES["llama"],
        name="qwen3",
        fixed={"model_type": "qwen3"},
        modules=_GROUPED_MODULES | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
        turns={},
        shown={"attention_bias": "blk.0.attn_q.bias"},
    ),
    "olmo2": replace(
        ARCHITECTURES["llama"],
        name="olmo2",
        fixed={"model_type": "olmo2"},
        modules={name: part for name, part in _GROUPED_MODULES.items() if part not in ("attn_norm", "ffn_norm")}
        | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
           "post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
        turns={},
        shown={"attention_bias": "blk.0.attn_q.bias"},
    ),
}  # fmt: skip
ARCHITECTURES |= _ROTATED
ROTARY_FACTORS = "rope_freqs.weight"
_OUTPUT = "output.weight"
# Entries that say that nothing unusual is done.
_NOTHING = {
    "rope.scaling.type": None, "rope.scaling.factor": None, "attention.causal": True, "rope.scale_linear": 1.0,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "expert_count": 0, "expert_used_count": 0,
    "tensor_data_layout": None,
}  # fmt: skip
_LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)\.(weight|bias)")


def architecture_of(family: str) -> Architecture:
    """Return what llama.cpp knows of a family.

    Raises:
        UsageError: nothing.
    """
    if family not in ARCHITECTURES:
        raise UsageError(
            f"llama.cpp: no GGUF is written for the family {family}, only {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[family]


def gguf_name(name: str, family: str) -> tuple[str, Turn | None]:
    """Return what llama.cpp calls a tensor of model.safetensors, and how it keeps it otherwise.

    Raises:
        UsageError: there is no such name.
    """
    known = architecture_of(family)
    if (match := _LAYER.fullmatch(name)) and match[1] == known.layer and match[3] in known.modules:
        part = known.modules[match[3]]
        return f"blk.{match[2]}.{part}.{match[4]}", known.turns.get(part)
    whole, _, kind = name.rpartition(".")
    if whole in known.whole:
        return f"{known.whole[whole]}.{kind}", None
    raise UsageError(f"llama.cpp: GGUF has no name for {name} of the family {family}")


def gguf_tensors(tensors: Mapping[str, Array], config: Any) -> dict[str, Array]:
    """The tensors of model.safetensors under GGUF's names, each (out, in), in their own number formats.

    Raises:
        UsageError: a family or a tensor that has no name there.
    """
    found = {}
    for name, tensor in tensors.items():
        target, turn = gguf_name(name, config.family)
        found[target] = np.ascontiguousarray(tensor if turn is None else turn.there(tensor, config))
    return found


def gguf_settings(config: Any) -> dict[str, Any]:
    """The metadata that describes a configuration, after the architecture's name."""
    known, said = architecture_of(config.family), config.to_hf()
    entries = {entry: said[key] for entry, key in known.settings.items() if said.get(key) is not None}
    if "feed_forward_length" not in entries:
        entries["feed_forward_length"] = config.hidden
    entries.setdefault("attention.head_count_kv", _kv_heads(config))
    return entries | known.extra(config)


def hf_config(entries: Mapping[str, Any], tensors: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Return the config.json that the metadata of a GGUF file stands for.

    Args:
        entries: all of the metadata.
        tensors: by name, each with a shape.
        path: of the file, for errors.

    Raises:
        FormatError: the architecture, or something said of it, is none that portlm reads. It is named.
    """
    name = entries.get("general.architecture")
    family = next((family for family, known in ARCHITECTURES.items() if known.name == name), None)
    if family is None:
        known_names = ", ".join(known.name for known in ARCHITECTURES.values())
        raise FormatError(f"{path}: general.architecture is {shown(name)}, and portlm reads {known_names}")
    if entries.get("split.count", 1) not in (0, 1):
        raise FormatError(f"{path}: split.count says that this is a part of a model: join the parts first")
    known, prefix = ARCHITECTURES[family], f"{name}."
    own = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    for key, value in own.items():
        if key in known.settings or key in known.used:
            if isinstance(value, list):
                raise FormatError(f"{path}: {prefix}{key} differs between layers, which is not supported")
            if not isinstance(value, int | float):
                raise FormatError(f"{path}: {prefix}{key} is {shown(value)}, not a number")
        elif key not in _NOTHING or (value != _NOTHING[key] and _NOTHING[key] is not None):
            raise FormatError(f"{path}: {prefix}{key} = {shown(value)} is not supported")
    if "token_embd.weight" not in tensors:
        raise FormatError(f"{path} has no tensor token_embd.weight")
    own.setdefault("vocab_size", tensors["token_embd.weight"].shape[0])
    missing = [key for key in known.settings if key not in own and key not in known.optional]
    missing += [
        key for key in known.used if key not in own and key not in _WIDTHS | {"attention.head_count_kv"}
    ]
    if missing:
        raise FormatError(f"{path} lacks the entry {prefix}{missing[0]}")
    try:
        derived = known.derived(own)
    except KeyError as error:
        raise FormatError(f"{path} lacks the entry {prefix}{error.args[0]}") from error
    except FormatError as error:
        raise FormatError(f"{path} {error}") from error
    config = {key: _short(own[entry]) for entry, key in known.settings.items() if entry in own}
    heads = own["attention.head_count"]
    if "attention.head_count_kv" in known.used and own.get("attention.head_count_kv", heads) != heads:
        raise FormatError(f"{path}: {prefix}attention.head_count_kv must be the number of heads")
    tied = {} if family == "gpt2" else {"tie_word_embeddings": _OUTPUT not in tensors}
    flags = {key: tensor in tensors for key, tensor in known.shown.items()}
    return known.fixed | config | derived | tied | flags


def hf_names(tensors: Mapping[str, Any], family: str, path: object) -> dict[str, tuple[str, Turn | None]]:
    """Return for each tensor of a GGUF file its name in model.safetensors, and how it is kept otherwise.

    Raises:
        FormatError: a tensor that the family does not have.
    """
    known = ARCHITECTURES[family]
    whole = {part: module for module, part in known.whole.items()}
    modules = {part: module for module, part in known.modules.items()}
    found: dict[str, tuple[str, Turn | None]] = {}
    for name in tensors:
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)", name)
        part, _, kind = name.rpartition(".")
        if match and match[2] in modules:
            found[name] = (
                f"{known.layer}.{match[1]}.{modules[match[2]]}.{match[3]}",
                known.turns.get(match[2]),
            )
        elif part in whole and kind in ("weight", "bias"):
            found[name] = f"{whole[part]}.{kind}", None
        elif name == _OUTPUT:
            found[name] = "lm_head.weight", None
        else:
            raise FormatError(f"{path}: the tensor {shown(name)} is none of the architecture {known.name}")
    return found


def _short(value: Any) -> Any:
    """Return a number of float32 as it was written, 1e-05 for 9.999999747378752e-06."""
    if isinstance(value, float) and value == float(np.float32(value)):
        return float(str(np.float32(value)))
    return value
