"""portlm: train a language model of the GPT lineage, and run it anywhere.

Importing this package loads neither torch, onnx, TVM nor matplotlib; each is loaded by what first needs it.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "export", "load"]

if TYPE_CHECKING:
    from portlm.flows.export import export
    from portlm.flows.load import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from portlm.flows.load import load

        return load
    if name == "export":
        from portlm.flows.export import export

        return export
    if name == "_C":  # asked for before it was imported, which sets it
        from portlm.extension import load_extension

        return load_extension()
    raise AttributeError(f"module 'portlm' has no attribute {name!r}")
