import hashlib

import pytest

from portlm.errors import FormatError, StorageError
from portlm.trust import is_trusted, record_built, trust_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "model.so"
    path.write_bytes(b"\x7fELF")
    return path


def test_only_what_was_recorded_is_trusted(home, library):
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert not is_trusted(digest)
    assert record_built(library) == digest
    assert record_built(library) == digest
    assert is_trusted(digest)
    library.write_bytes(b"\x7fELF something else")
    assert not is_trusted(hashlib.sha256(library.read_bytes()).hexdigest())


def test_store_belongs_to_its_owner_alone(home, library):
    record_built(library)
    assert trust_folder() == home / "trust"
    assert trust_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o770, 0o777], ids=oct)
def test_store_open_to_others_is_refused(home, library, mode):
    digest = record_built(library)
    trust_folder().chmod(mode)
    with pytest.raises(FormatError, match="nobody else can enter"):
        is_trusted(digest)
    with pytest.raises(FormatError, match="nobody else can enter"):
        record_built(library)


def test_store_that_is_a_link_is_refused(home, library, tmp_path):
    digest = record_built(library)
    trust_folder().rename(tmp_path / "elsewhere")
    trust_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="must be a folder of yours"):
        is_trusted(digest)


@pytest.mark.parametrize(
    "text", ["", "..", "../../etc/passwd", "A" * 64, "g" * 64, "0" * 63, "0" * 65, "\0" * 64]
)
def test_what_is_no_digest_is_not_trusted(home, library, text):
    record_built(library)
    assert not is_trusted(text)


def test_default_place_is_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PORTLM_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert trust_folder() == tmp_path / "portlm" / "trust"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert trust_folder() == tmp_path / "me" / ".cache" / "portlm" / "trust"


def test_store_that_cannot_be_made_is_a_storage_error(monkeypatch, library, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set PORTLM_HOME elsewhere"):
        record_built(library)
