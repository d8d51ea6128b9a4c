"""Fused operations, each a triple: a plain reference, a compiled kernel, and a form in the exported graph.

Names are imported when first used, so that ``portlm.ops.token_selection`` works on a machine without PyTorch.
"""

import importlib
from typing import Any

_HOME = {
    "AdamW": "adamw",
    "attention": "attention",
    "cached_attention": "cached_attention",
    "embedding": "embedding",
    "gelu_mlp": "gelu_mlp",
    "layer_norm": "layer_norm",
    "linear": "linear",
    "linear_cross_entropy": "linear_cross_entropy",
    "rms_norm": "rms_norm",
    "rotary": "rotary",
    "select_tokens": "token_selection",
    "swiglu": "swiglu",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"portlm.ops.{_HOME[name]}"), name)
        globals()[name] = value  # importing the file left its module under the same name: the function wins
        return value
    raise AttributeError(f"module 'portlm.ops' has no attribute {name!r}")
