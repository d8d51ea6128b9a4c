"""From an artifact to answers. Never imports torch, except in the torch engine itself.

The table of engines is portlm.engines; a module of one, and the packages behind it, are imported when it is asked for.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from portlm.engines import ENGINES, resolve
from portlm.errors import EngineUnavailableError, UsageError

if TYPE_CHECKING:
    from portlm.engine import Engine
    from portlm.runtimes.session import Session

__all__ = ["Session", "engine_class"]


def __getattr__(name: str) -> Any:
    if name == "Session":
        from portlm.runtimes.session import Session

        return Session
    raise AttributeError(f"module 'portlm.runtimes' has no attribute {name!r}")


def engine_class(name: str) -> "type[Engine]":
    """Import one engine's class.

    Raises:
        UsageError: there is no such engine.
        EngineUnavailableError: its package is missing or broken.
    """
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}: choose one of {', '.join(ENGINES)}")
    entry = ENGINES[name]
    if entry.package is not None and importlib.util.find_spec(entry.package) is None:
        raise EngineUnavailableError(
            f"{name}: {entry.package} is not installed, try pip install 'portlm[{entry.extra}]'"
        )
    try:
        found: type[Engine] = resolve(entry.target)
    except (ImportError, OSError) as error:
        raise EngineUnavailableError(
            f"{name}: {entry.package} does not load here ({error}), "
            f"try pip install --force-reinstall 'portlm[{entry.extra}]'"
        ) from error
    return found
