"""A model that is large enough to share its work among threads."""

import pytest


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """An artifact whose loops are long enough for three threads, compiled for every engine here on the CPU."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from portlm.compile.build import COMPILERS, build
    from portlm.compile.export import export
    from portlm.errors import EngineUnavailableError
    from portlm.models import build as build_model
    from portlm.models import save_model
    from portlm.models.gpt2 import GPT2Config

    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=4096, context_length=64, n_layer=2, n_head=4, width=256)
    save_model(root / "checkpoint", build_model(config))
    artifact = export(root / "checkpoint", root / "artifact")
    for key in COMPILERS:
        if key[1] == "cpu":
            try:
                build(artifact, [key])
            except EngineUnavailableError:
                continue
    return artifact
