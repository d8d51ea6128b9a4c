"""Rows of whole documents: none sees another, and the loss is that of each by itself."""

import dataclasses
import os
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm import settings  # noqa: E402
from portlm.data.batches import IGNORE  # noqa: E402
from portlm.data.documents import (  # noqa: E402
    DocumentSampler,
    pieces_of,
    prepare_documents,
    rows_of,
    split_documents,
)
from portlm.data.packing import first_fit  # noqa: E402
from portlm.data.shards import TokenShards  # noqa: E402
from portlm.errors import ConfigError, UsageError  # noqa: E402
from portlm.models import DECODERS, FAMILIES, build  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.corpus import open_corpus  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.loop import Trainer  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.objectives.causal import CausalObjective  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
END = 256
CPU = torch.device("cpu")


def stream(*lengths, seed=0):
    """Return documents of so many bytes, each with its end, as one array."""
    draw = np.random.default_rng(seed)
    return np.concatenate([[*draw.integers(0, 256, n), END] for n in lengths])


def written(tmp_path, count=40):
    """Write a file of documents of 1 to 60 bytes, and return its path."""
    draw = np.random.default_rng(3)
    documents = ["".join(draw.choice([*"abc d\n"], n)) + "." for n in draw.integers(1, 60, count)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(text.replace("\n\n", "\n") for text in documents))
    return path


def config_of(text, **values):
    values = {
        "data.packing": "documents", "data.texts": [str(text)], "data.batch_size": 3, "model.context_length": 24,
        "model.n_layer": 1, "model.n_head": 2, "model.width": 16, "steps": 6, "log_interval": 1,
        "evaluation.interval": 3, "evaluation.sample_tokens": 0, "checkpoint.interval": 2, "threads": 1,
    } | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def objective_of(tmp_path, **values):
    config = config_of(written(tmp_path), **values)
    corpus = open_corpus(config.data, tmp_path / "data", fresh=True, note=lambda _: None)
    return CausalObjective(config, corpus, CPU)


# ---- documents in a corpus ---------------------------------------------------------------------------------------


def test_first_fit_takes_the_first_row_with_room():
    """Against the definition, row by row."""
    lengths = np.random.default_rng(5).integers(1, 33, 300).tolist()
    rows, room = [], []
    for number in sorted(range(300), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(32)
        rows[row].append(number)
        room[row] -= lengths[number]
    assert first_fit(lengths, 32) == rows
    assert (first_fit([], 8), first_fit([8], 8)) == ([], [[0]])


@pytest.mark.parametrize("closed", [True, False], ids=["ends", "cut off"])
def test_every_token_of_a_document_is_predicted_once_save_the_first(closed):
    tokens = stream(7, 0, 1, 20, 8, 9, 17)
    tokens = tokens if closed else tokens[:-1]
    pieces = pieces_of(tokens, END, 8)
    assert pieces.lengths.max() <= 8
    predicted = np.concatenate([np.arange(s + 1, s + n + 1) for s, n in zip(*pieces, strict=True)])
    firsts = [0, *(np.flatnonzero(tokens[:-1] == END) + 1).tolist()]
    assert sorted(predicted.tolist()) == [i for i in range(len(tokens)) if i not in firsts]


def test_rows_hold_what_follows_each_token():
    tokens = stream(5, 3, 20, 2)
    pieces = pieces_of(tokens, END, 8)
    rows = rows_of(tokens, pieces, first_fit(pieces.lengths.tolist(), 8), 8, END)
    for number, (start, count) in enumerate(zip(*pieces, strict=True)):
        places = rows.packed.texts == number
        assert rows.packed.ids[places].tolist() == tokens[start : start + count].tolist()
        assert rows.targets[places].tolist() == tokens[start + 1 : start + count + 1].tolist()
        assert rows.packed.positions[places].tolist() == list(range(count))
    assert (rows.targets[rows.packed.texts == -1] == IGNORE).all()
    seen = rows.packed.bias(causal=True)[:, 0] == 0
    assert not np.triu(seen, 1).any()
    assert np.array_equal(seen, np.tril(rows.packed.bias()[:, 0] == 0))


def test_documents_are_cut_at_the_separator_and_whole_ones_are_held_out(tmp_path):
    learned, judged = split_documents("a b\n--\n \n--\ncc\n--\ndddd", "\n--\n", 0.1)
    assert (learned, judged) == (["a b", "cc"], ["dddd"])
    train, validation = prepare_documents((learned, judged), byte_tokenizer("<|endoftext|>"), tmp_path)
    assert bytes(i if i < 256 else 0 for i in train[:].tolist()) == b"a b\0cc\0"
    assert (train.text_bytes, validation.text_bytes) == (5, 4)
    with pytest.raises(ConfigError, match="the tokenizer has none: take another tokenizer"):
        prepare_documents((learned, judged), byte_tokenizer(), tmp_path)
    with pytest.raises(
        UsageError, match=r"1 documents cannot hold out a fraction of 0.1: give more, or another "
    ):
        split_documents("a b", "\n\n", 0.1)


def test_several_files_are_several_documents(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text(f"{path.name} text")
    config = config_of(paths[0], data__texts=[str(path) for path in paths])
    open_corpus(config.data, tmp_path / "data", fresh=True, note=lambda _: None)
    assert (TokenShards.open(tmp_path / "data/train")[:] == END).sum() == 2


def test_every_row_comes_once_in_an_epoch_and_a_sampler_goes_on_where_it_stood():
    tokens = stream(*np.random.default_rng(1).integers(1, 30, 50))
    sampler = DocumentSampler(tokens, END, 4, 16, seed=7)
    epoch = [next(sampler) for _ in range(sampler.epochs.steps_per_epoch)]
    seen = np.concatenate([rows.packed.texts.ravel() for rows in epoch])
    assert sorted({*seen.tolist()} - {-1}) == list(range(len(sampler.pieces.starts)))
    assert sum((rows.targets != IGNORE).sum() for rows in epoch) == sampler.pieces.lengths.sum()
    state, following = sampler.state_dict(), next(sampler)
    other = DocumentSampler(tokens, END, 4, 16, seed=7)
    other.load_state_dict(state)
    assert np.array_equal(next(other).packed.ids, following.packed.ids)
    with pytest.raises(ConfigError, match="the saved run had seed 7 and this one has 8"):
        DocumentSampler(tokens, END, 4, 16, seed=8).load_state_dict(state)


# ---- models ------------------------------------------------------------------------------------------------------

PACKING = [name for name in DECODERS if FAMILIES[name].kind == "decoder" and name != "gemma2"]


@pytest.mark.parametrize("family", PACKING)
def test_the_loss_of_a_row_is_that_of_its_documents_one_by_one(family):
    """In float64 only the order of sums differs: 1e-10 of a loss of about 6 leaves a margin of 1e4.

    Gradients likewise, so nothing that is learned depends on what shares a row.
    """
    torch.manual_seed(0)
    config = dataclasses.replace(DECODERS[family].config_class().tiny(), vocab_size=257, eos_token_ids=(END,))
    T = min(24, config.context_length)
    model = build(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens = stream(7, 5, 19, 3, 6, 12, 2)
    pieces = pieces_of(tokens, END, T)
    rows = rows_of(tokens, pieces, first_fit(pieces.lengths.tolist(), T), T, END)
    arrays = rows.packed.ids, rows.targets, rows.packed.positions, rows.packed.bias(causal=True)
    ids, targets, positions, bias = map(torch.from_numpy, arrays)
    packed = model(ids, targets, positions, bias.double())
    together = torch.autograd.grad(packed, list(model.parameters()), allow_unused=True)
    total, count = torch.zeros((), dtype=torch.float64), int(pieces.lengths.sum())
    for start, length in zip(*pieces, strict=True):
        window = torch.from_numpy(tokens[start : start + length + 1])[None]
        total = total + model(window[:, :-1], window[:, 1:]) * (int(length) / count)
    torch.testing.assert_close(packed, total, atol=1e-10, rtol=0)
    apart = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    for one, other in zip(together, apart, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    plain = model(ids, targets)
    assert float((plain - packed).detach().abs()) > 1e-6  # what a stream would have learned is something else


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neo", "mistral"])
def test_the_loss_is_the_same_in_float32_on_kernels(family, tmp_path):
    """Two float32 computations of a mean of about 5.5: 1e-6 relative."""
    objective = objective_of(tmp_path, model__family=family, model__n_layer=2)
    sampler = objective.sampler
    first = next(DocumentSampler(sampler.tokens, END, 3, 24, 1337)).packed.texts
    (part,) = objective.batches()
    with torch.no_grad():
        packed, total, count = float(objective.loss(part)), 0.0, 0
        for number in {*first.ravel().tolist()} - {-1}:
            start, length = int(sampler.pieces.starts[number]), int(sampler.pieces.lengths[number])
            window = torch.from_numpy(sampler.tokens[start : start + length + 1].astype(np.int64))[None]
            total += float(objective.model(window[:, :-1], window[:, 1:])) * length
            count += length
    assert packed == pytest.approx(total / count, rel=1e-6)


def test_parts_of_a_step_add_up_to_the_mean_over_its_tokens(tmp_path):
    one, three = objective_of(tmp_path), objective_of(tmp_path, data__batch_size=1, data__accumulate=3)
    three.model.load_state_dict(one.model.state_dict())
    (part,), parts = one.batches(), three.batches()
    assert len(parts) == 3
    with torch.no_grad():
        assert float(one.loss(part)) == pytest.approx(sum(float(three.loss(p)) for p in parts), rel=1e-6)


def test_held_out_documents_are_judged_one_by_one(tmp_path):
    objective = objective_of(tmp_path)
    found = objective.evaluate(lambda: False)
    tokens = objective.corpus.validation[:].astype(np.int64)
    pieces, total = pieces_of(tokens, END, 24), 0.0
    objective.model.eval().requires_grad_(False)
    for start, length in zip(*pieces, strict=True):
        window = torch.from_numpy(tokens[start : start + length + 1])[None]
        total += float(objective.model(window[:, :-1], window[:, 1:])) * int(length)
    assert found["loss"] == pytest.approx(total / pieces.lengths.sum(), rel=1e-6)
    documents = int((tokens == END).sum())
    text_bytes = len(tokens) - 2 * documents  # of each document its end, and its first byte, which is given
    assert found["bits_per_byte"] == pytest.approx(total / np.log(2) / text_bytes, rel=1e-6)


# ---- runs --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    config = config_of(written(tmp_path))
    whole = pretrain(config, tmp_path / "whole", quiet=True, plot=False)
    step = Trainer.train_step

    def stopping(self):
        step(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(InterruptedTraining):
        pretrain(config, tmp_path / "parted", quiet=True, plot=False)
    monkeypatch.undo()
    parted = pretrain(config, tmp_path / "parted", resume="auto", quiet=True, plot=False)
    assert parted.loss == whole.loss
    first = read_metrics(tmp_path / "whole/metrics.jsonl")[0]
    assert first["steps_per_epoch"] == -(-first["rows"] // 3)
    assert 50 < first["percent_filled"] <= 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "masked", "model__family": "bert"},
            "data.packing = documents is for objective causal",
        ),
        (
            {"data__packing": "stream", "data__separator": "x"},
            "data.separator is for data.packing = documents",
        ),
        ({"data__separator": ""}, "data.separator is empty"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config_of("x", **values)


def test_families_whose_attention_takes_no_bias_are_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="attention of gemma2 with a soft cap takes none"):
        objective_of(tmp_path, model__family="gemma2")
    config = config_of(written(tmp_path))
    recurrent = {"model.family": "recurrent", "model.n_layer": 1, "model.width": 16}
    said = {"data.packing": "documents", "data.texts": list(config.data.texts)} | recurrent
    other = settings.load(PretrainConfig, overrides=list(said.items()))
    corpus = open_corpus(other.data, tmp_path / "again", fresh=True, note=lambda _: None)
    with pytest.raises(ConfigError, match="is for decoders with attention, and recurrent is none"):
        CausalObjective(other, corpus, CPU)


def test_tokens_without_an_end_are_no_documents():
    with pytest.raises(
        ConfigError, match="wants an end-of-text token behind each, and the training tokens have none"
    ):
        DocumentSampler(np.arange(100) % 50, END, 2, 16, 0)
