"""`portlm.load`: a folder becomes a session, on the engine and device that were asked for.

What an engine needs compiled and the folder does not hold is compiled at first use, into a cache of the user's
(portlm.flows.compile_cache).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from portlm import generation_config
from portlm.arguments import flag, one_of, shown, whole
from portlm.engines import DEVICES, ENGINES, resolve
from portlm.errors import EngineUnavailableError, FormatError, StorageError, UsageError
from portlm.files import check_is_folder
from portlm.generation_config import GENERATION_CONFIG
from portlm.labels import read_labels
from portlm.memory import SEE, sees_pictures
from portlm.pictures import PREPROCESSORS, Pictures

if TYPE_CHECKING:
    from portlm.artifact import Manifest
    from portlm.engine import Engine, OpenRequest
    from portlm.generation_config import GenerationConfig
    from portlm.runtimes.session import Session
    from portlm.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "config.json"
# All that a session reads beside the engine.
TEXT_FILES = (TOKENIZER, "tokenizer_config.json", GENERATION_CONFIG, *PREPROCESSORS)


def load(
    path: str | Path,
    engine: str = "auto",
    device: str = "auto",
    profile: str = "auto",
    allow_fallback: bool = False,
    threads: int | None = None,
) -> Session:
    """Load an artifact, or for the torch engine a plain checkpoint folder, and return a session.

    A folder without a tokenizer.json that portlm can use gives a session that takes and returns token ids only, and
    says why when it is given text. What generation_config.json says of sampling is in the session's `defaults`.

    Every file that is used is first compared with the size and the hash in the manifest, and one that the manifest does
    not list is refused. What an engine needs compiled and the artifact does not hold is compiled now, into a private
    cache of the user's, with a line on stderr.

    Args:
        path: the folder.
        engine: "torch", "ort", "tvm", "packed", "null", or "auto": packed if the folder holds what was compiled for it,
            else the first of ort, tvm and torch that is installed and for which the folder holds what it needs; torch
            if there is a CUDA device that it can use.
        device: "cpu", "cuda", "vulkan", "opencl", or "auto": cuda for torch where there is one, otherwise cpu.
            Vulkan and OpenCL are never chosen by themselves.
        profile: "portable", "fused", "native", or "auto": the fastest that the folder holds for engine and device, or
            that can be compiled here.
        allow_fallback: let nodes that the device cannot run go to the CPU, instead of refusing.
        threads: of the CPU, for every call, at most 4096; None for one per core, or one alone while others keep the
            cores busy.

    Raises:
        UsageError: an unknown engine, device or profile, or one that the folder was not exported for.
        EngineUnavailableError: a package, driver, device or compiler is missing. The message says how to get it.
        FormatError: a file is missing, truncated, altered or not what it should be.
        PlacementError: a node would run on another device.
    """
    from portlm.engine import PROFILES, OpenRequest
    from portlm.runtimes import engine_class
    from portlm.threads import MOST_THREADS, bound_spinning

    bound_spinning()
    one_of("engine", engine, ("auto", *ENGINES))
    one_of("device", device, ("auto", *DEVICES))
    one_of("profile", profile, PROFILES)
    allow_fallback = flag("allow_fallback", allow_fallback)
    threads = None if threads is None else whole("threads", threads, 1, MOST_THREADS)
    if not isinstance(path, str | Path):
        raise UsageError(f"the folder of a model must be a str or a Path, got {shown(path)}")
    folder = Path(path)
    try:
        manifest = _manifest(folder)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if engine == "auto":
        engine, device = _choose(folder, manifest, device, profile)
    elif device == "auto":
        device = "cuda" if engine == "torch" and _cuda_works() else "cpu"
    if device not in ENGINES[engine].devices:
        raise UsageError(f"{engine} does not run on {device}: choose {' or '.join(ENGINES[engine].devices)}")
    implementation = engine_class(engine)
    tokenizer, config = _texts(folder, manifest)
    request = _compiled(engine, OpenRequest(folder, manifest, device, profile, allow_fallback, threads))
    if request.manifest is not None and (graphs := implementation.graphs(request)):
        from portlm.compile.isolated import ensure_checked

        ensure_checked(folder, request.manifest, graphs)
    opened = implementation.open(request)
    try:
        session = _session(opened, tokenizer, config)
        if any(role.startswith("head:") for role in opened.roles):
            session.labels = read_labels(folder)
        if sees_pictures(opened.roles):
            session.pictures = Pictures.read(folder, int(opened.roles[SEE].inputs[0].shape[2]))
        return session
    except BaseException:
        opened.close()
        raise


def _compiled(engine: str, request: OpenRequest) -> OpenRequest:
    """The request, with what the engine needs compiled from the artifact, or from the cache where it has none."""
    from portlm.flows import compile_cache

    if request.manifest is None or not ENGINES[engine].compilers:
        return request
    profile = compile_cache.needed(engine, request.device, request.profile, request.manifest)
    if profile is None:
        return request

    def progress() -> None:
        target = f"{engine}:{request.device}:{profile}"
        print(f"portlm: compiling {request.folder} for {target}, once on this machine", file=sys.stderr)

    try:
        found = compile_cache.find_or_build(
            request.folder, request.manifest, (engine, request.device, profile), progress
        )
    except (EngineUnavailableError, StorageError):
        if request.profile == "auto" and engine == "ort":
            return replace(request, profile="portable")  # which needs nothing compiled
        raise
    kept = "native" if request.profile == "native" else profile
    return replace(request, profile=kept, manifest=found.manifest, compiled=found.folder)


def _manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact, or None for a plain checkpoint folder."""
    from portlm.artifact import MANIFEST, instead, read_manifest

    problem = None
    if (folder / MANIFEST).exists():
        try:
            return read_manifest(folder)
        except FormatError as error:
            problem = error
    from portlm.train.checkpoint import check_checkpoint, is_checkpoint

    if is_checkpoint(folder):  # saved in the middle of training: its manifest is another one
        check_checkpoint(folder)
        return None
    if problem is not None:
        raise problem
    check_is_folder(folder)
    if not (folder / CONFIG).is_file():
        hint = instead(folder) or "give an artifact or a checkpoint folder"
        raise FormatError(f"{folder}: holds neither manifest.json nor config.json: {hint}")
    return None


def _texts(folder: Path, manifest: Manifest | None) -> tuple[Tokenizer | str | None, GenerationConfig]:
    """The tokenizer if there is one, or why it cannot be used; and what generation_config.json says."""
    from portlm.artifact import present_files
    from portlm.tokenizer import Tokenizer

    if manifest is not None:
        # config.json speaks in the place of each of the others, where that is silent.
        present_files(folder, (*TEXT_FILES, CONFIG), manifest)
    tokenizer: Tokenizer | str | None = None
    if (folder / TOKENIZER).exists():
        try:
            tokenizer = Tokenizer.load(folder)
        except FormatError as error:
            tokenizer = f"this model's tokenizer cannot be used: {error}"
    return tokenizer, generation_config.read(folder)


def _session(engine: Engine, tokenizer: Tokenizer | str | None, config: GenerationConfig) -> Session:
    """A session for text, or for token ids alone where there is no tokenizer for the model."""
    from portlm.runtimes.no_tokenizer import NONE, NoTokenizer
    from portlm.runtimes.session import Session

    V, defaults = engine.vocab_size, dict(config.options)
    if "top_k" in defaults:
        defaults["top_k"] = min(defaults["top_k"], V)
    if tokenizer is not None and not isinstance(tokenizer, str):
        try:
            return Session(engine, tokenizer.within(V), config.eos_ids, defaults, config.start_ids)
        except FormatError as error:
            tokenizer = f"this model's tokenizer cannot be used: {error}"
    defaults.pop("stop", None)  # nothing is written that it could be in
    return Session(engine, NoTokenizer(V, tokenizer or NONE), config.eos_ids, defaults, config.start_ids)


def _choose(folder: Path, manifest: Manifest | None, device: str, profile: str) -> tuple[str, str]:
    """Engine and device for engine="auto": what is installed, prepared in the folder, and fastest."""
    if device in ("auto", "cuda") and profile in ("auto", "native") and _cuda_works():
        return "torch", "cuda"
    if device == "cuda":
        return "torch", "cuda"  # which says what is missing
    if device == "vulkan":
        return "ort", "vulkan"
    if device == "opencl":
        return "tvm", "opencl"
    if manifest is not None and profile in ("auto", "fused") and _packed_runs(folder, manifest):
        return "packed", "cpu"
    candidates = []
    if manifest is not None and profile != "native":
        candidates.append("ort")
        if any((entry.engine, entry.device) == ("tvm", "cpu") for entry in manifest.compiled):
            candidates.append("tvm")
    if manifest is not None or profile in ("auto", "native"):
        candidates.append("torch")
    for name in candidates:
        package = ENGINES[name].package
        if package is not None and importlib.util.find_spec(package) is not None:
            return name, "cpu"
    if not candidates:
        raise UsageError(
            f"no engine has profile {profile} in this folder: run portlm export or portlm compile"
        )
    wanted = " or ".join(f"{name} (pip install 'portlm[{ENGINES[name].extra}]')" for name in candidates)
    raise EngineUnavailableError(f"no engine that can run this folder is installed: install {wanted}")


def _packed_runs(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds a packed file that can be read here: an older one must be compiled again first."""
    from portlm.runtimes.packed import holds_packed

    return importlib.util.find_spec("portlm._C") is not None and holds_packed(folder, manifest)


def _cuda_works() -> bool:
    """Whether PyTorch can use a CUDA device. PyTorch is only imported on a machine with NVIDIA's driver."""
    if not Path("/proc/driver/nvidia/version").exists() or importlib.util.find_spec("torch") is None:
        return False

    try:
        resolve(ENGINES["torch"].trial)("cuda")
    except EngineUnavailableError:
        return False
    return True
