"""The objective of ELMo: two language models at once, from a run to vectors of tokens in their context."""

import math
import os
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import portlm  # noqa: E402
from portlm import models, settings  # noqa: E402
from portlm.errors import ConfigError  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.corpus import open_corpus  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.objectives.bidirectional import BidirectionalObjective  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402
from portlm.weights import load_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def bidirectional(text, **values):
    """Return settings of a small run."""
    values = {
        "objective": "bidirectional", "steps": 8, "log_interval": 4, "model.family": "elmo", "data.batch_size": 4,
        "model.n_layer": 2, "model.cells": 16, "model.width": 8, "model.context_length": 12, "data.texts": [str(text)],
        "evaluation.interval": 8, "evaluation.max_tokens": 128, "threads": 1, "checkpoint.interval": 4,
    } | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def test_a_run_learns_what_comes_next_and_what_came_before_and_leaves_a_model_that_embeds(tmp_path):
    """In a cycle of letters both are certain: both losses fall from ln 256 to nearly nothing."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 400)
    config = bidirectional(
        text,
        steps=150,
        optimizer__lr=1e-2,
        evaluation__interval=150,
        checkpoint__interval=150,
        data__batch_size=8,
    )
    result = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    first, last = records[0], records[-1]
    assert first["loss"] == pytest.approx(2 * math.log(256), rel=0.1)
    assert max(last["forward"], last["backward"]) < 0.3
    assert last["loss"] == pytest.approx(last["forward"] + last["backward"], rel=1e-6)
    assert not [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "sample"]
    with portlm.load(result.checkpoint, "torch") as session:
        assert session.embed(["abc", "defgh"]).shape == (2, 16)


def test_a_run_on_characters_learns_and_leaves_a_model_for_which_no_word_is_unknown(tmp_path):
    """Of a cycle of four words each is certain; what is outside of the vocabulary has a vector of its own."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four " * 300)
    config = bidirectional(
        text, steps=120, optimizer__lr=1e-2, evaluation__interval=120, checkpoint__interval=120, data__batch_size=8,
        data__tokenizer="word:5", model__input="characters", model__word_length=8,
    )  # fmt: skip
    result = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    first, last = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    assert first["loss"] == pytest.approx(2 * math.log(5), rel=0.2)
    assert max(last["forward"], last["backward"]) < 0.3
    with portlm.load(result.checkpoint, "torch") as session:
        known, one, other = session.embed(["one two", "one zwei", "one deux"])
        assert np.abs(one - other).max() > 1e-3
        assert np.abs(known - one).max() > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumes_bit_for_bit(text, tmp_path, monkeypatch, accumulate):
    from portlm.train.loop import Trainer

    config = bidirectional(text, data__accumulate=accumulate, model__dropout=0.1)
    pretrain(config, tmp_path / "straight", quiet=True, plot=False)
    original = Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(InterruptedTraining):
        pretrain(config, tmp_path / "cut", quiet=True, plot=False)
    monkeypatch.undo()
    pretrain(config, tmp_path / "cut", quiet=True, plot=False, resume="auto")
    ends = [load_torch(tmp_path / run / "final" / "model.safetensors") for run in ("straight", "cut")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def objective_of(config, folder):
    corpus = open_corpus(config.data, folder, fresh=True, note=lambda text: None)
    return BidirectionalObjective(config, corpus, torch.device("cpu"))


def test_parts_of_a_batch_have_the_gradient_of_the_whole(text, tmp_path):
    """Sums in another order: some units in the last place of float32."""
    gradients = []
    for n, (rows, parts) in enumerate(((4, 1), (2, 2), (1, 4))):
        torch.manual_seed(0)
        objective = objective_of(
            bidirectional(text, data__batch_size=rows, data__accumulate=parts), tmp_path / str(n)
        )
        sum(objective.loss(part) for part in objective.batches()).backward()
        gradients.append([p.grad for p in objective.model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_held_out_text_is_judged_token_by_token_however_it_is_cut_into_batches(text, tmp_path):
    """The last window is shorter than the others; its padding counts for nothing, and a token alone is skipped."""
    for tokens in (30, 25, 24):  # the last window has 6 tokens, 1 token, and all
        found = []
        for rows in (1, 2, 3):
            torch.manual_seed(0)
            config = bidirectional(text, data__batch_size=rows, evaluation__max_tokens=tokens)
            objective = objective_of(config, tmp_path / f"{tokens}-{rows}")
            found.append(objective.evaluate(lambda: False))
        ids = torch.from_numpy(objective.corpus.held_out(tokens).tokens[:tokens].astype(np.int64))
        model, totals, count = objective.model.eval(), [0.0, 0.0], 0
        for window in ids.split(12):
            if len(window) > 1:
                for n, loss in enumerate(model.losses(window[None], window[None])):
                    totals[n] += loss.item() * (len(window) - 1)
                count += len(window) - 1
        for each in found:
            assert [each["forward"], each["backward"]] == pytest.approx([t / count for t in totals], rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "causal"},
            "objective causal is not for the family elmo: set objective = bidirectional",
        ),
        (
            {"objective": "masked"},
            "objective masked is not for the family elmo: set objective = bidirectional",
        ),
        (
            {"model__family": "gpt2"},
            "objective bidirectional is not for the family gpt2: set model.family = elmo",
        ),
        (
            {"model__family": "t5"},
            "objective bidirectional is not for the family t5: set model.family = elmo",
        ),
    ],
)
def test_an_objective_of_another_kind_of_family_is_refused(text, values, message):
    values |= dict.fromkeys(("model.n_layer", "model.cells", "model.width", "model.context_length"), None)
    given = {
        "objective": "bidirectional", "model.family": "elmo", "data.texts": [str(text)],
    } | {key.replace("__", "."): value for key, value in values.items() if value is not None}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        settings.load(PretrainConfig, overrides=list(given.items()))


def test_a_context_in_which_no_token_has_a_neighbour_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.context_length 1 holds no token and its neighbour"):
        objective_of(bidirectional(text, model__context_length=1), tmp_path)


def test_a_saved_model_has_the_ids_of_its_tokenizer(text, tmp_path):
    objective = objective_of(bidirectional(text), tmp_path / "corpus")
    objective.save(tmp_path / "saved")
    saved = models.load_model(tmp_path / "saved")
    assert saved.config.vocab_size == objective.corpus.tokenizer.vocab_size
    ids = torch.arange(12)[None]
    assert torch.equal(saved.encode(ids), objective.model.eval().encode(ids))
