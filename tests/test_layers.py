"""Who imports whom: every import of every product file, read with ast, against the table in ARCHITECTURE.md."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"core": "portlm", "compile": "portlm.compile", "runtimes": "portlm.runtimes"}
ANYWHERE = {"numpy", "msgspec"}
UPWARD = {
    ("portlm", room) for room in ("compile", "flows", "runtimes")
}  # portlm.load, portlm.export: when asked for


class Import(NamedTuple):
    """One imported module, where, and whether only when something is used: in a function, or for annotations."""

    module: str
    line: int
    late: bool


class Room(NamedTuple):
    """A row of the table."""

    modules: frozenset[str]
    imports: frozenset[str]
    late: frozenset[str]


def sources() -> dict[str, Path]:
    """File by module name, of everything that the package holds."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = sources()


def imports_of(tree: ast.AST, late: bool = False) -> Iterator[Import]:
    """Every import below a node."""
    for node in ast.iter_child_nodes(tree):
        inner = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                yield from imports_of(ast.Module([child], []), late=True)
            for child in node.orelse:
                yield from imports_of(ast.Module([child], []), late)
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "relative imports are banned"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                is_module = inside in MODULES or inside == "portlm._C"
                yield Import(inside if is_module else node.module, node.lineno, late)
        yield from imports_of(node, inner)


def rooms(text: str) -> dict[str, Room]:
    """The rows of the table under "Who may import whom", by name, in its order."""
    section = text.partition("## Who may import whom")[2].partition("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and "`" in line:
            name, modules, *others = cells
            names, packages, late = (frozenset(re.findall(r"[\w.]+", cell)) for cell in others)
            found[name] = Room(frozenset(re.findall(r"`([\w.*]+)`", modules)), names | packages, late)
    return found


ROOMS = rooms((ROOT / "ARCHITECTURE.md").read_text())


def room_of(module: str) -> str:
    """The most specific row that a module of portlm belongs to; a name that ends in * stands for all that begin so."""
    name = module.removeprefix("portlm.")
    owners = {prefix: room for room, row in ROOMS.items() for prefix in row.modules}
    for prefix, room in owners.items():
        if prefix.endswith("*") and name.startswith(prefix[:-1]):
            return room
    while name not in owners:
        assert "." in name, f"{module} belongs to no room of the table in ARCHITECTURE.md"
        name = name.rpartition(".")[0]
    return owners[name]


def wanted(module: str) -> str:
    """What the table calls an imported module: a room, a package, or "" for what may be imported anywhere."""
    top = module.partition(".")[0]
    if top == "portlm":
        return room_of(module)
    return "" if top in ANYWHERE | sys.stdlib_module_names else top


def violations(module: str, tree: ast.AST) -> list[str]:
    """What a module imports and may not."""
    room = room_of(module)
    row, found = ROOMS[room], []
    for imported in imports_of(tree):
        target = wanted(imported.module)
        allowed = row.imports | (row.late if imported.late else frozenset())
        if target and target != room and target not in allowed:
            if imported.late and (module, target) in UPWARD:
                continue
            when = "when used" if imported.late else "at import"
            found.append(f"line {imported.line}: {imported.module} ({target}) {when}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module):
    found = violations(module, ast.parse(MODULES[module].read_text()))
    assert not found, f"{module} is in the room {room_of(module)}, which may not import:\n" + "\n".join(found)


def test_rooms_import_only_the_rooms_above_them():
    """So that there is no circle."""
    above: set[str] = set()
    for name, row in ROOMS.items():
        assert row.imports & ROOMS.keys() <= above, name
        above.add(name)


def test_the_table_grants_nothing_that_nobody_needs():
    """A package or a late import that no module of the row uses is taken out of the table."""
    for name, row in ROOMS.items():
        used = {False: set(), True: set()}
        for module, path in MODULES.items():
            if room_of(module) == name:
                for imported in imports_of(ast.parse(path.read_text())):
                    used[imported.late].add(wanted(imported.module))
        packages = row.imports - ROOMS.keys()
        assert packages <= used[False] | used[True], (name, packages - used[False] - used[True])
        assert row.late <= used[True], (name, row.late - used[True])


def test_onnx_runtime_is_imported_in_one_place():
    """There its telemetry is switched off, which is too late once it is imported."""
    places = [path for path in MODULES.values() if path.name != "ort_support.py"]
    places += [
        path for folder in ("benchmarks", "scripts", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    assert [
        f"{path.relative_to(ROOT)}, line {imported.line}"
        for path in places
        for imported in imports_of(ast.parse(path.read_text()))
        if imported.module.partition(".")[0] == "onnxruntime"
    ] == []


@pytest.mark.parametrize(
    ("module", "code", "culprit"),
    [
        ("portlm.files", "import torch", "torch"),
        ("portlm.files", "def f():\n import torch", "torch"),
        ("portlm.ops.linear", "from portlm.train.config import X", "train"),
        ("portlm.runtimes.ort", "def f():\n from portlm.compile import check", "compile"),
        ("portlm.runtimes.session", "import torch", "torch"),
        ("portlm.compile.export", "import torch", "torch"),
        ("portlm.compile.build", "from portlm.compile.canonical_ops import X", "capture"),
        ("portlm.runtimes", "from portlm.runtimes import eager", "eager"),
        ("portlm.runtimes.tvm", "import tvm", "tvm"),
        ("portlm.runtimes.ort", "import onnxruntime", "onnxruntime"),
        ("portlm.runtimes.ort", "def f():\n import onnxruntime", "onnxruntime"),
        ("portlm.compile.bisect", "from portlm.runtimes.ort import X", "runtimes"),
        ("portlm.compile.bisect", "from portlm import runtimes", "runtimes"),
        ("portlm.train.pretrain", "def f():\n import portlm.flows.load", "flows"),
        ("portlm.flows.bench", "from portlm.commands import tables", "commands"),
        ("portlm.artifact", "if TYPE_CHECKING:\n from portlm.models import X", "models"),
    ],
)
def test_a_forbidden_import_would_be_found(module, code, culprit):
    found = violations(module, ast.parse(code))
    assert len(found) == 1
    assert culprit in found[0]


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("portlm.runtimes.tvm", "def f():\n import tvm"),
        ("portlm.compile.export", "def f():\n from portlm.compile import capture"),
        ("portlm.compile.canonical_ops", "import torch"),
        ("portlm.runtimes.eager", "import torch"),
        ("portlm.flows.verify", "from portlm.compile import parity"),
        ("portlm.compile.export", "from portlm import __version__"),
    ],
)
def test_an_allowed_import_is_not_found(module, code):
    assert violations(module, ast.parse(code)) == []


def test_every_file_is_read():
    for folder in FOLDERS:
        assert sum(path.is_relative_to(ROOT / folder) for path in MODULES.values()) > 5
    assert "portlm" in MODULES
