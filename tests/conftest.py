"""Tiny models that several test folders share, made once per run by portlm's own export and compile."""

import pytest

FAMILIES = ("gpt2", "llama")
EOS = "<|endoftext|>"


@pytest.fixture(scope="session", autouse=True)
def _own_trust_store(tmp_path_factory):
    """Compiled code is trusted through a folder in the user's home: tests use one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTLM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a random checkpoint by family, with a tokenizer of 256 bytes and an end of text.

    Weights are large, so that logits reach 7 and the two most probable tokens are rarely closer than 0.01: engines
    that differ by rounding still choose the same token.
    """
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from portlm.models import build, save_model
    from portlm.models.gpt2 import GPT2Config
    from portlm.models.llama import LlamaConfig
    from portlm.tokenizer import byte_tokenizer

    sizes = {"vocab_size": 257, "context_length": 48, "n_layer": 2, "n_head": 4, "width": 32}
    configs = {
        "gpt2": GPT2Config(**sizes, eos_token_ids=(256,)),
        "llama": LlamaConfig(**sizes, n_kv_head=2, hidden=48, eos_token_ids=(256,)),
    }
    folders = {}
    for family in FAMILIES:
        generator = torch.Generator().manual_seed(1)
        model = build(configs[family])
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(0.3 * noise if p.dim() > 1 else p + 0.1 * noise)
        folders[family] = tmp_path_factory.mktemp("checkpoints") / family
        save_model(folders[family], model, byte_tokenizer(EOS))
    return folders


@pytest.fixture(scope="session")
def foreign():
    """The module tests/foreign/models.py, which makes models that nobody here shaped."""
    import importlib.util
    from pathlib import Path

    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    path = Path(__file__).parent / "foreign" / "models.py"
    spec = importlib.util.spec_from_file_location("foreign_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def artifacts(checkpoints, tmp_path_factory):
    """Folder of the exported checkpoint by family. Tests that change one copy it first."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    root = tmp_path_factory.mktemp("artifacts")
    return {family: export(folder, root / family) for family, folder in checkpoints.items()}


@pytest.fixture(scope="session")
def compiled(artifacts, tmp_path_factory):
    """Folder of the artifact by family, compiled for every engine and device that this machine can compile for."""
    import shutil

    from portlm.compile.build import COMPILERS, build
    from portlm.errors import EngineUnavailableError

    root = tmp_path_factory.mktemp("compiled")
    for family, artifact in artifacts.items():
        shutil.copytree(artifact, root / family)
        for key in COMPILERS:
            try:
                build(root / family, [key])
            except EngineUnavailableError:
                continue  # the tests of that engine say what is missing
    return {family: root / family for family in artifacts}
