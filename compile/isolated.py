"""Has a child process read the graphs of an artifact from elsewhere, before a library in this process does.

A graph is first read by portlm alone (compile/check.py), which is plain Python. Then a child with bounded memory and
time gives it to the libraries just as this process is going to: to onnx's own checker, and to ONNX Runtime, which opens
it on the processor and makes one small call. A graph with nodes of ai.portlm is lowered first, as compiling does. What
kills the child is an error here. A graph that passed is remembered (portlm.seen_graphs), so this is done once.

Run as ``python -P -m portlm.compile.isolated``: one JSON list of jobs on stdin, one line on stdout for each.
"""

import hashlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from portlm.artifact import Manifest, RoleSpec, check_files
from portlm.compile.check import BFLOAT16, FLOAT16, UINT8, examine, read_graph
from portlm.compile.onnx_reader import Message
from portlm.compile.tables import beyond
from portlm.engine import limit_of
from portlm.errors import FormatError
from portlm.files import safe_join
from portlm.ops.spec import DOMAIN
from portlm.roles import StateSpec, TensorSpec
from portlm.seen_graphs import Graph, may_be_read, record_checked

CHILD = ("-P", "-m", "portlm.compile.isolated")  # -P: nothing is imported from the folder that the user is in
BYTES, BYTES_PER_WEIGHT = 4 * 2**30, 4  # address space of the child: this much, and so many times the weights
SECONDS, WEIGHTS_PER_SECOND = 60, 50 * 2**20  # time: this much for each graph, and to read the weights
GRAPH = ".onnx"  # compiled files that are graphs end so
SIZE = 2  # of every extent that a call may choose


class Job(NamedTuple):
    """One graph to read.

    Attributes:
        path: of the graph; its weight file lies beside it.
        sha256: of its bytes.
        context_length: of the model.
    """

    path: str
    sha256: str
    context_length: int


def ensure_checked(
    folder: Path, manifest: Manifest, names: Iterable[str], say: Callable[[str], None] | None = None
) -> None:
    """See to it that graphs of an artifact may be given to the libraries that read graphs.

    Those that portlm wrote on this machine, or checked on it before, cost a look into a folder. What is looked up is
    the hash in the manifest: whoever opens the file compares the two.

    Args:
        folder: the artifact.
        manifest: of it.
        names: of graph files that the manifest lists.
        say: called with a line before others are checked; None writes it to stderr.

    Raises:
        FormatError: a file is not the one that the manifest lists, is none that portlm writes, or a library refused it
            or died of it; or the manifest lets values through that a table of the graph has no row for.
    """
    weights, graphs = weights_of(manifest), {name: graph_of(manifest, name) for name in names}
    unknown = [name for name, graph in graphs.items() if not may_be_read(graph)]
    if not unknown:
        return
    line = f"checking {', '.join(unknown)} of {folder}, which {'was' if len(unknown) == 1 else 'were'} made elsewhere"
    (say or _to_stderr)(line)
    check_files(folder, dict.fromkeys([*unknown, *(weights[name] for name in unknown)]), manifest)
    context = manifest.model.context_length
    jobs = [Job(str(safe_join(folder, name)), graphs[name].graph, context) for name in unknown]
    for name, model in zip(unknown, check_isolated(jobs), strict=True):
        for role in _roles_of(manifest, name):
            if problem := beyond(manifest, role, model.graph):
                raise FormatError(f"{folder}/{name}: {problem}; export again")
        record_checked(graphs[name])


def weights_of(manifest: Manifest) -> dict[str, str]:
    """Return the graph files that a manifest lists, exported and compiled, each with the name of its weight file."""
    found = {name: role.weights for role in manifest.roles.values() for name in role.profiles.values()}
    for entry in manifest.compiled:
        role = manifest.roles.get(entry.role)
        found |= {name: role.weights for name in entry.files if role is not None and name.endswith(GRAPH)}
    return found


def graph_of(manifest: Manifest, name: str) -> Graph:
    """Return a graph file that a manifest lists, with its weights and with what the manifest says of its inputs."""
    sizes = manifest.model.vocab_size, manifest.model.context_length
    specs: list[TensorSpec | StateSpec] = []
    for role in _roles_of(manifest, name):
        specs += [*role.inputs, *role.state]
    limits = tuple((spec.name, limit_of(spec, *sizes)) for spec in specs)
    return Graph(manifest.files[name].sha256, manifest.files[weights_of(manifest)[name]].sha256, limits)


def _roles_of(manifest: Manifest, name: str) -> list[RoleSpec]:
    """The roles whose graph this is, as exported or compiled."""
    compiled = {entry.role for entry in manifest.compiled if name in entry.files}
    return [role for key, role in manifest.roles.items() if key in compiled or name in role.profiles.values()]


def check_isolated(jobs: Sequence[Job]) -> list[Message]:
    """Read graphs here without any library, and then with them, in a child process.

    Returns:
        What they say.

    Raises:
        FormatError: one is refused, or the child died of it or took too long.
    """
    most, total, found = 0, 0, []
    for job in jobs:
        path = Path(job.path)
        raw = read_graph(path)
        if hashlib.sha256(raw).hexdigest() != job.sha256:
            raise FormatError(f"{path}: altered while it was read; restore the file or export again")
        found.append(examine(raw, path))
        size = sum(_size(tensor) for tensor in found[-1].graph.initializer)
        most, total = max(most, size), total + size
    seconds = SECONDS * len(jobs) + total / WEIGHTS_PER_SECOND
    text = json.dumps({"bytes": BYTES + BYTES_PER_WEIGHT * most, "jobs": jobs})
    try:
        child = subprocess.run(
            [sys.executable, *CHILD], input=text, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8", errors="replace", timeout=seconds, check=False,
        )  # fmt: skip
        output, end = child.stdout, f"died ({child.returncode})"
    except subprocess.TimeoutExpired as error:
        # bytes, whatever the encoding; what is said of its type is wrong
        said = error.stdout or b""
        output = said if isinstance(said, str) else said.decode(errors="replace")
        end = f"took more than {seconds:.3g} s"
    answers = output.splitlines()
    for place, job in enumerate(jobs):
        answer = answers[place] if place < len(answers) else ""
        if answer == ACCEPTED:
            continue
        if answer.startswith(REFUSED):
            raise FormatError(f"{job.path}: {answer.removeprefix(REFUSED)}; export again from the checkpoint")
        raise FormatError(f"{job.path}: the process that checked it {end}; do not use this file")
    return found


def _size(tensor: Any) -> int:
    """Bytes of a weight; of one in small numbers, the most that they take as float32, which a library may make them."""
    wide = {UINT8: 8, FLOAT16: 2, BFLOAT16: 2}.get(tensor.data_type, 1)
    return wide * sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")


def _to_stderr(line: str) -> None:
    print(f"portlm: {line}, once on this machine", file=sys.stderr)


# --- in the child -----------------------------------------------------------------------------------------------

ACCEPTED, REFUSED = "accepted", "refused: "


def _main() -> int:
    task = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (task["bytes"], task["bytes"]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what native code prints is no answer
    os.dup2(2, 1)
    for fields in task["jobs"]:
        job = Job(*fields)
        try:
            _read(job)
            answer = ACCEPTED
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            answer = REFUSED + " ".join(str(error).split())[:500]
        print(answer, file=answers, flush=True)
    return 0


def _read(job: Job) -> None:
    """Give one graph to every library that is installed."""
    path = Path(job.path)
    raw = read_graph(path)
    if hashlib.sha256(raw).hexdigest() != job.sha256:
        raise FormatError("altered while it was read")
    fused = any(opset.domain == DOMAIN for opset in examine(raw, path).opset_import)
    if importlib.util.find_spec("onnx") is not None:
        from portlm.compile.check import check_model

        model = check_model(path)
        if fused:
            from portlm.compile.ort_lowering import lower_model

            raw, fused = lower_model(model, job.context_length, "cpu").SerializeToString(), False
    if importlib.util.find_spec("onnxruntime") is not None and not fused:
        _call(raw, path.parent, job.context_length)


def _call(raw: bytes, weights: Path, context_length: int) -> None:
    """Open a graph as the ONNX Runtime engine does, and call it once on zeros of which nothing is masked.

    Positions are those of new tokens behind a filled cache: a graph may count its slots by them.
    """
    import numpy as np

    from portlm.ort_support import EXTERNAL_FOLDER, IN_PLACE, open_session, session_options

    options = session_options("cpu", None, 1)
    options.add_session_config_entry(EXTERNAL_FOLDER, str(weights))
    session = open_session(raw, options, "cpu")
    # A cache in place takes several new tokens of one row alone.
    single = IN_PLACE.items() <= session.get_modelmeta().custom_metadata_map.items()
    extents = {"batch": 1 if single else SIZE}
    extents |= {"past": min(SIZE, context_length // 2), "sequence": min(SIZE, (context_length + 1) // 2)}
    inputs = {}
    for value in session.get_inputs():
        kind = {"tensor(int64)": np.int64, "tensor(int8)": np.int8}.get(value.type, np.float32)
        shape = [_extent(size, extents) for size in value.shape]
        inputs[value.name] = np.full(shape, value.name == "attention_mask", kind)
        if value.name == "position_ids":
            inputs[value.name] += np.arange(shape[-1]) + extents["past"]
    session.run(None, inputs)


def _extent(size: int | str, extents: dict[str, int]) -> int:
    """A number for an extent: of a sum such as "past + sequence", of each part; SIZE for what is in no table."""
    if isinstance(size, int):
        return size
    return sum(extents.get(part.strip(), SIZE) for part in size.split("+"))


if __name__ == "__main__":
    sys.exit(_main())
