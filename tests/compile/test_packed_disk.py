"""A disk that fills up while packed.portlm is written leaves nothing half-written, and one line says what is short."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
pytest.importorskip("portlm._C", reason="portlm._C was not built")

from portlm import files, large_parts
from portlm.artifact import read_manifest
from portlm.compile import packed_file
from portlm.compile.build import build
from portlm.compile.packed import FILE
from portlm.errors import StorageError

KEY = ("packed", "cpu", "fused")


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def model(artifacts, tmp_path):
    return shutil.copytree(artifacts["gpt2"], tmp_path / "model")


@pytest.mark.parametrize("compiled_before", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("full_at", [0, 1, 2, 3])
def test_a_disk_that_fills_up_leaves_the_artifact_as_it_was(full_at, compiled_before, model, monkeypatch):
    """The system refuses each part of the file in turn, after those before it were written."""
    if compiled_before:
        build(model, [KEY])
    before, manifest = names(model), (model / "manifest.json").read_bytes()
    old = (model / FILE).read_bytes() if compiled_before else None
    parts = []
    real = large_parts.LargeParts.flush

    def flush(self):
        parts.append(self._filled)
        if len(parts) > full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self)

    monkeypatch.setattr(large_parts, "PART", 1 << 14)  # the file of a small model has several
    monkeypatch.setattr(large_parts.LargeParts, "flush", flush)
    with pytest.raises(StorageError) as caught:
        build(model, [KEY])
    assert len(parts) == full_at + 1
    assert str(model / FILE) in str(caught.value)
    assert "bytes are needed" in str(caught.value)
    assert "are free" in str(caught.value)
    assert names(model) == before
    assert (model / "manifest.json").read_bytes() == manifest
    assert (model / FILE).read_bytes() == old if compiled_before else not (model / FILE).exists()


def test_too_little_space_is_noticed_before_anything_is_written(model, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(packed_file, "atomic_file", lambda *_: pytest.fail("began to write"))
    with pytest.raises(StorageError, match=rf"{FILE}: \d+ bytes are needed but 1000 are free"):
        build(model, [KEY])
    assert FILE not in read_manifest(model).files


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte, which can be mounted by root alone."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_on_a_disk_that_is_really_full_the_command_ends_with_one_line(disk, artifacts, monkeypatch):
    """What is free is overstated, as where another program takes it meanwhile, so that writing itself fails."""
    model = shutil.copytree(artifacts["gpt2"], disk / "model")
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 40_000)))
    before = names(model)
    command = (
        "import sys\nfrom portlm.compile import packed_file\npacked_file.check_space = lambda *_: None\n"
        "from portlm.cli import main\nmain(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "compile", str(model), "--engine", "packed"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"portlm: error: {model / FILE} cannot be written, the disk or quota is full: ")
    assert "bytes are needed" in line
    assert names(model) == before
