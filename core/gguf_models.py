"""The metadata and the tensors of GGUF files, from a configuration and a checkpoint and back to them.

What llama.cpp calls things is in gguf_architectures.py; this file follows its rows.

D head width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from portlm.errors import FormatError, UsageError
from portlm.files import shown
from portlm.gguf_architectures import ARCHITECTURES, Architecture, Array, Turn, kv_heads

_ROTARY_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
ROTARY_TENSORS = (_ROTARY_FACTORS, *_LONG_FACTORS.values())  # what stretches positions, and is no parameter
_OUTPUT = "output.weight"
# Entries that say that nothing unusual is done.
_NOTHING = {
    "rope.scaling.type": None, "rope.scaling.factor": None, "attention.causal": True, "rope.scale_linear": 1.0,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "expert_count": 0, "expert_used_count": 0,
    "tensor_data_layout": None,
}  # fmt: skip
_LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)\.(weight|bias)")


def rotary_tensors(config: Any) -> dict[str, Array]:
    """Return the tensors in which llama.cpp keeps how a configuration stretches positions, each (R/2,) float32.

    They hold how many times more slowly each pair of a head turns: LLaMA 3.1's in one, LongRoPE's in two, of which
    llama.cpp takes the long ones if it is opened with more than the original context.
    """
    scaling = getattr(config, "rope_scaling", None)
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return {}
    if scaling.kind == "llama3":
        return {_ROTARY_FACTORS: _llama3_factors(config.head_dim, config.rope_theta, scaling)}
    return {tensor: np.array(getattr(scaling, key), np.float32) for key, tensor in _LONG_FACTORS.items()}


def rotary_scaling(
    tensors: Mapping[str, Array], data: Mapping[str, Any], attention_factor: float
) -> dict[str, Any] | None:
    """Return rope_scaling of config.json for the tensors that stretch positions; None where there are none.

    Args:
        tensors: Those of ROTARY_TENSORS that the file has.
        data: The config.json so far.
        attention_factor: Of LongRoPE.

    Raises:
        ValueError: They do not stretch positions as a published model does.
    """
    if not tensors:
        return None
    width = data.get("head_dim") or data["hidden_size"] // max(data["num_attention_heads"], 1)
    if tensors.keys() == {_ROTARY_FACTORS}:
        return _llama3(tensors[_ROTARY_FACTORS], width, data.get("rope_theta", 10000.0))
    if tensors.keys() != {*_LONG_FACTORS.values()} or data["model_type"] != "phi3":
        raise ValueError(f"{', '.join(tensors)} stretch positions, and not as Phi-3 does")
    lists = {
        key: [_short(float(x)) for x in tensors[tensor].ravel()] for key, tensor in _LONG_FACTORS.items()
    }
    return {"rope_type": "longrope", "attention_factor": attention_factor} | lists


def _llama3_factors(width: int, theta: float, scaling: Any) -> Array:
    import torch

    plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / scaling.slowed(plain, theta)).float().numpy()


def _llama3(factors: Array, width: int, theta: float) -> dict[str, Any]:
    """The published scaling of Llama 3.1 or 3.2 that has these factors."""
    from portlm.models.rope import Llama3

    for factor in (8.0, 32.0):
        scaling = Llama3(factor, 1.0, 4.0, 8192)
        if factors.shape == (width // 2,) and np.allclose(
            factors, _llama3_factors(width, theta, scaling), rtol=1e-4
        ):
            return scaling.to_hf()
    raise ValueError(f"{_ROTARY_FACTORS} stretches positions, and not as Llama 3.1 or 3.2 do")


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
        return f"{known.whole[whole]}.{kind}", known.turns.get(known.whole[whole])
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
    entries.setdefault("attention.head_count_kv", kv_heads(config))
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
    missing = [
        key for key in (*known.settings, *sorted(known.used)) if key not in own and key not in known.optional
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
    tied = {"tie_word_embeddings": _OUTPUT not in tensors} if known.tied else {}
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
            found[name] = f"{whole[part]}.{kind}", known.turns.get(part)
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
