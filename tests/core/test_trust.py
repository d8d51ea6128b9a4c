import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from msgspec.structs import replace

from portlm import trust
from portlm.errors import FormatError, StorageError, UsageError
from portlm.trust import Build, home, is_trusted, private_folder, private_scratch, record_built, trust_folder

BUILD = Build("a" * 64, "tvm", "cpu", "fused", "b" * 64, {"signature.json": "c" * 64})


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_only_what_was_recorded_is_trusted():
    assert not is_trusted(BUILD)
    record_built(BUILD)
    record_built(BUILD)
    assert is_trusted(BUILD)
    assert len(list(trust_folder().iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"library": "d" * 64}, {"engine": "ort"}, {"device": "cuda"}, {"profile": "portable"}, {"graph": "d" * 64},
        {"beside": {"signature.json": "d" * 64}}, {"beside": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_library_is_trusted_as_nothing_but_what_it_was_compiled_for(other):
    record_built(BUILD)
    assert not is_trusted(replace(BUILD, **other))


def test_the_same_library_of_two_graphs_is_trusted_with_both():
    """Machine code holds no weights, so two models of one shape may have the same."""
    second = replace(BUILD, graph="d" * 64)
    record_built(BUILD)
    record_built(second)
    assert is_trusted(BUILD)
    assert is_trusted(second)


def test_an_entry_says_what_was_compiled_for_what():
    record_built(BUILD)
    (entry,) = trust_folder().iterdir()
    assert json.loads(entry.read_text()) == {
        "library": "a" * 64, "engine": "tvm", "device": "cpu", "profile": "fused", "graph": "b" * 64,
        "beside": {"signature.json": "c" * 64},
    }  # fmt: skip


def test_an_empty_entry_of_a_library_alone_is_not_trust():
    """As versions before wrote it."""
    (private_folder("trust") / BUILD.library).write_bytes(b"")
    assert not is_trusted(BUILD)
    assert trust.was_recorded_alone(BUILD.library)


def test_store_belongs_to_its_owner_alone(own_home):
    record_built(BUILD)
    assert trust_folder() == own_home / "trust"
    assert trust_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o770, 0o777], ids=oct)
def test_store_open_to_others_is_refused(mode):
    record_built(BUILD)
    trust_folder().chmod(mode)
    for use in (is_trusted, record_built):
        with pytest.raises(FormatError, match="nobody else can enter"):
            use(BUILD)


def test_store_that_is_a_link_is_refused(tmp_path):
    record_built(BUILD)
    trust_folder().rename(tmp_path / "elsewhere")
    trust_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="must be a folder of yours"):
        is_trusted(BUILD)


def test_default_place_is_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PORTLM_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert trust_folder() == tmp_path / "portlm" / "trust"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert trust_folder() == tmp_path / "me" / ".cache" / "portlm" / "trust"


def test_store_that_cannot_be_made_is_a_storage_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set PORTLM_HOME elsewhere"):
        record_built(BUILD)


# --- where the store may be -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["portlm", "./portlm", "~/portlm", "../x"])
def test_a_relative_home_is_refused(monkeypatch, name):
    monkeypatch.setenv("PORTLM_HOME", name)
    for use in (home, trust_folder, lambda: is_trusted(BUILD), lambda: record_built(BUILD)):
        with pytest.raises(UsageError, match="PORTLM_HOME must be an absolute path"):
            use()


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch):
    for name in ("PORTLM_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(UsageError, match="set PORTLM_HOME to an absolute path"):
        home()


@pytest.mark.parametrize("where", ["home", "above"])
@pytest.mark.parametrize(("mode", "who"), [(0o777, "everybody"), (0o757, "everybody"), (0o703, "everybody")])
def test_a_folder_above_that_everybody_may_write_to_is_refused(monkeypatch, tmp_path, where, mode, who):
    place = tmp_path / "above" / "home"
    monkeypatch.setenv("PORTLM_HOME", str(place))
    record_built(BUILD)
    open_one = place if where == "home" else place.parent
    open_one.chmod(mode)
    for use in (is_trusted, record_built):
        with pytest.raises(FormatError, match=rf"{who} may write to {open_one} \(mode {mode:o}\)"):
            use(BUILD)


def test_a_folder_above_that_a_group_may_write_to_is_refused_unless_the_group_is_the_users_own(
    monkeypatch, tmp_path
):
    record_built(BUILD)
    (tmp_path / "home").chmod(0o770)
    own = {"is_own_group": True}
    monkeypatch.setattr(trust, "_is_own_group", lambda gid: own["is_own_group"])
    assert is_trusted(BUILD)
    own["is_own_group"] = False
    with pytest.raises(FormatError, match=r"group \d+ may write to .*home \(mode 770\)"):
        is_trusted(BUILD)


def test_in_a_folder_with_the_sticky_bit_as_tmp_is_a_folder_of_the_users_is_fine(monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "tmp" / "mine"))
    record_built(BUILD)
    assert is_trusted(BUILD)


@pytest.mark.parametrize("owner", [12345, 65534])
def test_a_folder_above_that_another_user_owns_is_refused(monkeypatch, tmp_path, owner):
    """The owner is made up, since only root can give a folder away."""
    record_built(BUILD)
    real, foreign = Path.stat, tmp_path

    def stat(self, **options):
        found = list(real(self, **options))
        if self == foreign:
            found[4] = owner
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(FormatError, match=f"user {owner}, whose folder it is, may write to {tmp_path}"):
        is_trusted(BUILD)


def test_links_above_are_followed_before_folders_are_looked_at(monkeypatch, tmp_path):
    shared = tmp_path / "shared"
    (shared / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(shared / "real")
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "link" / "home"))
    record_built(BUILD)
    assert private_folder("trust") == shared / "real" / "home" / "trust"
    shared.chmod(0o777)
    with pytest.raises(FormatError, match=f"may write to {shared}"):
        is_trusted(BUILD)


def test_folders_that_are_made_above_are_closed_to_others(monkeypatch, tmp_path):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        record_built(BUILD)
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/trust"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
    assert is_trusted(BUILD)


def test_the_folder_for_temporary_files_is_looked_at_in_the_same_way(monkeypatch, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with private_scratch() as scratch:
        assert scratch.parent == temporary
        assert scratch.stat().st_mode & 0o777 == 0o700
    assert not list(temporary.iterdir())
    temporary.chmod(0o777)
    with pytest.raises(FormatError, match=f"everybody may write to {temporary}"), private_scratch():
        pass
    assert not list(temporary.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_with_an_ordinary_home_can_use_it(tmp_path_factory):
    """As somebody else, below folders that belong to root; and where another user's folder is on the way, not."""
    program = (
        "import os\n"
        "from portlm import trust\n"
        "os.setgid(12345); os.setuid(12345)\n"
        "build = trust.Build('a' * 64, 'tvm', 'cpu', 'fused', 'b' * 64, {})\n"
        "trust.record_built(build)\n"
        "assert trust.is_trusted(build)\n"
    )
    # Not below pytest's own folder, which nobody else may enter.
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # which has the sticky bit
    try:
        place.chmod(0o755)
        (place / "me").mkdir()
        os.chown(place / "me", 12345, 12345)
        environment = {**os.environ, "PORTLM_HOME": str(place / "me" / "portlm")}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        os.chown(place, 54321, 54321)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert f"user 54321, whose folder it is, may write to {place}" in done.stderr
    finally:
        shutil.rmtree(place)
