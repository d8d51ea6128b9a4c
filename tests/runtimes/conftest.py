"""A model that is large enough to share its work among threads, and a clock by which guesses cost nothing."""

from functools import partial

import pytest

from portlm.runtimes import guessing, pace
from portlm.runtimes.speculation import Speculation


@pytest.fixture(scope="session")
def wide(compile_all, once, tmp_path_factory):
    """An artifact whose loops are long enough for three threads, compiled for every engine here on the CPU."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from portlm.compile.export import export
    from portlm.models import build, save_model
    from portlm.models.gpt2 import GPT2Config

    def make(folder):
        torch.manual_seed(3)
        config = GPT2Config(vocab_size=4096, context_length=64, n_layer=2, n_head=4, width=256)
        checkpoint = tmp_path_factory.mktemp("wide")
        save_model(checkpoint / "checkpoint", build(config))
        compile_all(export(checkpoint / "checkpoint", folder), ["cpu"])

    return once("wide", make)


@pytest.fixture
def free_passes(monkeypatch):
    """The clock of guesses stands still, nothing costs or is learned, so all guesses are read."""
    monkeypatch.setattr(pace, "MEMORY", 1e9)
    monkeypatch.setattr(pace, "OVERHEAD", 0.0)
    monkeypatch.setattr(pace, "PASS", 0.0)
    monkeypatch.setattr(pace, "FIRST_PLAIN", 1)
    monkeypatch.setattr(pace, "SHARE", float("inf"))
    monkeypatch.setattr(guessing, "Speculation", partial(Speculation, clock=lambda: 0.0))
