"""What the verbs for models that read whole texts share: where texts come from, and which engine reads them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portlm.engines import DEVICES, ENGINES
from portlm.errors import FormatError, UsageError

if TYPE_CHECKING:
    from portlm.runtimes.session import Session

MAX_BYTES = 1 << 30  # of one file of texts

_OPTIONS = (
    click.option(
        "--engine", "-e", default="auto", show_default=True, metavar="ENGINE[:DEVICE[:PROFILE]]",
        help=f"{', '.join(ENGINES)} or auto.",
    ),
    click.option("--device", "-d", default="auto", show_default=True, help=f"{', '.join(DEVICES)} or auto."),
    click.option("--profile", "-p", default="auto", show_default=True, help="portable, fused, native or auto."),
    click.option("--threads", type=int, help="CPU threads (default: what suits each step)."),
    click.option("--allow-fallback", is_flag=True, help="Let the CPU run what the device cannot."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)  # fmt: skip
_BATCH = click.option("--batch-size", default=32, show_default=True, help="Texts that are computed together.")


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what runs the model, and --json."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `engine_options`, and --batch-size."""
    return engine_options(_BATCH(function))


@contextmanager
def opened(
    model: Path, engine: str, device: str, profile: str, threads: int | None, allow_fallback: bool
) -> Iterator[Session]:
    """Load a model as the options say."""
    import portlm
    from portlm.flows.targets import Choice

    if ":" in engine:
        said = (None if option == "auto" else option for option in (device, profile))
        choice = Choice.parse(engine).narrowed(*said)
        engine, device, profile = choice.engine or "auto", choice.device or "auto", choice.profile or "auto"
    with portlm.load(model, engine, device, profile, allow_fallback, threads) as session:
        yield session


def texts_of(given: tuple[str, ...], file: Path | None) -> tuple[list[str], list[str]]:
    """Return texts, and what each is called.

    Args:
        given: on the command line; "-" or nothing reads the lines of stdin.
        file: a file with a text on each line, or a folder in which each file is a text.

    Raises:
        UsageError: there are texts and a file, or no text at all.
        FormatError: a file cannot be read, or is no UTF-8.
    """
    if given and file is not None:
        raise UsageError("give texts or --file, not both")
    if file is not None and file.is_dir():
        paths = sorted(path for path in file.iterdir() if path.is_file() and not path.name.startswith("."))
        texts, names = [_read(path) for path in paths], [path.name for path in paths]
    elif file is not None or given in ((), ("-",)):
        raw = _read(file) if file is not None else _decoded(sys.stdin.buffer.read(MAX_BYTES + 1), "stdin")
        lines = [(i, line) for i, line in enumerate(raw.split("\n"), 1) if line.strip()]
        texts, names = [line for _, line in lines], [f"line {i}" for i, _ in lines]
    else:
        texts, names = list(given), list(given)
    if not texts:
        raise UsageError(f"{file or 'stdin'} holds no text")
    return texts, names


def one_text(given: str | None, file: Path | None) -> str:
    """Return a text from the argument, or the whole of a file or of stdin without the newline at its end.

    Raises:
        UsageError: both were given.
        FormatError: it cannot be read, or is no UTF-8.
    """
    if given is not None and file is not None:
        raise UsageError("give a text or --file, not both")
    if file is not None:
        return _read(file).removesuffix("\n")
    if given is None or given == "-":
        return _decoded(sys.stdin.buffer.read(MAX_BYTES + 1), "stdin").removesuffix("\n")
    return given


def _read(path: Path) -> str:
    try:
        with path.open("rb") as source:
            return _decoded(source.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


def _decoded(raw: bytes, name: str) -> str:
    if len(raw) > MAX_BYTES:
        raise FormatError(f"{name}: more than {MAX_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{name}: is no UTF-8 at byte {error.start}") from error
