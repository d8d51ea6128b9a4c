"""The compiled extension ``portlm._C``, and what is said where it is missing."""

import importlib
from pathlib import Path
from types import ModuleType

from portlm.errors import ExtensionError

NAME = "portlm._C"


def load_extension() -> ModuleType:
    """Import ``portlm._C``, as ``from portlm import _C`` does by portlm's ``__getattr__``.

    Raises:
        ExtensionError: it was not built, or it cannot be loaded here.
    """
    try:
        return importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            raise
        problem = "are not built"
    except ImportError as error:
        problem = f"cannot be loaded ({error})"
    # "try" and a command at the end: what `portlm doctor` takes apart.
    raise ExtensionError(f"portlm's kernels ({NAME}) {problem}, try {cure()}", name=NAME)


def problem() -> str:
    """Say what is wrong with the extension and what to do about it, or "" if it is there."""
    try:
        load_extension()
    except ExtensionError as error:
        return str(error)
    return ""


def cure(package: Path = Path(__file__)) -> str:
    """Return the command that builds the extension: in the source tree that a file of portlm lies in, or from an index.

    Args:
        package: a file in the root of the package.
    """
    tree = package.resolve().parent.parent
    if (tree / "CMakeLists.txt").is_file() and (tree / "csrc").is_dir():
        return f"pip install -e {tree}"
    return "pip install --force-reinstall portlm"
