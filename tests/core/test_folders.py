"""Folders that appear whole: the same for artifacts, checkpoints and imports (tests/train has the kill tests)."""

import errno
import subprocess
from pathlib import Path

import pytest

from portlm.folders import FileOps, new_folder, remove_leftovers


def write(target, text, **options):
    with new_folder(target, **options) as folder:
        assert folder.parent == target.parent
        (folder / "deeper").mkdir()
        (folder / "deeper" / "file").write_text(text)
    return target


def dead_pid():
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


@pytest.mark.parametrize("previous", [None, "empty", "full"])
def test_a_folder_appears_whole_in_place_of_the_old_one(tmp_path, previous):
    target = tmp_path / "out"
    if previous == "empty":
        target.mkdir()
    if previous == "full":
        write(target, "old")
        (target / "stale").write_text("")
    write(target, "new")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "out", "out/deeper", "out/deeper/file",
    ]  # fmt: skip
    assert (target / "deeper" / "file").read_text() == "new"


def test_every_file_and_folder_is_on_the_disk_before_the_name_is(tmp_path):
    calls = []

    class Recording(FileOps):
        def seal_file(self, path, hashed=True):
            calls.append(path.name)
            return super().seal_file(path, hashed)

        def sync_folder(self, path):
            calls.append(path.name.partition(".tmp")[0])
            super().sync_folder(path)

        def rename(self, old, new):
            calls.append(f"rename to {new.name}")
            super().rename(old, new)

    write(tmp_path / "out", "x", ops=Recording())
    assert sorted(calls[:2]) == ["deeper", "file"]
    assert calls[2:] == ["out", "rename to out", tmp_path.name]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()], ids=repr
)
def test_whatever_goes_wrong_in_the_block_the_old_folder_stays(tmp_path, error):
    target = write(tmp_path / "out", "old")

    def fail_half_way():
        with new_folder(target) as folder:
            (folder / "half").write_text("")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "deeper" / "file").read_text() == "old"


def test_a_killed_attempt_is_cleared_away_and_a_strangers_folder_is_not(tmp_path):
    """In a folder that is not ours alone, only the leftovers of the very name that is written now are taken away."""
    mine, theirs = tmp_path / f"out.tmp-{dead_pid()}", tmp_path / f"thesis.tmp-{dead_pid()}"
    mine.mkdir()
    theirs.mkdir()
    write(tmp_path / "out", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", theirs.name]
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_set_aside_when_the_process_died_comes_back(tmp_path):
    target = write(tmp_path / "out", "old")
    target.rename(tmp_path / f"out.old.tmp-{dead_pid()}")
    with pytest.raises(ValueError, match="now"), new_folder(target):
        raise ValueError("now")
    assert (target / "deeper" / "file").read_text() == "old"


def test_the_folder_may_be_the_one_we_stand_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path()) as folder:
        (folder / "file").write_text("x")
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["file"]
