"""From an artifact to answers. Never imports torch, except in the torch engine itself.

ENGINES is the one place for what is to be known of an engine; its module, and the packages behind it, are imported when
it is asked for.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from portlm.errors import EngineUnavailableError, UsageError

if TYPE_CHECKING:
    from portlm.engine import Engine
    from portlm.runtimes.session import Session

__all__ = ["DEVICES", "ENGINES", "EngineEntry", "Session", "engine_class", "resolve", "versions_of"]


@dataclass(frozen=True)
class EngineEntry:
    """The facts of one engine. Functions are named "module:function", and loaded by who needs them.

    Attributes:
        target: an implementation of portlm.engine.Engine.
        devices: those it can run on, on a machine that has them.
        package: what it imports, or None.
        extra: of portlm, which brings that package.
        probe: (engine, device) -> a line about it, without importing its package; see portlm.runtimes.probe.
        trial: (device) -> a line about it, after using it once, in a process of its own; "" if there is no need.
        distributions: packages whose versions belong to a measurement, as far as they are installed.
        device_distributions: the same, for one device.
        finder: the function of portlm.compile.bisect that runs a graph as this engine does; "" if it runs none.
    """

    target: str
    devices: tuple[str, ...]
    package: str | None
    extra: str
    probe: str
    trial: str = ""
    distributions: tuple[str, ...] = ()
    device_distributions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    finder: str = ""


ENGINES = {
    "torch": EngineEntry(
        target="portlm.runtimes.eager:TorchEngine",
        devices=("cpu", "cuda"),
        package="torch",
        extra="train",
        probe="portlm.runtimes.probe:torch",
        trial="portlm.runtimes.eager:try_device",
        distributions=("torch",),
    ),
    "ort": EngineEntry(
        target="portlm.runtimes.ort:OrtEngine",
        devices=("cpu", "cuda", "vulkan"),
        package="onnxruntime",
        extra="onnx",
        probe="portlm.runtimes.probe:ort",
        trial="portlm.runtimes.ort:try_device",
        distributions=("onnxruntime", "onnxruntime-gpu"),
        device_distributions={"vulkan": ("onnxruntime-ep-webgpu",)},
        finder="portlm.compile.bisect:ort_runner",
    ),
    "tvm": EngineEntry(
        target="portlm.runtimes.tvm:TvmEngine",
        devices=("cpu",),
        package="tvm",
        extra="tvm",
        probe="portlm.runtimes.probe:tvm",
        trial="portlm.runtimes.tvm:try_device",
        distributions=("apache-tvm", "apache-tvm-ffi"),
        finder="portlm.compile.bisect:tvm_runner",
    ),
    "null": EngineEntry(
        target="portlm.runtimes.null:NullEngine",
        devices=("cpu",),
        package=None,
        extra="",
        probe="portlm.runtimes.probe:null",
    ),
}
DEVICES = ("cpu", "cuda", "vulkan")


def __getattr__(name: str) -> Any:
    if name == "Session":
        from portlm.runtimes.session import Session

        return Session
    raise AttributeError(f"module 'portlm.runtimes' has no attribute {name!r}")


def resolve(place: str) -> Any:
    """Import what "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


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


def versions_of(engine: str, device: str) -> dict[str, str]:
    """Return the versions of the packages that decide what an engine computes on a device, portlm's among them."""
    entry = ENGINES.get(engine)
    names = ["portlm"]
    if entry is not None:
        names += [*entry.distributions, *entry.device_distributions.get(device, ())]
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
