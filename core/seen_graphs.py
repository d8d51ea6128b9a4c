"""Remembers which graphs this user's libraries may be given: those that portlm wrote here, and those it checked here.

The libraries that read a graph have been ended by files that were made for it. So a graph from elsewhere is read in a
child process first (portlm.compile.isolated), once for each version of what read it there. What portlm wrote on this
machine needs none of that, whatever the versions.

The store is a private folder of empty files, named by digest: one for each graph with its weights and with what the
manifest says of its inputs. Losing one costs the time to check again. Where there can be no private folder nothing is
remembered: every graph is checked each time.
"""

import hashlib
import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from portlm.errors import PortlmError
from portlm.trust import private_folder

FOLDER = "graphs"
READERS = ("portlm", "onnx", "onnxruntime", "onnxruntime-gpu")  # distributions that a check is the word of


class Graph(NamedTuple):
    """A graph, and what a manifest says of it.

    Attributes:
        graph: sha256 of its file.
        weights: sha256 of its weight file.
        limits: how far the manifest lets the values of each input go.
    """

    graph: str
    weights: str
    limits: tuple[tuple[str, int | None], ...]


def record_written(graph: Graph) -> None:
    """Remember a graph that portlm itself wrote."""
    _record(_written(graph))


def record_checked(graph: Graph) -> None:
    """Remember a graph that the libraries installed now have read in a child process."""
    _record(_checked(graph))


def was_written(graph: Graph) -> bool:
    """Whether portlm wrote it here."""
    return _is_known(_written(graph))


def may_be_read(graph: Graph) -> bool:
    """Whether portlm wrote it here, or the libraries installed now have read it in a child process."""
    return was_written(graph) or _is_known(_checked(graph))


def _written(graph: Graph) -> str:
    return _digest(["written", *graph])


def _checked(graph: Graph) -> str:
    readers = {}
    for name in READERS:
        with suppress(PackageNotFoundError):
            readers[name] = version(name)
    return _digest(["checked", *graph, readers])


def _digest(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _record(digest: str) -> None:
    with suppress(PortlmError, OSError):
        (private_folder(FOLDER) / digest).touch()


def _is_known(digest: str) -> bool:
    with suppress(PortlmError, OSError):
        return (private_folder(FOLDER) / digest).is_file()
    return False
