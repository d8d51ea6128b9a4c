"""A value on the way to the answer that is no number is found, also where the answer does not show it."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from torch import nn  # noqa: E402

from portlm.artifact import read_manifest, refresh_files, write_manifest  # noqa: E402
from portlm.compile import bisect, runners  # noqa: E402
from portlm.compile.build import build  # noqa: E402
from portlm.errors import EngineUnavailableError, ParityError  # noqa: E402
from portlm.flows.export import export  # noqa: E402
from portlm.flows.targets import Target  # noqa: E402
from portlm.flows.verify import verify_artifact  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.* is exported without a cache")

GRAPH = "onnx/decoder.portable.onnx"
UNIT = 5  # of the hidden layer, which nothing reads
ENGINES = ["torch", "ort", "tvm"]


class Unread(nn.Module):
    """One hidden layer, and a unit of it that the head multiplies by zero."""

    context_length = 24

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.wte, self.inner, self.head = nn.Embedding(23, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 23)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            self.head.weight[:, UNIT] = 0.0

    def hidden(self, x):
        return torch.relu(self.inner(x))

    def forward(self, ids):
        return self.head(self.hidden(self.wte(ids)))


class Steep(Unread):
    """A gate written out, whose exponential is too large for float32 where the gate is shut: 1 / infinity is right."""

    def hidden(self, x):
        x = self.inner(x)
        return x * (1.0 / (1.0 + torch.exp(x * -40.0)))


class Broken(Unread):
    """Zero divided by zero."""

    def hidden(self, x):
        return torch.relu(self.inner(x) / (x - x).sum(-1, keepdim=True))


@pytest.fixture
def artifact(tmp_path):
    return export(Unread(), tmp_path / "model")


def poison(folder):
    """Put NaN into the weights of the unit that nothing reads, and have the manifest say so."""
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    (tensor,) = (t for t in graph.initializer if list(t.dims) == [8, 12])
    place = {entry.key: entry.value for entry in tensor.external_data}
    role = read_manifest(folder).roles["decoder"]
    path = folder / role.weights
    raw = bytearray(path.read_bytes())
    begin = int(place["offset"]) + 4 * UNIT
    raw[begin : begin + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    write_manifest(folder, refresh_files(folder, read_manifest(folder), [role.weights]))


def verified(folder, engine, profile="portable", **options):
    try:
        if engine != "ort":
            build(folder, [(engine, "cpu", profile)])
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    (result,) = verify_artifact(folder, [Target(engine, "cpu", profile)], **options)
    return result


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_is_found_and_named_though_relu_hides_it(artifact, engine):
    """Some engines show it in the answer, others do not: all of them name the product that made it."""
    poison(artifact)
    result = verified(artifact, engine)
    assert result.problem
    assert result.node.startswith("inner (MatMul) is the first node that gives NaN")
    assert read_manifest(artifact).parity == ()


def test_infinity_is_found_where_the_reference_has_numbers(artifact):
    run = runners.ort_runner()

    def shut(model, folder, names, inputs):
        return [
            value - np.inf if name == "inner" else value
            for name, value in zip(names, run(model, folder, names, inputs), strict=True)
        ]

    found = bisect.look_inside(artifact, shut, GRAPH)
    assert str(found).startswith(
        "inner (MatMul) is the first node that gives infinity where the reference has numbers"
    )
    assert str(found).endswith("at the prompt")
    assert bisect.look_inside(artifact, run, GRAPH) is None
    assert str(bisect.bisect(artifact, shut, GRAPH)).startswith(
        "inner (MatMul) is the first node that gives infinity"
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("module", [Unread, Steep])
def test_numbers_are_no_fault_nor_an_infinity_that_is_the_models_own(tmp_path, module, engine):
    result = verified(export(module(), tmp_path / "model"), engine)
    assert (result.problem, result.node) == (None, None)


def test_the_steep_gate_does_overflow():
    with torch.no_grad():
        module = Steep()
        largest = torch.exp(module.inner(module.wte(torch.arange(23))) * -40.0).max()
    assert largest == np.inf


def test_the_look_inside_costs_one_prompt_and_the_reference_only_where_something_is_found(
    artifact, monkeypatch
):
    calls, evaluated, real = [], [], runners.ort_runner

    def counting(device, profile):
        run = real(device, profile)
        return lambda model, folder, names, inputs: (
            calls.append(len(names)) or run(model, folder, names, inputs)
        )

    monkeypatch.setattr(runners, "ort_runner", counting)
    monkeypatch.setattr(bisect, "_Reference", lambda path: evaluated.append(path))
    assert verified(artifact, "ort").problem is None
    assert len(calls) == 1
    assert calls[0] > 3  # every value but those of nodes that only move
    assert not evaluated
    assert verified(artifact, "ort", search=False).problem is None
    assert len(calls) == 1


def test_a_model_whose_own_answer_is_no_number_is_refused_by_name(tmp_path):
    with pytest.raises(ParityError, match="holds NaN or infinity"):
        export(Broken(), tmp_path / "model")


def test_bisect_searches_the_graphs_of_the_torch_engine(artifact, monkeypatch):
    from portlm.runtimes import torch_operators

    build(artifact, [("torch", "cpu", "portable")])
    wrong = replace(torch_operators.operators()["Relu"], bind=lambda call: lambda x: 2 * torch.relu(x))
    monkeypatch.setitem(torch_operators.operators(), "Relu", wrong)
    (result,) = verify_artifact(artifact, [Target("torch", "cpu", "portable")])
    assert "(Relu) is the first node that differs" in result.node
