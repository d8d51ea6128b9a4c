"""Every engine on artifacts with weights of 16 bits: the answer of the float32 model that holds the same numbers."""

import os
import shutil
import subprocess
import sys

import pytest
from engine_cases import TARGETS

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.artifact import half_weights, read_manifest, refresh_files, write_manifest  # noqa: E402
from portlm.compile import parity  # noqa: E402
from portlm.compile.build import build  # noqa: E402
from portlm.compile.export import export  # noqa: E402
from portlm.errors import EngineUnavailableError, FormatError  # noqa: E402
from portlm.flows.export import export as export_module  # noqa: E402
from portlm.flows.load import load  # noqa: E402
from portlm.flows.verify import PlainPyTorch, verify_artifact  # noqa: E402
from portlm.models import build as build_model  # noqa: E402
from portlm.models import load_model, save_model  # noqa: E402
from portlm.models.llama import LlamaConfig  # noqa: E402
from portlm.ops.compiled import kernels  # noqa: E402
from portlm.runtimes.eager import TorchEngine  # noqa: E402

CASES = [("gpt2", "float16"), ("llama", "bfloat16")]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def made(checkpoints, compile_all, tmp_path_factory):
    """Function: one of CASES -> an artifact of it, compiled for every engine here on the CPU. Copy it to change it."""
    root = tmp_path_factory.mktemp("halves")

    def artifact(family, kind):
        folder = root / f"{family}-{kind}"
        if not folder.exists():
            compile_all(export(checkpoints[family], folder, weights=kind), ["cpu"])
        return folder

    return artifact


@pytest.fixture(scope="module")
def answers(checkpoints):
    """Function (family, kind) -> what eager PyTorch in float32 with rounded weights says to the certificate's probe."""
    known = {}

    def answer(family, kind):
        if (family, kind) not in known:
            model = load_model(checkpoints[family])
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.copy_(parameter.to(DTYPES[kind]).float())
            engine = PlainPyTorch(TorchEngine.of(model, "cpu"))
            known[family, kind] = parity.make_reference(
                engine, model.config.vocab_size, model.config.context_length
            )
        return known[family, kind]

    return answer


@pytest.mark.parametrize("target", TARGETS, ids=":".join)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_engine_gives_the_answer_of_the_float32_model_with_these_numbers(
    made, answers, family, kind, target
):
    """Within the bar of float32, and with the kernel that reads 16 bits where the engine has it."""
    try:
        session = load(made(family, kind), *target)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session:
        assert session.placement().fallback == ()
        own = kernels is not None and target[1:] == ("cpu", "fused") and target[0] != "ort"
        before = kernels.kernel_calls() if kernels else {}
        found = parity.measure(session.engine, answers(family, kind))
        after = kernels.kernel_calls() if kernels else {}
    for name in ("half_linear", "half_rows") if kernels else ():
        assert (before[name] != after[name]) == own, name
    assert found.row.precision == "fp32"
    assert found.problem() is None
    assert found.row.top1 == 1.0


def test_verify_certifies_it_on_every_engine_here(made, tmp_path):
    folder = shutil.copytree(made("llama", "bfloat16"), tmp_path / "artifact")
    results = verify_artifact(folder)
    assert [r.problem for r in results] == [None] * len(results)
    assert {row.precision for row in read_manifest(folder).parity} == {"fp32"}


class Plain(torch.nn.Module):
    """No layer of a family and no roles."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.context_length = 32
        self.tokens = torch.nn.Embedding(61, 24)
        self.up, self.down = torch.nn.Linear(24, 70), torch.nn.Linear(70, 24)
        self.head = torch.nn.Linear(24, 61, bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_a_module_of_ones_own_is_answered_for_with_rounded_weights(tmp_path):
    """Its answer is kept inside the artifact, and engines are compared with that."""
    with pytest.warns(UserWarning, match="without a cache"):
        folder = export_module(Plain().eval(), tmp_path / "module", weights="bfloat16")
    assert half_weights(read_manifest(folder)) == ("bfloat16",)
    results = verify_artifact(folder, search=False)
    assert results
    assert [r.problem for r in results] == [None] * len(results)


def test_trained_further_it_is_float32(made):
    """What is trained on are float32 parameters with the same numbers."""
    model = load_model(made("llama", "bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    matrices = [p for p in model.parameters() if p.dim() > 1]
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in matrices)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packed_weights_stay_in_the_file(tmp_path):
    """Memory of its own does not grow by the weights, which are 8 MB here: pages of the file are mapped and shared."""
    config = LlamaConfig(
        vocab_size=512, context_length=64, width=512, hidden=1024, n_layer=2, n_head=8, n_kv_head=8
    )
    save_model(tmp_path / "model", build_model(config))
    folder = export(tmp_path / "model", tmp_path / "artifact", weights="bfloat16")
    build(folder, [("packed", "cpu", "fused")])
    size = (folder / "packed.portlm").stat().st_size
    assert size > 8e6
    code = (
        "import sys, portlm\n"
        "def own():\n"
        "    lines = open('/proc/self/smaps_rollup').read().splitlines()\n"
        "    return 1024 * sum(int(l.split()[1]) for l in lines if l.startswith('Private_Dirty'))\n"
        "session = portlm.load(sys.argv[1], engine='packed')\n"
        "before = own()\n"
        "session.generate([[1, 2, 3]], max_new_tokens=4)\n"
        "print(own() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert int(done.stdout) < size // 2


def test_a_file_that_says_another_type_is_refused(made, tmp_path):
    """float16 for bfloat16, as large and read otherwise."""
    import onnx

    folder = shutil.copytree(made("llama", "bfloat16"), tmp_path / "artifact")
    path = folder / "onnx/decoder.fused.onnx"
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16)
    tensor.data_type = onnx.TensorProto.FLOAT16
    path.write_bytes(model.SerializeToString(deterministic=True))
    write_manifest(folder, refresh_files(folder, read_manifest(folder), ["onnx/decoder.fused.onnx"]))
    with pytest.raises(FormatError, match="is float16, and the manifest says bfloat16"):
        build(folder, [("packed", "cpu", "fused")])
