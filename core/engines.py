"""The engines: all that is to be known of one without importing it, in one row.

Functions are named, not imported: importing this loads nothing, and a flow resolves what it needs.
"""

import importlib
import itertools
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from portlm import __version__


class EngineEntry(Struct, frozen=True):
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
        compilers: (device, profile) -> what makes files for it from an artifact's graphs; see portlm.compile.build. An
            engine that runs the exported graph as it is needs none.
        byte_activations: keys of compilers that can round activations to 8 bits where they meet quantized weights; see
            portlm.quantization.activations.
        one_file: whether what a compiler writes for one role serves all of them, so that it is called once.
        runner: (device, profile) -> how a graph is run as this engine does, with inner values exposed; see
            portlm.compile.runners. "" if it cannot be.
    """

    target: str
    devices: tuple[str, ...]
    package: str | None
    extra: str
    probe: str
    trial: str = ""
    distributions: tuple[str, ...] = ()
    device_distributions: Mapping[str, tuple[str, ...]] = {}
    compilers: Mapping[tuple[str, str], str] = {}
    byte_activations: tuple[tuple[str, str], ...] = ()
    one_file: bool = False
    runner: str = ""


ENGINES = {
    "torch": EngineEntry(
        target="portlm.runtimes.eager:TorchEngine",
        devices=("cpu", "cuda"),
        package="torch",
        extra="train",
        probe="portlm.runtimes.probe:torch",
        trial="portlm.runtimes.eager:try_device",
        distributions=("torch",),
        compilers=dict.fromkeys(
            itertools.product(("cpu", "cuda"), ("fused", "portable")),
            "portlm.compile.torch_plan:compile_plan",
        ),
        runner="portlm.flows.plan_runner:plan_runner",
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
        compilers=dict.fromkeys(
            (("cpu", "fused"), ("vulkan", "fused")), "portlm.compile.ort_lowering:compile_graph"
        ),
        byte_activations=(("cpu", "fused"), ("vulkan", "fused")),
        runner="portlm.compile.runners:ort_runner",
    ),
    "tvm": EngineEntry(
        target="portlm.runtimes.tvm:TvmEngine",
        devices=("cpu", "cuda", "vulkan", "opencl"),
        package="tvm",
        extra="tvm",
        probe="portlm.runtimes.probe:tvm",
        trial="portlm.runtimes.tvm:try_device",
        distributions=("apache-tvm", "apache-tvm-ffi"),
        device_distributions={"vulkan": ("wgpu",), "cuda": ("nvidia-cuda-runtime",)},
        compilers=dict.fromkeys(
            itertools.product(("cpu", "cuda", "vulkan", "opencl"), ("portable", "fused")),
            "portlm.compile.tvm_library:compile_library",
        ),
        byte_activations=(("cpu", "fused"),),
        runner="portlm.compile.runners:tvm_runner",
    ),
    "packed": EngineEntry(
        target="portlm.runtimes.packed:PackedEngine",
        devices=("cpu",),
        package=None,
        extra="",
        probe="portlm.runtimes.probe:packed",
        compilers={("cpu", "fused"): "portlm.compile.packed:compile_packed"},
        byte_activations=(("cpu", "fused"),),
        one_file=True,
        runner="portlm.compile.packed_runner:packed_runner",
    ),
    "null": EngineEntry(
        target="portlm.runtimes.null:NullEngine",
        devices=("cpu",),
        package=None,
        extra="",
        probe="portlm.runtimes.probe:null",
    ),
}
DEVICES = ("cpu", "cuda", "vulkan", "opencl")


def resolve(place: str) -> Any:
    """Import what "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def versions_of(engine: str, device: str) -> dict[str, str]:
    """Return the versions of the packages that decide what an engine computes on a device, portlm's among them."""
    entry, found = ENGINES.get(engine), {"portlm": __version__}
    names = [*entry.distributions, *entry.device_distributions.get(device, ())] if entry is not None else []
    if names:  # the import loads the standard library's e-mail
        from importlib.metadata import PackageNotFoundError, version

    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
