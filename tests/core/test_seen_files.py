import hashlib
import mmap
import os
import time
from types import SimpleNamespace

import pytest

from portlm import artifact, seen_files
from portlm.errors import FormatError
from portlm.seen_files import check_data_files

NAME = "packed.portlm"
CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def settled(monkeypatch):
    """A file that was written just now counts as one that nobody writes to any more."""
    monkeypatch.setattr(seen_files, "SETTLED_SECONDS", -1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / NAME).write_bytes(CONTENT)
    return tmp_path / "model"


@pytest.fixture
def compared(monkeypatch):
    """The files whose bytes were read."""
    names, check = [], artifact.check_files

    def counted(folder, wanted, manifest):
        names.extend(wanted)
        return check(folder, wanted, manifest)

    monkeypatch.setattr(seen_files, "check_files", counted)
    return names


def manifest(content=CONTENT):
    return SimpleNamespace(
        files={NAME: SimpleNamespace(size=len(content), sha256=hashlib.sha256(content).hexdigest())},
        compiled=(),
    )


def check(folder, content=CONTENT):
    check_data_files(folder, [NAME], manifest(content))


def test_a_file_is_read_once_as_long_as_it_is_the_same(folder, compared, settled):
    for _ in range(3):
        check(folder)
    assert compared == [NAME]


def test_a_file_that_changed_a_moment_ago_is_read_again(folder, compared):
    check(folder)
    check(folder)
    assert compared == [NAME] * 2


def overwritten(path):
    """Other bytes of the same number, and the time of the last change set back."""
    found = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def mapped(path):
    """One byte, through a mapping."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[777] ^= 1
        memory.flush()


def replaced(path):
    """Another file under the name."""
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    other.rename(path)


def cut(path):
    path.write_bytes(CONTENT[:-1])


@pytest.mark.parametrize("change", [overwritten, mapped, replaced, cut])
def test_a_file_that_is_not_what_it_was_is_read_and_refused(change, folder, settled):
    check(folder)
    check(folder)
    time.sleep(0.02)  # the system's clock of files ticks a hundred times a second, or more often
    change(folder / NAME)
    with pytest.raises(FormatError, match=r"packed\.portlm: (altered|truncated)"):
        check(folder)


def test_a_file_that_was_compared_is_no_other_that_a_manifest_says(folder, settled):
    check(folder)
    with pytest.raises(FormatError, match="altered"):
        check(folder, CONTENT[::-1])


def test_what_was_refused_is_not_remembered(folder, settled):
    for _ in range(2):
        with pytest.raises(FormatError, match="altered"):
            check(folder, CONTENT[::-1])


@pytest.mark.parametrize("wrong", ["missing", "not listed", "a folder"])
def test_what_is_no_file_of_the_artifact_is_the_error_of_a_comparison(wrong, folder, settled):
    check(folder)
    if wrong == "not listed":
        with pytest.raises(FormatError, match="is not in the manifest"):
            check_data_files(folder, [NAME], SimpleNamespace(files={}, compiled=()))
        return
    (folder / NAME).unlink()
    if wrong == "a folder":
        (folder / NAME).mkdir()
    with pytest.raises(FormatError):
        check(folder)


def test_a_store_that_is_open_to_others_says_nothing(folder, compared, settled, own_home):
    check(folder)
    (own_home / "files").chmod(0o777)
    check(folder)
    assert compared == [NAME] * 2
