"""Experiments whose data are given, and the one that translates: what it reads, trains, compares and goes on with."""

import json
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.commands.lab import command  # noqa: E402
from portlm.errors import UsageError  # noqa: E402
from portlm.flows import lab  # noqa: E402
from portlm.flows.lab.experiment import Bar, DataExperiment  # noqa: E402
from portlm.flows.lab.runner import run_lab  # noqa: E402
from portlm.flows.lab.translation import Translation  # noqa: E402
from portlm.flows.lab.translation_recipes import RECIPES, Recipe  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402

PAIRS = [("drei haeuser", "three houses"), ("ein hund", "one dog"), ("zwei rote hunde", "two red dogs")]
TINY = {
    "data.tokenizer": "byte", "data.batch_size": 4, "model.width": 8, "model.context_length": 20,
    "schedule.warmup": 2.0, "precision": "fp32",
}  # fmt: skip


class Weighed:
    """An experiment that weighs its data."""

    name = "weighed"
    shows = "Data have a weight."
    source = "nobody"
    seeds = (0,)
    bars = (Bar("bytes", ">=", 1),)
    needs = "one text"
    digest = ""

    def given(self, data, work):
        found = type(self)()
        found.text, found.work = (data / "text").read_text(), work
        found.digest = found.text
        return found

    def run(self, seed, tell):
        return {"bytes": len(self.text), "work": str(self.work)}

    def draw(self, results, path):
        path.write_bytes(b"")


@pytest.fixture(autouse=True)
def threads():
    """PyTorch's threads as they were."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for part, times in (("train", 4), ("val", 1)):
        for language, side in (("de", 0), ("en", 1)):
            lines = [pair[side] for pair in PAIRS * times]
            (folder / f"some.{part}.{language}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny():
    pytest.importorskip("sacrebleu", reason="sacrebleu is missing: pip install portlm[translation]")
    small = {
        "marian": {"model.n_layer": 1, "model.n_head": 2, "model.hidden": 8},
        "seq2seq": {"model.n_layer": 1},
    }
    return Translation(
        {name: Recipe(2, {**r.settings, **TINY, **small.get(name, {})}) for name, r in RECIPES.items()}
    )  # fmt: skip


# ---- data that are given -----------------------------------------------------------------------------------------


def test_a_result_holds_for_the_data_that_it_was_measured_on(tmp_path):
    (tmp_path / "text").write_text("four")
    (first,) = run_lab([Weighed()], tmp_path / "out", data=tmp_path)
    assert first.measured == {0: {"bytes": 4, "work": str(tmp_path / "out" / "weighed")}}
    (tmp_path / "text").write_text("more")
    (other,) = run_lab([Weighed()], tmp_path / "out", data=tmp_path)
    assert first.results[0].digest != other.results[0].digest


def test_an_experiment_without_its_data_is_an_error_that_says_what_it_needs(tmp_path):
    with pytest.raises(UsageError, match="weighed needs data: give --data, a folder with one text"):
        list(run_lab([Weighed()], tmp_path))
    with pytest.raises(UsageError, match="nowhere is no folder"):
        list(run_lab([Weighed()], tmp_path, data=tmp_path / "nowhere"))


def test_all_leaves_out_what_needs_data_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "EXPERIMENTS", {"weighed": "of_weights:Weighed", "coin": "of_weights:Bare"})
    bare = type("Bare", (), {n: vars(Weighed)[n] for n in ("shows", "source", "seeds", "bars", "draw")})
    bare.name, bare.run = "coin", lambda self, seed, tell: {"bytes": 1}
    monkeypatch.setitem(sys.modules, "of_weights", SimpleNamespace(Weighed=Weighed, Bare=bare))
    (tmp_path / "text").write_text("four")
    out = ["--out", str(tmp_path / "out"), "--json"]

    def names(*call):
        result = CliRunner().invoke(command, [*call, *out], standalone_mode=False)
        assert result.return_value == 0
        return [outcome["name"] for outcome in json.loads(result.stdout)], result.stderr

    found, said = names("all")
    assert found == ["coin"]
    assert "lab: weighed is left out: it needs --data, a folder with one text" in said
    found, said = names("all", "--data", str(tmp_path))
    assert found == ["weighed", "coin"]
    assert "left out" not in said
    listed = CliRunner().invoke(command, ["list"], standalone_mode=False).stdout
    assert listed.count("needs --data, a folder with one text") == 1


# ---- translation -------------------------------------------------------------------------------------------------


def test_three_models_learn_translate_and_are_compared(tiny, texts, tmp_path):
    (outcome,) = run_lab([tiny], tmp_path / "out", data=texts)
    assert not outcome.failed
    found = outcome.measured[0]
    steps = 2 * (len(PAIRS) * 4 // TINY["data.batch_size"])
    for name in RECIPES:
        curve = found["curves"][name]
        assert [point[0] for point in curve] == [0, steps // 2, steps]
        assert curve[-1][2] == found[f"{name}_loss"]
        assert found[f"{name}_parameters"] > 0
        assert found[f"{name}_beam_gain"] == found[f"{name}_bleu"] - found[f"{name}_greedy_bleu"]
        assert f"{name}_bleu_13a" in found
        assert all(name in caption for caption in found["captions"])
    assert found["bahdanau_lead"] == found["bahdanau_bleu"] - found["seq2seq_bleu"]
    assert [caption["reference"] for caption in found["captions"]] == [english for _, english in PAIRS]
    assert "tok:none" in found["signature"]
    if lab.importlib.util.find_spec("matplotlib"):
        tiny.draw(outcome.measured, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_call_that_was_interrupted_goes_on_with_the_model_that_was_learning(
    tiny, texts, tmp_path, monkeypatch
):
    from portlm.train import pretrain as real

    train, out = real.pretrain, tmp_path / "out"

    def interrupted(config, folder, **options):
        if folder.name == "bahdanau":
            raise InterruptedTraining("stopped", 2)
        return train(config, folder, **options)

    monkeypatch.setattr(real, "pretrain", interrupted)
    with pytest.raises(InterruptedTraining):
        list(run_lab([tiny], out, data=texts))
    assert not (out / "translation" / "0.json").exists()
    monkeypatch.setattr(real, "pretrain", train)
    (outcome,) = run_lab([tiny], out, data=texts)
    assert outcome.results[0].error is None
    records = read_metrics(out / "translation" / "0" / "seq2seq" / "metrics.jsonl")
    assert (
        len([r for r in records if r["kind"] == "run"]) == 1
    )  # it was finished before, and not trained again
    assert len([r for r in records if r["kind"] == "train"]) == 1


def test_the_pairs_that_are_judged_by_are_those_of_val_and_no_others(tiny, texts, tmp_path):
    from portlm.data.pairs import read_pairs

    ready = tiny.given(texts, tmp_path)
    named, share, learned = ready._pairs(tmp_path)
    pairs = read_pairs(named["data.source"], named["data.target"])
    kept = round(share * len(pairs))  # as portlm.train.objectives.seq2seq.open_pairs cuts
    assert (learned, kept) == (12, 3)
    assert pairs[-kept:] == PAIRS


def test_texts_that_are_missing_or_no_pairs_are_named(texts, tmp_path):
    (texts / "some.val.en").write_text("one line\n")
    ready = Translation().given(texts, tmp_path)
    with pytest.raises(UsageError, match=r"no pairs: \(12, 3\) lines in German, \(12, 1\) in English"):
        ready._pairs(tmp_path)
    (texts / "other.val.en").write_text("one line\n")
    with pytest.raises(UsageError, match=r"one file whose name ends in val\.en, and has 2"):
        Translation().given(texts, tmp_path)
    (texts / "some.train.de").unlink()
    with pytest.raises(UsageError, match=r"one file whose name ends in train\.de, and has 0"):
        Translation().given(texts, tmp_path)


def test_the_recipes_fit_the_settings_of_a_run():
    from portlm import settings
    from portlm.train.config import PretrainConfig

    assert isinstance(Translation(), DataExperiment)
    for recipe in RECIPES.values():
        values = recipe.overrides(29_000, {"data.source": "a", "data.target": "b"})
        config = settings.load(PretrainConfig, overrides=list(values.items()))
        assert config.steps == recipe.epochs * (29_000 // config.data.batch_size)
        assert config.evaluation.interval == 29_000 // config.data.batch_size
