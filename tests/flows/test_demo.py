"""The demonstration from beginning to end, with little text, few steps and three engines."""

import json

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
for package in ("onnx", "onnxruntime", "matplotlib", "portlm._C"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install portlm[all]")

from portlm.data.python_topics import python_topics  # noqa: E402
from portlm.engines import ENGINES  # noqa: E402
from portlm.errors import UsageError  # noqa: E402
from portlm.flows import demo  # noqa: E402
from portlm.flows.targets import Target  # noqa: E402

TRIED = (
    Target("torch", "cpu", "native"),
    Target("ort", "cpu", "portable"),
    Target("packed", "cpu", "fused"),
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "corpus", lambda: python_topics()[-20_000:])
    monkeypatch.setattr(demo, "TARGETS", TRIED)
    monkeypatch.setattr(demo, "BENCH", {"prompt": 8, "tokens": 8, "rounds": 2})
    monkeypatch.setitem(demo.SETTINGS, "data", {**demo.SETTINGS["data"], "tokenizer": "bpe:300"})
    monkeypatch.setitem(demo.SETTINGS, "model", {**demo.SETTINGS["model"], "n_layer": 1, "width": 24})


def test_the_report_holds_what_was_learned_and_measured(small, tmp_path):
    said = []
    report = demo.run(tmp_path / "demo", steps=4, progress=said.append)
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["train"]["val_bits_per_byte_end"] < report["train"]["val_bits_per_byte_start"]
    assert 2 < report["train"]["reference_bits_per_byte"] < 8
    assert [(row["engine"], row["profile"]) for row in report["engines"]] == [
        ("torch", "native"),
        ("ort", "portable"),
        ("packed", "fused"),
    ]
    for row in report["engines"]:
        assert row["max_logit_error"] < 1e-4
        assert row["logit_scale"] > 0
        assert row["greedy_match"] == row["greedy_total"]
        assert row["decode_interval"][0] <= row["decode_tok_s"] <= row["decode_interval"][1]
    assert report["limits"]["decode_tok_s"] > 0
    assert report["sample"].startswith(demo.PROMPT)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "of the language reference alone" in page
    assert page.count("<svg") == 2
    assert any(line.startswith("verify") for line in said)


def test_every_engine_that_computes_something_is_tried():
    assert {target.engine for target in demo.TARGETS} == ENGINES.keys() - {"null"}


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files that are not a demonstration's"):
        demo.run(tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_a_demonstration_of_an_earlier_version_is_replaced(tmp_path):
    (tmp_path / "topics.txt").write_text("old")
    demo._clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
