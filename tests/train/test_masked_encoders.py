"""Encoders learn to fill holes with the head and the control tokens that they are used with afterwards."""

import random

import pytest

torch = pytest.importorskip("torch")

import tokenizer_files  # noqa: E402

import portlm  # noqa: E402
from portlm import models, settings  # noqa: E402
from portlm.control_tokens import for_reading  # noqa: E402
from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.models import FAMILIES  # noqa: E402
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402
from portlm.weights import load_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "encoder"]


def masked(text, family="bert", **values):
    """Return settings of a small run."""
    values = {
        "objective": "masked", "steps": 8, "log_interval": 4, "model.family": family, "data.batch_size": 4,
        "model.n_layer": 1, "model.n_head": 2, "model.width": 16, "model.context_length": 16, "data.texts": [str(text)],
        "evaluation.interval": 8, "evaluation.max_tokens": 128, "evaluation.sample_tokens": 16, "threads": 1,
        "checkpoint.interval": 4,
    } | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def test_a_bert_learns_to_fill_holes_and_is_asked_to_afterwards(tmp_path):
    """Runs of equal letters: a hole is what its neighbours are, once in 40 times there is a doubt."""
    letters = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(letters.choice("abcdefghijklmnopqrstuvwxyz") * 40 for _ in range(400)))
    config = masked(
        text, steps=400, data__batch_size=16, optimizer__lr=3e-3, evaluation__interval=200, model__width=32,
        evaluation__max_tokens=2048, checkpoint__interval=400,
    )  # fmt: skip
    result = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    assert last["loss"] < 1.3  # ln 26 = 3.3 for one that sees no neighbours
    assert last["accuracy"] > 0.8 > first["accuracy"]
    holes, filled = [record["text"] for record in records if record["kind"] == "sample"][-1].split("\n")
    assert len(holes) == len(filled) == 14  # without the two control tokens
    model = models.load_model(result.checkpoint)
    assert (type(model).__name__, model.config.heads, model.config.vocab_size) == (
        "Bert",
        ("masked_lm",),
        260,
    )
    with portlm.load(result.checkpoint, "torch") as session:
        assert session.tokenizer.begin_ids == [257]
        for letter in "aqz":
            ((best, *_),) = session.fill(f"{letter * 6}[MASK]{letter * 6}", top_k=2)
            assert best.token == letter
        assert session.embed("aaaa").shape == (32,)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_trains_and_resumes_bit_for_bit(text, tmp_path, monkeypatch, family):
    import os
    import signal

    from portlm.train.loop import Trainer

    config = masked(text, family, model__dropout=0.1)
    pretrain(config, tmp_path / "straight", quiet=True, plot=False)
    original = Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(InterruptedTraining):
            pretrain(config, tmp_path / "broken", quiet=True, plot=False)
    pretrain(config, tmp_path / "broken", resume="auto", quiet=True, plot=False)
    one, other = (
        load_torch(tmp_path / run / "final" / "model.safetensors") for run in ("straight", "broken")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_encoder_cannot_be_trained_to_continue_a_text(text, tmp_path):
    with pytest.raises(ConfigError, match="a bert reads whole ones: set objective = masked"):
        pretrain(masked(text, objective="causal"), tmp_path / "run", quiet=True, plot=False)


def test_a_context_of_control_tokens_alone_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="context_length 2 holds no token"):
        pretrain(masked(text, model__context_length=2), tmp_path / "run", quiet=True, plot=False)


@pytest.mark.parametrize(
    "make", [byte_tokenizer, lambda: byte_tokenizer(END_OF_TEXT), lambda: train_bpe(["aab aab"], 259)]
)
def test_control_tokens_are_added_behind_all_others(make, tmp_path):
    plain = make()
    tokenizer, mask = for_reading(plain)
    names = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
    ids = {name: plain.vocab_size + i for i, name in enumerate(names)}
    assert tokenizer.special == plain.special | ids
    assert (mask, tokenizer.eos_id) == (ids["[MASK]"], plain.eos_id)
    for text in ("aab", "[MASK]", ""):
        inside = plain.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == [ids["[CLS]"], *inside, ids["[SEP]"]]
    assert tokenizer.encode_typed("a", "b")[1] == [0, 0, 0, 1, 1]
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    assert for_reading(tokenizer)[0].sha256 == tokenizer.sha256


def test_control_tokens_that_a_tokenizer_has_are_kept(tmp_path):
    import json

    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files.document("bert")))
    plain = Tokenizer.load(tmp_path)
    tokenizer, mask = for_reading(plain.without_template())
    assert (tokenizer.special, mask) == (plain.special, plain.special["[MASK]"])
    assert tokenizer.encode("a list") == plain.encode("a list")


def test_a_tokenizer_with_some_of_the_tokens_is_refused():
    with pytest.raises(FormatError, match=r"the tokenizer has no \[SEP\], but others"):
        for_reading(byte_tokenizer("[CLS]"))
