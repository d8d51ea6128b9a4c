"""`portlm bench --against`: what is missing or impossible is one line, and what is there is raced."""

import json

import pytest

from portlm.errors import EngineUnavailableError, UsageError
from portlm.flows.race import rivals
from portlm.flows.race.contender import Entry


@pytest.fixture
def portlm(capsys):
    from portlm import cli

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


def test_a_rival_that_is_not_installed_is_a_line_with_the_command_of_pip(portlm, artifacts, monkeypatch):
    absent = Entry(
        "x", "f32", "nowhere:X", needs={"no_such_engine": "no-such-engine", "nor_this": "nor-this"}
    )
    monkeypatch.setitem(rivals.RIVALS, "llama.cpp", (absent,))
    code, out, err = portlm("bench", artifacts["gpt2"], "--against", "transformers,llama.cpp")
    assert (code, out) == (1, "")
    assert err == "portlm: error: llama.cpp is not installed: pip install no-such-engine nor-this\n"


def test_a_rival_that_nobody_knows_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match=r"no rival 'vllm': choose among llama.cpp, ort-genai, transformers"):
        rivals.read_rivals("transformers,vllm")


def test_a_package_is_looked_for_without_importing_it():
    """A missing one is an error, and of an installed one nothing is executed."""
    Entry("x", "f32", "nowhere:X", needs={"antigravity": "-"}).check()
    with pytest.raises(EngineUnavailableError, match="not installed: pip install b"):
        Entry("x", "f32", "nowhere:X", needs={"antigravity": "a", "no_such_engine": "b"}).check()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--keep", "x"), "--keep is for the files that --against makes"),
        (("--against", "transformers"), "the model has 48"),
        (("--against", "transformers", "-n", 4, "--prompt", 8, "-e", "ort:vulkan"), "device"),
    ],
)
def test_what_cannot_be_raced_is_refused_before_anything_is_loaded(portlm, artifacts, options, error):
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    code, out, err = portlm("bench", artifacts["llama"], *options)
    assert (code, out) == (2, "")
    assert error in err
    assert "prepare" not in err


def test_every_row_of_every_rival_names_a_class_that_is_there():
    for entries in rivals.RIVALS.values():
        for entry in entries:
            assert entry.make().cache_item > 0
            assert entry.needs
            assert not entry.ours


def test_an_artifact_without_a_checkpoint_says_so(portlm, foreign, tmp_path):
    """A module that somebody exported has no weights that another engine could open."""
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    import torch

    from portlm.flows.export import export

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.context_length = 16
            self.table = torch.nn.Embedding(8, 8)

        def forward(self, input_ids):
            return self.table(input_ids)

    with pytest.warns(UserWarning, match="without a cache"):
        export(Bigram(), tmp_path / "model")
    code, _, err = portlm(
        "bench", tmp_path / "model", "--against", "transformers", "-e", "ort:cpu", "--prompt", 4, "-n", 2
    )
    assert code == 1
    assert "holds no model.safetensors, so there is nothing that others could run" in err


def test_transformers_is_raced_on_the_same_weights(portlm, artifacts, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    monkeypatch.setenv("COLUMNS", "80")
    call = ("bench", artifacts["gpt_neox"], "--against", "transformers", "-e", "ort:cpu:fused", "--prompt", 8,
            "-n", 4, "-r", 1, "--threads", 1)  # fmt: skip
    code, out, err = portlm(*call, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [row["name"] for row in result["rows"]] == ["ort:cpu:fused", "transformers float32"]
    assert result["reference"].startswith("transformers")
    for row in result["rows"]:
        assert row["agreement"]["largest"] < 1e-3
        assert set(row["measures"]) == {"quiet/prefill@8", "quiet/decode@8"}
    mine, theirs = result["rows"]
    assert mine["measures"]["quiet/decode@8"]["against_same"]["rival"] == "transformers float32"
    assert mine["weight_bytes"] == theirs["weight_bytes"]


def test_the_table_of_a_race_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    from portlm.commands.bench import print_race

    ratio = {"rival": "llama.cpp Q4_0", "ratio": 123.45, "interval": [1, 2]}
    found = {"rate": 123456.0, "against_same": ratio, "of_limit": 0.99}
    row = {
        "name": "transformers float32", "precision": "f32", "weight_bytes": 1.0e9, "agreement": {"top1": 1.0},
        "measures": {"quiet/prefill@128": found, "quiet/decode@128": found},
    }  # fmt: skip
    print_race(
        {
            "model": {"artifact": "model"}, "rows": [row], "absent": {"ort-genai int4": "no luck"},
            "rules": {"passes": [{"prompt": 128, "context": 128, "tokens": 64}]},
            "limits": {"read_gb_s": 20.0, "fp32_gflop_s": 200.0}, "environment": {"cpu": "A CPU"},
            "rounds": {"quiet": {"rounds": [{}] * 7, "noisy": 3}},
        }
    )  # fmt: skip
    out = capsys.readouterr().out
    line = next(text for text in out.splitlines() if text.startswith("transformers float32"))
    for cell in ("f32", "123,456", "123.45", "99%", "1,000.0", "100%"):
        assert cell in line
    assert "A CPU" in out
    assert "not measured: ort-genai int4: no luck" in out
    assert "3 of 7 rounds were not quiet" in out
