"""Fused operations, each a triple: a plain reference, a compiled kernel, and a form in the exported graph.

One file per op, found by being here. Names are imported when first used, so that ``portlm.ops.token_selection`` works
on a machine without PyTorch.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_TOOLS = {
    "adamw_cuda",
    "byte_cache",
    "compiled",
    "cuda",
    "experts_cuda",
    "few_rows",
    "gelu_mlp_bf16",
    "half",
    "kernel_op",
    "lazy",
    "linear_bf16",
    "linear_cross_entropy_cuda",
    "mlp",
    "mlp_cuda",
    "narrow",
    "precision",
    "quantized",
    "recurrent",
    "registry",
    "spec",
    "token_scores_cuda",
    "token_selection_cuda",
}
FILES = tuple(sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - _TOOLS - {"__init__"}))
"""The files that define an op."""

_OTHER_NAMES = {"adamw": "AdamW", "token_selection": "select_tokens"}
_HOME = {_OTHER_NAMES.get(file, file): file for file in FILES}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"portlm.ops.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'portlm.ops' has no attribute {name!r}")


class _Ops(ModuleType):
    """Keeps the name of an op for its function: importing its file would put the file there, whoever imports it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Ops
