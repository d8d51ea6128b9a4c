"""The matrix measures every role on every engine, keeps what it has, and hides neither a refusal nor a difference."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch

from portlm.commands.matrix import command
from portlm.errors import FormatError, PortlmError, UsageError
from portlm.flows import matrix
from portlm.flows.matrix import Cell, Matrix, Preset, Variant, markdown, measure
from portlm.flows.targets import Choice
from portlm.models import FAMILIES

ORT, PACKED = Choice("ort", "cpu", "portable"), Choice("packed")


def probed():
    """What trying every device in processes of their own would say of a plain machine."""
    rows = [("torch", "cpu", ""), ("torch", "cuda", "no NVIDIA driver"), ("ort", "cpu", ""), ("packed", "cpu", ""),
            ("null", "cpu", "")]  # fmt: skip
    return [
        {"engine": engine, "device": device, "available": not reason, "reason": reason}
        for engine, device, reason in rows
    ]


@pytest.fixture(scope="module", autouse=True)
def _machine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("portlm.runtimes.probe.probe", probed)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory, _machine):
    """The folder and the matrix of a GPT-2 on ONNX Runtime, and the lines that were told."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")
    out, told = tmp_path_factory.mktemp("matrix"), []
    found = measure(["gpt2"], out, only=[ORT], progress=lambda *line: told.append(line))
    return out, found, told


def test_cells_hold_what_verify_measures_beside_a_beam_search(measured):
    _, found, told = measured
    (variant,) = found.variants
    assert [(cell.target, cell.role) for cell in variant.cells] == [
        ("torch:cpu:native", "decoder"), ("ort:cpu:portable", "decoder")
    ]  # fmt: skip
    for cell in variant.cells:
        assert cell.agrees
        assert cell.error <= cell.allowed
        assert cell.greedy[0] == cell.greedy[1] > 0
        assert cell.beams == (3 * matrix.BEAM_TOKENS, 3 * matrix.BEAM_TOKENS)
    assert found.wrong == []
    assert found.absent["packed:cpu:fused"] == "not asked for"
    assert matrix.targets()[1] == dict.fromkeys(
        ("torch:cuda:native", "torch:cuda:fused", "torch:cuda:portable"), "no NVIDIA driver"
    )
    assert told[-1] == (1, 1, "gpt2: done")
    assert found.versions["portlm"]


def test_a_second_run_measures_only_what_is_missing(measured, monkeypatch):
    out, found, _ = measured
    asked = []
    monkeypatch.setattr(
        matrix, "_measured", lambda variant, model, missing, tell: asked.append(missing) or ()
    )
    again = measure(["gpt2"], out, only=[ORT])
    assert asked == []
    assert again.variants == found.variants
    measure(["gpt2"], out, only=[ORT, PACKED])
    assert [list(map(str, missing)) for missing in asked] == [["packed:cpu:fused"]]
    measure(["gpt2"], out, only=[ORT], anew=True)
    assert list(map(str, asked[1])) == ["torch:cpu:native", "ort:cpu:portable"]
    measure(["gpt2"], out, only=[ORT], seed=1)
    assert len(asked) == 3


def test_a_damaged_result_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "gpt2.json").write_text("{}")
    with pytest.raises(FormatError, match=r"gpt2\.json is no result of the matrix"):
        measure(["gpt2"], tmp_path, only=[ORT])


def test_what_a_compiler_refuses_is_shown_with_its_reason(tmp_path, monkeypatch):
    def refuse(artifact, keys):
        raise PortlmError("no form\nof Frobnicate")

    monkeypatch.setattr(matrix, "build", refuse)
    found = measure(["nplm"], tmp_path, only=[PACKED])
    (cell,) = (cell for cell in found.variants[0].cells if cell.target == "packed:cpu:fused")
    assert (cell.verdict, cell.reason) == ("refused", "no form of Frobnicate")
    assert found.wrong == []
    assert "refused [1]" in markdown(found)
    assert "1. no form of Frobnicate" in markdown(found)


def test_an_engine_that_gives_another_answer_differs(tmp_path, monkeypatch):
    """A weight is moved in the answer's file alone: what was right before is a difference then."""
    from portlm.compile import parity

    measure_engine = parity.measure

    def moved(engine, answer, role="decoder"):
        if engine.name == "packed":
            answer.logits[:] += 1
        return measure_engine(engine, answer, role)

    monkeypatch.setattr(parity, "measure", moved)
    found = measure(["gpt2"], tmp_path, only=[PACKED])
    cells = {cell.target: cell for cell in found.variants[0].cells}
    assert cells["torch:cpu:native"].agrees
    assert cells["packed:cpu:fused"].verdict == "differs"
    assert len(found.wrong) == 1
    assert found.wrong[0].startswith("gpt2 decoder on packed:cpu:fused: ")


@pytest.mark.parametrize(
    ("cell", "agrees"),
    [(Cell("t", "r", "agrees", 0.0, 1.0), True), (Cell("t", "r", "agrees", 0.0, 1.0, beams=(7, 8)), False),
     (Cell("t", "r", "agrees", 0.0, 1.0, off_device=1), False), (Cell("t", "r", "differs"), False)],
)  # fmt: skip
def test_a_cell_agrees_only_in_its_answer_its_beams_and_its_place(cell, agrees):
    assert cell.agrees == agrees
    whole = Matrix([Variant("f", (), "", [], [cell])], [], {}, {})
    assert bool(whole.wrong) == (not agrees)


def test_a_count_that_is_not_as_published_is_wrong():
    whole = Matrix([], [Preset("f", "small", 10, 10), Preset("f", "large", 1000, 1001)], {}, {})
    assert whole.wrong == ["large has 1,000 parameters, expected 1,001"]
    assert "| large | f | 1,000 | 1,001 (differs) |" in markdown(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_small_models_with_far_logits_and_all_its_heads(family):
    configs = matrix.variants(family)
    heads = {head for config in configs for head in getattr(config, "heads", ())}
    known = getattr(configs[0], "ARCHITECTURES", {})
    if hasattr(configs[0], "heads"):
        assert heads == {head for found in known.values() for head in found}
    first, again = (matrix.random_model(configs[0], 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_unknown_family_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="there is no family 'elman': choose one of gpt2, "):
        measure(["elman"], tmp_path)


def test_the_command_writes_a_page_and_prints_json(measured, tmp_path):
    out, found, _ = measured
    page = tmp_path / "matrix.md"
    call = ["--family", "gpt2", "--out", str(out), "-e", "ort:cpu:portable"]
    outcome = CliRunner().invoke(command, [*call, "--markdown", str(page), "--json"], standalone_mode=False)
    assert outcome.return_value == 0
    told = json.loads(outcome.stdout)
    assert told["wrong"] == []
    assert [cell["target"] for cell in told["variants"][0]["cells"]] == [
        "torch:cpu:native",
        "ort:cpu:portable",
    ]
    assert page.read_text() == markdown(found)
    text = page.read_text()
    assert "| model | role | `torch:cpu:native` | `ort:cpu:portable` | greedy | beams |" in text
    assert "| gpt2-xl | gpt2 | 1,557,611,200 | 1,557,611,200 |" in text
    printed = CliRunner().invoke(command, call, standalone_mode=False).stdout
    assert "published sizes have the number of parameters they must have" in printed
