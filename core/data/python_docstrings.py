"""A corpus that every Python carries: what the standard library says of itself.

The docstrings of its modules, classes and functions (PSF licence): about 1.3 MB of English prose with code. They are
read from the source files, which are parsed and never imported. The text belongs to the Python version that runs, and
is the same wherever that version is installed: what some systems leave out or alter is not read.
"""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from portlm.errors import FormatError

MAX_BYTES = 4 * 2**20  # of text; three times what Python 3.11 has
MAX_SOURCE_BYTES = 2**20  # of a file
SHORTEST = 60  # characters of a docstring: below, a name said again

# Packages of their own on Debian and elsewhere, changed by them, or (encodings) the same sentence a hundred times.
ABSENT = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site", "sysconfig", "test",
          "tkinter", "turtle", "turtledemo", "venv"}  # fmt: skip
ABSENT_FOLDERS = {"__pycache__", "macholib", "test", "tests"}


def python_docstrings(max_bytes: int = MAX_BYTES) -> str:
    """Return the docstrings of the standard library as one text, modules in the order of their names.

    Each module is a document: a heading with its name, a blank line, its docstring, and the same for every class and
    function in it that has one; a blank line ends each.

    Args:
        max_bytes: of UTF-8. No module is begun that would not fit.

    Raises:
        FormatError: this Python was installed without its source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[str] = []
    left = max_bytes
    for path in _sources(root):
        document = _document(path, ".".join(path.relative_to(root).with_suffix("").parts))
        size = len(document.encode())
        if size > left:
            break
        documents.append(document)
        left -= size
    if not documents:
        raise FormatError(
            f"{root}: this Python has no source files to read docstrings from: give a text file instead"
        )
    return "".join(documents)


def _sources(root: Path) -> Iterator[Path]:
    """The files of the standard library's own modules: what else a system puts beside them has no name on the list."""
    for name in sorted(sys.stdlib_module_names - ABSENT):
        folder = root / name
        paths = folder.rglob("*.py") if folder.is_dir() else [root / f"{name}.py"]
        for path in sorted(paths):
            if not ABSENT_FOLDERS & set(path.relative_to(root).parts) and path.is_file():
                yield path


def _document(path: Path, name: str) -> str:
    """What one module says, or "" if that is nothing."""
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            return ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the library's escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # a file for another version of Python, or none
        return ""
    return "".join(
        f"# {where}\n\n{text}\n\n" for where, text in _docstrings(tree, name.removesuffix(".__init__"))
    )


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module and of everything that is defined in it, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= SHORTEST and _is_text(text):
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        else:
            yield from _docstrings(child, name)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        return False
    return True
