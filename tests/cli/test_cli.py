"""The command line as a user meets it: help, results on stdout, JSON, exit codes."""

import json
import subprocess
import sys

import pytest

from portlm.cli import VERBS
from portlm.engines import DEVICES, ENGINES
from portlm.tokenizer import Tokenizer


def test_help_names_every_engine_and_device(portlm):
    help_text = " ".join(portlm("generate", "--help").out.split())
    for names in (ENGINES, DEVICES):
        assert f"{', '.join(names)} or auto." in help_text


def test_help_lists_every_verb(portlm):
    outcome = portlm("--help")
    assert outcome.code == 0
    assert all(f"\n  {verb} " in outcome.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, portlm):
    outcome = portlm(verb, "--help")
    assert outcome.code == 0
    assert "Usage: portlm " in outcome.out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "tokenizer"])
def test_every_verb_can_print_json(verb, portlm):
    assert "--json" in portlm(verb, "--help").out


def test_an_unknown_verb_is_a_usage_error(portlm):
    outcome = portlm("fly")
    assert outcome.code == 2
    assert "fly" in outcome.error


def test_a_missing_package_is_one_line_with_the_command_that_adds_it(portlm, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    # The package's attribute has to come back as well, and not be the one imported below.
    if "portlm.compile" in sys.modules:
        monkeypatch.setattr(sys.modules["portlm"], "compile", sys.modules["portlm.compile"])
    for name in [name for name in sys.modules if name.startswith("portlm.compile")]:
        monkeypatch.delitem(sys.modules, name)
    outcome = portlm("export", tmp_path, tmp_path / "out")
    assert outcome.code == 1
    assert "pip install 'portlm[onnx]'" in outcome.error


def test_a_reader_that_leaves_early_is_no_crash():
    result = subprocess.run(
        f"{sys.executable} -m portlm ops --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in result.stderr


def test_tokenizer_train_prints_the_path_or_json(portlm, text, tmp_path):
    outcome = portlm("tokenizer", "train", text, "--vocab-size", 300, "--out", tmp_path / "t")
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path / "t" / "tokenizer.json"))
    outcome = portlm("tokenizer", "train", text, "--vocab-size", 300, "--out", tmp_path / "t", "--json")
    facts = json.loads(outcome.out)
    assert facts["vocab_size"] == 300
    assert facts["bytes"] == text.stat().st_size


def test_tokenizer_train_takes_whole_words(portlm, text, tmp_path):
    outcome = portlm("tokenizer", "train", text, "--kind", "word", "--vocab-size", 5, "--out", tmp_path / "t")
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path / "t" / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "t").token_name(0) == "[UNK]"


def test_the_whole_path_from_text_to_every_engine(portlm, text, tmp_path, monkeypatch):
    """pretrain, export, compile, verify, generate, bench: each command takes what the one before printed."""
    monkeypatch.setenv("COLUMNS", "200")
    run = portlm(
        "pretrain", text, "--out", tmp_path / "run", "--steps", 20, "--layers", 2, "--heads", 2, "--width", 32,
        "--context", 64, "--tokenizer", "bpe:280", "--eval-interval", 10, "--checkpoint-interval", 10,
    )  # fmt: skip
    assert run.code == 0, run.err
    checkpoint = run.out.strip()
    model = portlm("export", checkpoint, tmp_path / "model").out.strip()
    assert model == str(tmp_path / "model")
    compiled = portlm("compile", model)
    assert compiled.code == 0, compiled.err
    verified = portlm("verify", model, "--json")
    rows = json.loads(verified.out)
    assert verified.code == 0, rows
    assert {"torch:cpu:native", "ort:cpu:portable", "ort:cpu:fused", "tvm:cpu:fused"} <= {
        r["target"] for r in rows
    }
    assert all(row["row"]["max_logit_error"] <= 1e-4 and not row["row"]["fallback"] for row in rows)
    again = portlm("verify", model, "--no-bisect", "--json")
    assert again.code == 0
    assert all(row["recorded"] is not None for row in json.loads(again.out))
    texts = {
        engine: portlm(
            "generate", model, "line 3", "--engine", engine, "--max-new-tokens", 12, "--no-stream"
        ).out
        for engine in ("torch", "ort", "tvm")
    }
    assert len(set(texts.values())) == 1
    measured = portlm(
        "bench", model, "-e", "torch:cpu", "-e", "ort:cpu:portable", "--prompt", 8, "-n", 4, "-r", 1, "--json"
    )
    figures = json.loads(measured.out)
    assert [row["engine"] for row in figures["rows"]] == ["torch", "ort"]
    assert all(row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0 for row in figures["rows"])
    for kind in ("decode", "prefill"):
        for row in figures["rows"]:
            low, high = row[f"{kind}_interval"]
            assert low <= row[f"{kind}_tok_s"] <= high
            assert row[f"{kind}_of_limit"] == pytest.approx(
                row[f"{kind}_tok_s"] / figures["limits"][f"{kind}_tok_s"]
            )
    round_trip = portlm("export", checkpoint, tmp_path / "hf", "--to", "hf")
    assert round_trip.code == 0, round_trip.err
    imported = portlm("import", tmp_path / "hf", tmp_path / "back")
    assert imported.code == 0, imported.err
    same = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "hf", tmp_path / "back")]
    assert same[0] == same[1]
