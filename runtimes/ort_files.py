"""Loading sooner: a weight file is hashed while ONNX Runtime opens its graph, and matrices are packed on all threads.

Both take as long as the file is large, and on another core each. What is in a graph decides what a library does, so
graphs are compared with the manifest first. Weights are numbers: a session on the wrong ones is one that nobody gets.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from portlm.artifact import Manifest, check_files
from portlm.files import safe_join

PACK_ON_THREADS = "session.prepack.enable_parallel"
ROOM = 4  # times the weights


@contextmanager
def checking(folder: Path, graphs: Sequence[str], weights: str, manifest: Manifest) -> Iterator[None]:
    """Compare files with the manifest: graphs before the block, weights while it runs.

    Args:
        folder: the artifact.
        graphs: relative names.
        weights: relative name of the one weight file; its length is compared before the block, too.
        manifest: of the artifact.

    Raises:
        FormatError: as check_files(), whatever the block has raised.
    """
    check_files(folder, graphs, manifest)
    entry, path = manifest.files.get(weights), safe_join(folder, weights)
    if entry is None or not path.is_file() or path.stat().st_size != entry.size:
        check_files(folder, [weights], manifest)
    with ThreadPoolExecutor(1, "portlm-hash") as pool:
        compared = pool.submit(check_files, folder, [weights], manifest)
        try:
            yield
        finally:
            compared.result()


def has_room(weights: Path) -> bool:
    """Whether memory is so ample that matrices may be packed side by side, for which all are there twice at once.

    Unknown where the system does not say what is available.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        return ROOM * weights.stat().st_size < available
    except (OSError, StopIteration, ValueError):
        return False
