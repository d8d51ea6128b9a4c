"""A folder that holds an artifact's files and manifest, and no model."""

import pytest
from manifest_cases import FILES, make_manifest

from portlm.artifact import write_manifest


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(FILES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes([i]) * (1000 + i))
    write_manifest(tmp_path, make_manifest(tmp_path))
    (tmp_path / "original.json").write_bytes((tmp_path / "manifest.json").read_bytes())
    return tmp_path
