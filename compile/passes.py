"""Lowerings are flat lists of named passes: each maps a graph to a graph, and each can be looked at after it ran."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Pass = tuple[str, Callable[[Any], Any]]
"""A name and a function from a graph to a graph; the first of a list may take something else and make a graph of it."""

Note = Callable[[str, Any], None]
"""Called with each pass's name and the graph after it."""


def ignore(name: str, model: Any) -> None:
    """The Note that does nothing."""


def run_passes(model: Any, passes: Sequence[Pass], note: Note = ignore) -> Any:
    """Apply the passes in order and return what the last one gives."""
    for name, function in passes:
        model = function(model)
        note(name, model)
    return model


class Dump:
    """A Note that writes every graph into a folder, as NN-<pass> with the ending that its kind has.

    An onnx.ModelProto becomes NN-<pass>.onnx, its weights where they were, and the same as text, NN-<pass>.txt; a
    module of TVM becomes NN-<pass>.py, its script.
    """

    def __init__(self, folder: Path):
        """Make the folder; files of an earlier dump in it are replaced one by one.

        Raises:
            StorageError: it cannot be written.
        """
        from portlm.errors import StorageError

        self.folder, self.count = folder, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder} cannot be made: {error.strerror or error}") from error

    def __call__(self, name: str, model: Any) -> None:
        """Write one graph."""
        from portlm.files import write_atomic

        stem = f"{self.count:02}-{name}"
        self.count += 1
        model = getattr(model, "proto", model)  # of a graph whose weights are apart
        if hasattr(model, "SerializeToString"):
            from onnx import printer

            write_atomic(self.folder / f"{stem}.onnx", model.SerializeToString(deterministic=True))
            write_atomic(self.folder / f"{stem}.txt", printer.to_text(model) + "\n")
        else:
            write_atomic(self.folder / f"{stem}.py", model.script() + "\n")
