"""What the tests of training share."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_runs, which several files share


@pytest.fixture
def one_thread():
    """The models here are too small to share."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path):
    """A text of 6 kB."""
    from tiny_runs import TEXT

    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def toy_encoder(monkeypatch):
    """The module of a family that only these tests have, registered as every family is."""
    from portlm.models import FAMILIES

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("toy_encoder")
    monkeypatch.setitem(FAMILIES, module.NAME, module.FAMILY)
    return module
