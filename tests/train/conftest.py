"""What the tests of training share."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def toy_encoder(monkeypatch):
    """The module of a family that only these tests have, registered as every family is."""
    from portlm.models import FAMILIES

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("toy_encoder")
    monkeypatch.setitem(FAMILIES, module.NAME, module.FAMILY)
    return module
