"""Checkpoints: whatever breaks, the newest complete one before it still loads."""

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from portlm.errors import FormatError, PortlmError, StorageError, UsageError
from portlm.files import write_atomic
from portlm.train.checkpoint import (
    MANIFEST,
    FileOps,
    check_checkpoint,
    is_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    remove_stale_files,
    renamed_checkpoints,
    replace_folder,
    save_checkpoint,
    set_aside_newer,
)


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory where there is one: the loops below wait for the disk a thousand times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def fill_with(step):
    def fill(folder: Path):
        write_atomic(folder / "model.bin", bytes([step % 256]) * 5000)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "rng.bin").write_bytes(os.urandom(100))

    return fill


def save(root, step, **options):
    options = {"state": {"seen": step * 10}, "estimate": 6000, **options}
    return save_checkpoint(root, step, options.pop("fill", fill_with(step)), **options)


def storage_error(action):
    """Return the message of the StorageError that an action raises, or None when it succeeds."""
    try:
        action()
    except StorageError as error:
        return str(error)
    return None


def newest(root):
    warnings = []
    return newest_checkpoint(root, warnings.append), warnings


class CountingOps(FileOps):
    """Fails the operation with number ``fail_at``; counts them all."""

    def __init__(self, fail_at=-1, code=errno.EIO):
        self.count, self.fail_at, self.code, self.failed = 0, fail_at, code, ""

    def __getattribute__(self, name):
        if name.startswith("_") or name not in vars(FileOps):
            return object.__getattribute__(self, name)
        method = object.__getattribute__(self, name)

        def counted(*args):
            self.count += 1
            if self.count - 1 == self.fail_at:
                self.failed = name
                raise OSError(self.code, os.strerror(self.code))
            return method(*args)

        return counted


def test_a_checkpoint_holds_its_files_and_its_state(tmp_path):
    folder = save(tmp_path, 7)
    found, warnings = newest(tmp_path)
    assert (found.path, found.step, found.state, warnings) == (folder, 7, {"seen": 70}, [])
    assert {p.name for p in folder.iterdir()} == {"deeper", MANIFEST, "model.bin"}
    assert (tmp_path / "latest").read_text() == "step-7\n"


def test_a_manifest_under_its_old_name_is_read_unless_there_is_a_new_one(tmp_path):
    folder = save(tmp_path, 7)
    (folder / MANIFEST).rename(folder / "manifest.json")
    assert is_checkpoint(folder)
    assert newest(tmp_path)[0].state == {"seen": 70}
    (folder / MANIFEST).write_text("{}")
    assert not is_checkpoint(folder)
    with pytest.raises(FormatError, match=MANIFEST):
        check_checkpoint(folder)


def test_the_newest_is_the_highest_number_and_old_ones_go(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]
    save(tmp_path, 200, keep=3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100, 200]
    assert newest(tmp_path)[0].step == 200


def test_without_checkpoints_there_is_nothing_to_resume(tmp_path):
    assert newest(tmp_path)[0] is None
    assert newest(tmp_path / "absent")[0] is None


def test_fewer_than_two_kept_and_a_step_saved_twice_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 2"):
        save(tmp_path, 1, keep=1)
    save(tmp_path, 1)
    with pytest.raises(UsageError, match="exists already"):
        save(tmp_path, 1)


def test_new_files_and_folders_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(previous)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()} == {0o640}


# ---- damage ----------------------------------------------------------------------------------------------


def two_checkpoints(root):
    save(root, 1)
    return save(root, 2)


def test_a_file_cut_at_any_length_is_noticed_and_the_one_before_is_used(tmp_path):
    folder = two_checkpoints(tmp_path)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        end = len(whole) - (path.name == MANIFEST)  # a manifest may lose the newline after its last brace
        for size in {0, 1, end // 2, end - 1}:
            path.write_bytes(whole[:size])
            found, warnings = newest(tmp_path)
            assert found.step == 1
            assert str(folder) in warnings[0]
            assert folder.exists()
        path.write_bytes(whole)
    assert newest(tmp_path)[0].step == 2


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_bit_in_any_file_is_noticed(tmp_path, data):
    folder = tmp_path / "step-2"
    if not folder.exists():
        two_checkpoints(tmp_path)
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        with pytest.raises(FormatError):
            check_checkpoint(folder)
    except pytest.fail.Exception:
        # The one thing a flip may do unseen is to turn a blank of the manifest into another blank.
        assert path.name == MANIFEST
        assert chr(damaged[bit // 8]).isspace()
        assert chr(whole[bit // 8]).isspace()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["model.bin", "deeper/rng.bin", MANIFEST])
def test_a_missing_file_is_named(tmp_path, name):
    folder = two_checkpoints(tmp_path)
    (folder / name).unlink()
    with pytest.raises(FormatError, match=Path(name).name):
        check_checkpoint(folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = two_checkpoints(tmp_path)
    (folder / "model.bin").unlink()
    (folder / "model.bin").symlink_to(tmp_path / "step-1" / "model.bin")
    with pytest.raises(FormatError, match="symbolic link"):
        check_checkpoint(folder)


def test_when_all_are_damaged_nothing_is_guessed_or_deleted(tmp_path):
    two_checkpoints(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step-{step}" / "model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="none of the 2"):
        newest(tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]


def test_a_set_aside_checkpoint_survives_pruning_and_frees_its_number(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "step-2" / "model.bin").write_bytes(b"")
    warnings = []
    set_aside_newer(tmp_path, 1, warnings.append)
    for step in (2, 3, 4, 5):
        save(tmp_path, step)
    assert (tmp_path / "step-2.aside" / "model.bin").read_bytes() == b""
    assert "step-2.aside" in warnings[0]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]
    set_aside_newer(tmp_path, 3, warnings.append)
    save(tmp_path, 4)
    set_aside_newer(tmp_path, 3, warnings.append)
    assert (tmp_path / "step-4.aside-2").exists()


def test_pruning_counts_only_checkpoints_that_look_complete(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-2" / "model.bin").write_bytes(b"")
    save(tmp_path, 3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2, 3]


# ---- renamed folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step-500", "step-1"])
def test_a_renamed_checkpoint_is_of_the_step_that_it_holds(tmp_path, name):
    """Whatever number the name has: it is not set aside as a newer one, nor preferred to a newer one."""
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "step-20").rename(tmp_path / name)
    found, warnings = newest(tmp_path)
    assert (found.step, found.path.name, warnings) == (20, name, [])
    set_aside_newer(tmp_path, found.step, warnings.append)
    assert (found.path.is_dir(), warnings) == (True, [])
    (tmp_path / "step-10").rename(tmp_path / "step-900")
    assert newest(tmp_path)[0].step == 20
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 20]


def test_pruning_counts_steps_and_not_names(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-1").rename(tmp_path / "step-900")
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2", "step-3"]


def test_a_renamed_checkpoint_in_the_way_of_a_save_is_kept_beside_it(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "step-4").rename(tmp_path / "step-5")
    save(tmp_path, 5)
    assert check_checkpoint(tmp_path / "step-5").step == 5
    assert check_checkpoint(tmp_path / "step-5.aside").step == 4
    with pytest.raises(UsageError, match="exists already"):
        save(tmp_path, 5)


def test_checkpoints_under_names_that_no_resume_finds_are_listed(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    assert renamed_checkpoints(tmp_path) == renamed_checkpoints(tmp_path / "absent") == []
    (tmp_path / "step-2").rename(tmp_path / "best")
    (tmp_path / "step-3.tmp-77").mkdir()
    shutil.copy(tmp_path / "best" / MANIFEST, tmp_path / "step-3.tmp-77")
    (tmp_path / "notes").mkdir()
    assert renamed_checkpoints(tmp_path) == [tmp_path / "best"]


# ---- failing operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_failing_any_operation_keeps_the_previous_checkpoint(memory_path, code):
    """Every index of every operation of a save, until one save has no more operations to fail."""
    fail_at = 0
    failed = []
    while True:
        root = memory_path / str(fail_at)
        save(root, 1)
        save(root, 2)
        ops = CountingOps(fail_at, code)
        message = storage_error(lambda root=root, ops=ops: save(root, 3, ops=ops))
        if message is None:
            assert ops.count <= fail_at
            break
        assert "earlier checkpoints are intact" in message
        assert "\n" not in message
        failed.append(ops.failed)
        found, warnings = newest(root)
        assert found.step in (2, 3)
        assert not warnings
        assert len(list_checkpoints(root)) >= 2
        assert not [path for path in root.iterdir() if ".tmp-" in path.name and ops.failed != "remove_folder"]
        # The next save, with the disk well again, succeeds.
        save(root, 4)
        assert newest(root)[0].step == 4
        assert not [path for path in root.iterdir() if ".tmp" in path.name]
        fail_at += 1
    assert set(failed) == {name for name in vars(FileOps) if not name.startswith("_")}


@pytest.mark.parametrize(
    "name", ["open", "fsync", "mkdir", "rename", "replace", "statvfs", "rmdir", "unlink"]
)
def test_failing_any_system_call_keeps_the_previous_checkpoint(memory_path, monkeypatch, name):
    """The same, one level lower: also inside the functions that write the model's own files."""
    real = getattr(os, name)
    for fail_at in range(60):
        root = memory_path / f"{name}-{fail_at}"
        save(root, 1)
        save(root, 2)
        calls = []

        def failing(*args, calls=calls, fail_at=fail_at, **options):
            calls.append(args)
            if len(calls) - 1 == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with contextlib.suppress(StorageError):
                save(root, 3)
        assert newest(root)[0].step in (2, 3)
        save(root, 4)
        assert newest(root)[0].step == 4
        if len(calls) <= fail_at:
            break
    assert len(calls) <= fail_at, "the loop ended before every call had failed once"


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path):
    class FullOps(FileOps):
        def free_bytes(self, path):
            return 6599

    save(tmp_path, 1)
    with pytest.raises(StorageError, match="6600 bytes") as caught:
        save(tmp_path, 2, ops=FullOps(), fill=lambda folder: pytest.fail("started to write"))
    assert "6599" in str(caught.value)
    assert newest(tmp_path)[0].step == 1


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_really_fills_up_keeps_the_previous_checkpoint(small_disk):
    save(small_disk, 1)
    save(small_disk, 2)
    for size in range(0, 260_000, 13_000):  # 20 sizes, the larger ones do not fit

        def fill(folder, size=size):
            write_atomic(folder / "model.bin", bytes(size))

        step = newest(small_disk)[0].step
        message = storage_error(
            lambda step=step, fill=fill: save(small_disk, step + 1, fill=fill, estimate=0)
        )
        if message is None:
            assert newest(small_disk)[0].step == step + 1
            continue
        assert "full" in message or "No space left" in message
        assert "free" in message
        assert newest(small_disk)[0].step == step
    assert newest(small_disk)[0].step > 2
    assert step < 20, "the disk never filled up: this test showed nothing"


# ---- leftovers -------------------------------------------------------------------------------------------


def dead_pid():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    names = {
        f"step-3.tmp-{dead_pid()}": False,
        f"step-4.tmp-{os.getpid()}": False,  # from before: containers hand out the same numbers again
        f"step-5.tmp-{os.getppid()}": True,
        "step-6.tmp-": True,
        "notes": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    remove_leftovers(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_leftover_that_is_a_link_is_never_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / f"step-3.tmp-{dead_pid()}").symlink_to(tmp_path / "precious")
    remove_leftovers(tmp_path)
    assert (tmp_path / "precious" / "file").exists()


def test_stale_temporary_files_go_and_other_hidden_files_stay(tmp_path):
    (tmp_path / ".latest.0123456789abcdef.tmp").write_text("x")
    (tmp_path / ".gitignore").write_text("x")
    remove_stale_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_half_a_save_is_never_taken_for_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-9.tmp-1")
    assert newest(tmp_path)[0].step == 1


# ---- whole folders ---------------------------------------------------------------------------------------


def test_replacing_a_folder_keeps_modes_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "final"
    replace_folder(target, fill_with(1), estimate=0)
    (target / "model.bin").chmod(0o600)
    target.chmod(0o700)
    replace_folder(target, fill_with(2), estimate=0)
    assert (target / "model.bin").read_bytes() == bytes([2]) * 5000
    assert (target / "model.bin").stat().st_mode & 0o777 == 0o600
    assert target.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_failing_any_operation_of_a_replacement_keeps_the_old_folder(memory_path):
    fail_at = 0
    while True:
        root = memory_path / str(fail_at)
        target = replace_folder(root / "final", fill_with(1), estimate=0)
        ops = CountingOps(fail_at, errno.ENOSPC)
        if (
            storage_error(lambda ops=ops, t=target: replace_folder(t, fill_with(2), estimate=0, ops=ops))
            is None
        ):
            break
        assert (target / "model.bin").read_bytes() in (bytes([1]) * 5000, bytes([2]) * 5000)
        replace_folder(target, fill_with(3), estimate=0)
        assert [path.name for path in root.iterdir()] == ["final"]
        fail_at += 1
    assert fail_at > 5


@pytest.mark.parametrize("fail_at", range(4))
def test_a_process_killed_while_replacing_leaves_the_old_folder_or_the_new(tmp_path, fail_at):
    """The moments around the two renames: what the next process finds, and what it makes of it."""
    new, old = tmp_path / f"final.tmp-{dead_pid()}", tmp_path / f"final.old.tmp-{dead_pid()}"
    target = replace_folder(tmp_path / "final", fill_with(1), estimate=0)
    shutil.copytree(target, new)
    if fail_at >= 1:
        target.rename(old)
    if fail_at >= 2:
        new.rename(target)
    if fail_at >= 3:
        shutil.rmtree(old)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (target / "model.bin").read_bytes() == bytes([1]) * 5000


def test_every_error_is_one_of_ours(tmp_path):
    """A folder that cannot be made: the root is a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(PortlmError, match="file"):
        save(tmp_path / "file", 1)
