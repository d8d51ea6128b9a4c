"""PyTorch on first use, so that an op's description can be read, and a graph lowered, without it.

An op's file holds its reference, its wrapper and its `OpSpec` together. The checker, the lowerings and the engines read
the last alone, on machines that may have no PyTorch and should not wait seconds for it. So these files `bind` the names
they use: to the real things where PyTorch is loaded already, as everywhere that a model is, else to placeholders, which
the first touch of any one of them replaces, everywhere.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

_bound: list[tuple[dict[str, Any], dict[str, str]]] = []
_waiting: list[Callable[[], None]] = []


def bind(namespace: dict[str, Any], **places: str) -> None:
    """Put names into a module's globals.

    Args:
        namespace: `globals()` of the caller.
        places: name to "module" or "module:attribute".
    """
    _bound.append((namespace, places))
    if _loaded():
        settle()
    else:
        namespace.update({name: _Placeholder(place) for name, place in places.items()})


def when_loaded(action: Callable[[], None]) -> None:
    """Call a function as soon as PyTorch is loaded: now, or when the first placeholder is touched."""
    _waiting.append(action)
    if _loaded():
        settle()


def settle() -> None:
    """Load PyTorch, replace every placeholder and call every function that waits.

    Raises:
        ImportError: PyTorch is not installed.
    """
    while _bound:
        namespace, places = _bound[-1]
        namespace.update({name: _find(place) for name, place in places.items()})
        _bound.pop()
    while _waiting:
        _waiting.pop(0)()


def _loaded() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "nn")


def _find(place: str) -> Any:
    module, _, attribute = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


class _Placeholder:
    """Stands for a module or class that is not loaded yet."""

    def __init__(self, place: str):
        self.__dict__["_place"] = place

    def __getattr__(self, attribute: str) -> Any:
        settle()
        return getattr(_find(self._place), attribute)
