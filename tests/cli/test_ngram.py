"""``portlm ngram``: from a text to a model that is scored, exported and read back."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is missing: pip install portlm[train]")
pytest.importorskip("numba", reason="numba is missing: pip install portlm[train]")


def test_a_text_becomes_a_model_that_writes_and_scores(portlm, text, tmp_path):
    found = json.loads(portlm("ngram", text, "-o", tmp_path / "run", "-n", 4, "--json").out)
    assert found["checkpoint"] == str(tmp_path / "run" / "final")
    assert (found["order"], len(found["ngrams"]), len(found["discounts"])) == (4, 4, 4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] < 0.5  # lines that differ by their numbers
    outcome = portlm("generate", found["checkpoint"], "line 9: the quick ", "-n", 10, "--engine", "torch")
    assert outcome.out.startswith("brown fox")


def test_the_held_out_loss_is_what_the_session_says_of_those_tokens(portlm, text, tmp_path):
    """The session reads them behind what was counted; float32 beside float64 sums."""
    import portlm as package
    from portlm.data.shards import TokenShards

    found = json.loads(portlm("ngram", text, "-o", tmp_path / "run", "-n", 3, "--json").out)
    held_out = TokenShards.open(tmp_path / "run" / "data" / "val")[:]
    before = TokenShards.open(tmp_path / "run" / "data" / "train")[:][-2:]
    with package.load(found["checkpoint"], "torch") as session:
        (scored,) = session.score([np.concatenate((before, held_out)).tolist()])
    # The first token of a text has nothing before it and is not scored, the second is not held out.
    assert -np.mean(scored.logprobs[-len(held_out) :]) == pytest.approx(found["loss"], rel=1e-5)


def test_what_is_done_and_taken_is_said(portlm, text, tmp_path):
    outcome = portlm("ngram", text, "-o", tmp_path / "run", "-n", 2)
    assert outcome.out.strip() == str(tmp_path / "run" / "final")
    assert "different runs of 2 of" in outcome.err
    assert "ngram: held-out perplexity" in outcome.err
    assert portlm("ngram", text, "-o", tmp_path / "run", "-n", 2, "--quiet").err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", "0"], "order must be a whole number from 1 to 16, got 0"),
        (["-n", "17"], "order must be a whole number from 1 to 16, got 17"),
        (["--held-out", "0.9"], "data.validation_fraction"),
        (["--tokenizer", "bpe"], "write bpe:SIZE"),
        (["--smoothing", "katz"], "katz"),
        (["--context", "0"], "context must be a whole number from 1 to"),
    ],
)
def test_bad_settings_are_named(portlm, text, tmp_path, options, message):
    outcome = portlm("ngram", text, "-o", tmp_path / "run", *options)
    assert outcome.code in (1, 2)
    assert message in outcome.error


def test_the_folder_of_a_training_run_is_left_alone(portlm, text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    outcome = portlm("ngram", text, "-o", tmp_path / "run")
    assert "is the folder of a training run: choose another --out" in outcome.error


def test_pretrain_says_which_verb_counts(portlm, text, tmp_path):
    outcome = portlm("pretrain", text, "-o", tmp_path / "run", "--family", "ngram")
    assert "model.family ngram does not learn by gradients" in outcome.error
    assert "portlm ngram makes one" in outcome.error


def test_a_model_goes_through_an_arpa_file(portlm, text, tmp_path):
    """ngram --arpa and export --to arpa write the same, compressed or not, and import reads it with its tokenizer."""
    import gzip

    outcome = portlm("ngram", text, "-o", tmp_path / "run", "-n", 3, "--arpa", tmp_path / "m.arpa")
    assert f"ngram: {tmp_path / 'm.arpa'} is written" in outcome.err
    portlm("export", tmp_path / "run" / "final", tmp_path / "m.arpa.gz", "--to", "arpa")
    assert gzip.decompress((tmp_path / "m.arpa.gz").read_bytes()) == (tmp_path / "m.arpa").read_bytes()
    outcome = portlm(
        "import", tmp_path / "m.arpa.gz", tmp_path / "m", "--tokenizer", tmp_path / "run" / "final", "--json"
    )
    assert json.loads(outcome.out) == {"path": str(tmp_path / "m"), "notes": []}
    assert portlm("generate", tmp_path / "m", "the qui", "-n", 3, "--engine", "torch").out.startswith("ck ")
    outcome = portlm("import", tmp_path / "run" / "final", tmp_path / "x", "--tokenizer", tmp_path / "run")
    assert "--tokenizer says what the words of an ARPA file are: leave it out" in outcome.error
