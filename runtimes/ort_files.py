"""Hashing a weight file while ONNX Runtime opens the graph that reads it.

Both take as long as the file is large, and on another core each. What is in a graph decides what a library does, so
graphs are compared with the manifest first. Weights are numbers: a session on the wrong ones is one that nobody gets.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from portlm.artifact import Manifest, check_files
from portlm.files import safe_join


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
