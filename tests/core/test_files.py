import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from portlm import files
from portlm.errors import FormatError, StorageError


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


def test_write_then_read_gives_the_same_bytes(tmp_path):
    files.write_atomic(tmp_path / "a", b"\x00\xff")
    files.write_atomic(tmp_path / "b", "é\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "é\n".encode()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664])
def test_replacing_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    files.write_atomic(path, b"new")
    assert path.stat().st_mode & 0o777 == mode


def test_a_new_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_writing_replaces_a_symbolic_link_and_spares_its_target(tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("target")
    files.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()


CALLS = ["os.open", "os.fchmod", "os.fsync", "os.replace"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_each_failing_system_call_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, call, code):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(f"portlm.files.{call}", fail)
        with pytest.raises(StorageError) as caught:
            files.write_atomic(path, b"new!")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    if code in (errno.ENOSPC, errno.EDQUOT):
        assert "4 bytes are needed, " in message
        assert "bytes are free" in message


def test_an_exception_inside_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupted():
        with files.atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_real_write_limit_leaves_the_old_file(tmp_path):
    """The kernel, not a mock, refuses the write: RLIMIT_FSIZE gives EFBIG part of the way."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = (
        "import resource, sys; from portlm import files; from portlm.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: files.write_atomic(sys.argv[1], bytes(1_000_000))\n"
        "except StorageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert str(path) in done.stdout
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_readers_never_see_a_mixture_while_a_file_is_rewritten(tmp_path):
    path = tmp_path / "a"
    contents = [bytes([i]) * 50_000 for i in range(2)]
    files.write_atomic(path, contents[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        files.write_atomic(path, contents[i % 2])
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"the folder .*nowhere does not exist"):
        files.write_atomic(tmp_path / "nowhere" / "a", b"")


def test_sha256_file_equals_hashlib(tmp_path):
    data = os.urandom(300_001)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_reading_refuses_what_is_no_regular_file_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("/dev/zero"), "nul\0byte"):
        for read in (files.sha256_file, files.read_json):
            with pytest.raises(FormatError) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_space_is_checked_even_for_folders_that_do_not_exist_yet(tmp_path):
    place = tmp_path / "a" / "b"
    assert files.free_bytes(place) > 0
    files.check_space(place, 1)
    with pytest.raises(StorageError, match=f"{2**62} bytes are needed but .* are free"):
        files.check_space(place, 2**62)


REFUSED_NAMES = [
    "", ".", "..", "../x", "a/../x", "a/../../x", "a/./b", "/etc/passwd", "//x", "a//b", "a/", "C:\\x", "C:x",
    "\\\\?\\x", "a\\b", "a\0b", "a\nb", "\x7f", "x" * 256, "x" * 4096, "é" * 128, "\ud800", "a:stream",
    None, 3, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_NAMES, ids=lambda n: ascii(n)[:20])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(FormatError) as caught:
        files.safe_join(tmp_path, name)
    assert str(caught.value).isprintable()


def test_ordinary_names_are_joined_whether_or_not_they_exist(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "a..b").write_bytes(b"")
    for name in ("onnx/a..b", "onnx/new", "new/deeper/file.bin", "é", "x" * 255):
        assert files.safe_join(tmp_path, name) == tmp_path / name


def test_links_folders_and_devices_below_the_root_are_refused(tmp_path):
    root, outside = tmp_path / "model", tmp_path / "model-evil"
    root.mkdir()
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    (root / "file").write_bytes(b"")
    (root / "folder").mkdir()
    (root / "out").symlink_to(outside)
    (root / "leaf").symlink_to(outside / "x")
    (root / "inside").symlink_to("file")
    (root / "dangling").symlink_to("nothing")
    os.mkfifo(root / "pipe")
    for name in ("out/x", "out/new", "leaf", "inside", "dangling", "dangling/x", "pipe", "folder", "file/x"):
        with pytest.raises(FormatError, match=r"symbolic link|is not a"):
            files.safe_join(root, name)


def test_the_root_itself_may_be_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("real")
    assert files.safe_join(tmp_path / "link", "a").is_file()


@given(st.text(max_size=40))
@example("a/b")
def test_no_accepted_name_leaves_the_root(name):
    root = Path("/nonexistent/root")
    try:
        path = files.safe_join(root, name)
    except FormatError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(root)
    assert path != root


BAD_JSON = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "trailing": b"{} {}",
    "duplicate": b'{"a": 1, "b": {"c": 1, "c": 1}}',
    "nan": b'{"a": NaN}',
    "infinity": b"[-Infinity]",
    "overflow": b"[1e999]",
    "digits": b"[" + b"9" * 5000 + b"]",
    "utf8": b'["\xff"]',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "surrogate": b'["\\ud800"]',
    "surrogate key": b'{"\\udfff": 1}',
    "deep": b"[" * 100_000,
    "deep closed": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("raw", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_with_no_single_meaning_is_refused_in_one_line(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(FormatError, match=r"a\.json") as caught:
        files.read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_json_larger_than_the_limit_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 98 + b"]")
    assert files.read_json(tmp_path / "a.json", max_bytes=100) == []
    with pytest.raises(FormatError, match="larger than the 99 bytes"):
        files.read_json(tmp_path / "a.json", max_bytes=99)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda value: st.lists(value, max_size=3) | st.dictionaries(TEXT, value, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.booleans())
def test_plain_json_is_read_as_it_was_written(value, ascii_only):
    assert files.parse_json(json.dumps(value, ensure_ascii=ascii_only).encode(), "x") == value


@given(st.binary(max_size=60))
def test_any_bytes_parse_or_raise_format_error(raw):
    try:
        files.parse_json(raw, "x")
    except FormatError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message


@pytest.mark.parametrize(
    "raw", [b"[" + b"{}," * 2**20 + b"{}]", b"[" * 2**21, b'{"a": [' + b"1," * 2**20 + b"1]}"],
    ids=["objects", "depth", "numbers"],
)  # fmt: skip
def test_json_with_too_many_values_is_refused_before_they_are_made(tmp_path, monkeypatch, raw):
    """Sixteen MiB of empty objects would be five million of them."""
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    monkeypatch.setattr("json.loads", None)
    with pytest.raises(FormatError, match=r"a\.json holds more than the 1048576 JSON values"):
        files.read_json(path)


def test_the_number_of_json_values_counts_commas_and_brackets(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[1,2]")
    assert files.read_json(path, max_values=2) == [1, 2]
    with pytest.raises(FormatError, match="more than the 1 JSON values"):
        files.read_json(path, max_values=1)
