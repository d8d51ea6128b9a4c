"""Pairs: how they are read and cut into batches, and what a run on them learns, saves and goes on with."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.control_tokens import for_reading  # noqa: E402
from portlm.data.pairs import POOL, PairSampler, padded, read_pairs  # noqa: E402
from portlm.errors import ConfigError, FormatError, UsageError  # noqa: E402
from portlm.models import FAMILIES, build, load_model, save_model  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.corpus import open_corpus  # noqa: E402
from portlm.train.objectives.seq2seq import Seq2SeqObjective, open_pairs  # noqa: E402
from portlm.train.objectives.span import SpanObjective  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [
    ("".join(reversed(word)), word) for word in ("abc", "de", "fghij", "kl", "mnopq", "rs", "tuv", "w") * 12
]


@pytest.fixture
def files(tmp_path):
    for name, side in (("a.txt", 0), ("b.txt", 1)):
        (tmp_path / name).write_text("".join(f"{pair[side]}\n" for pair in PAIRS))
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


def config_of(files, **more):
    values = {
        "objective": "seq2seq", "data.source": files[0], "data.target": files[1], "model.family": "t5",
        "model.n_layer": 1, "model.n_head": 2, "model.width": 32, "model.context_length": 16, "data.batch_size": 8,
        "steps": 4, "evaluation.interval": 2, "evaluation.sample_tokens": 4, "checkpoint.interval": 2,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def objective_of(config, folder):
    corpus = open_pairs(config.data, folder, fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return Seq2SeqObjective(config, corpus, torch.device("cpu"))


# ---- reading -----------------------------------------------------------------------------------------------------


def test_pairs_are_the_same_from_two_files_a_table_and_json(files, tmp_path):
    (tmp_path / "c.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    lines = [json.dumps({"source": a, "target": b, "id": 3}) for a, b in PAIRS]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    assert read_pairs(*files) == PAIRS
    assert read_pairs(tmp_path / "c.tsv") == PAIRS
    assert read_pairs(tmp_path / "d.jsonl") == PAIRS


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.tsv", "a\tb\nc\n", "line 2: a source, a tab and a target are wanted, got 1 columns"),
        ("x.tsv", "a\tb\n\tc\n", "line 2: one side of the pair is empty"),
        ("x.jsonl", '{"source": "a"}\n', 'line 1: an object with the texts "source" and "target"'),
        ("x.jsonl", "[1]\n", "line 1: an object"),
        ("x.jsonl", "{\n", "line 1: no JSON"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=words):
        read_pairs(tmp_path / name)


def test_files_of_different_lengths_and_of_other_kinds_are_refused(files, tmp_path):
    (tmp_path / "short.txt").write_text("a\nb\n")
    with pytest.raises(FormatError, match=r"96 lines and .* 2"):
        read_pairs(files[0], tmp_path / "short.txt")
    with pytest.raises(UsageError, match=r"ends in \.tsv or \.jsonl"):
        read_pairs(files[0])


# ---- batches -----------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_pair_once_and_a_batch_pairs_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 100, (1000, 2))
    sampler = PairSampler(lengths, 7, seed=3)
    steps = 1000 // 7
    epochs = [np.stack([sampler.batch(e * steps + s) for s in range(steps)]) for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch.ravel().tolist())) == steps * 7
    assert not np.array_equal(*epochs)
    spread = np.mean([np.ptp(lengths[batch, 1]) for batch in epochs[0]])
    assert spread < 10  # of random batches of 7 it is 75
    assert POOL > 1


def test_a_batch_follows_from_seed_and_step_alone():
    lengths = np.random.default_rng(0).integers(1, 50, (90, 2))
    one, other = PairSampler(lengths, 4, seed=3), PairSampler(lengths, 4, seed=3)
    steps = [40, 3, 22, 0]
    backwards = {step: other.batch(step).tolist() for step in reversed(steps)}
    assert {step: one.batch(step).tolist() for step in steps} == backwards
    assert PairSampler(lengths, 4, seed=4).batch(0).tolist() != one.batch(0).tolist()
    with pytest.raises(UsageError, match="90 pairs do not fill a batch of 91"):
        PairSampler(lengths, 91, seed=0)


def test_rows_are_filled_at_their_ends():
    assert padded([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]


# ---- the objective -----------------------------------------------------------------------------------------------


def test_parts_of_a_batch_have_the_gradient_of_the_whole(files, tmp_path):
    """Parts have different numbers of targets: their means must not count alike. In float64, only rounding differs."""
    gradients = []
    for rows, parts in ((8, 1), (2, 4)):
        config = config_of(files, data__batch_size=rows, data__accumulate=parts, label_smoothing=0.1)
        objective = objective_of(config, tmp_path / f"{rows}")
        objective.model.double()
        batches = objective.batches()
        assert sum(part.share for part in batches) == pytest.approx(1)
        sum(objective.loss(part) for part in batches).backward()
        gradients.append([p.grad for p in objective.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_a_target_is_read_one_token_late_and_ends_with_the_end_of_text(files, tmp_path):
    objective = objective_of(config_of(files), tmp_path / "run")
    (part,) = objective.batches()
    ids = [bytes(row[mask == 1].tolist()).decode() for row, mask in zip(part.source, part.mask, strict=True)]
    for source, read, wanted in zip(ids, part.read.tolist(), part.targets.tolist(), strict=True):
        target = list(source[::-1].encode())
        n = len(target) + 1
        assert read[:n] == [objective.start, *target]
        assert wanted[:n] == [*target, objective.end]
        assert set(wanted[n:]) <= {-100}
    assert (objective.model.config.decoder_start_token_id, objective.end) == (257, 256)


def test_pairs_that_do_not_fit_the_context_are_counted(files, tmp_path):
    objective = objective_of(config_of(files, model__context_length=4), tmp_path / "run")
    facts = objective.facts()
    kept = sum(len(target) + 1 <= 4 for _, target in PAIRS)
    assert facts["train_pairs"] + facts["held_out_pairs"] == kept
    assert facts["pairs_left_out"] == len(PAIRS) - kept


@pytest.mark.parametrize("family", ["t5", "marian", "bart"])
def test_every_family_learns_from_pairs(files, tmp_path, family):
    config = config_of(files, model__family=family, steps=30, optimizer__lr=3e-3, evaluation__interval=15)
    result = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert result.loss == losses[-1] < losses[0] - 0.5
    assert load_model(result.checkpoint).config.eos_token_ids == (256,)


def test_a_run_that_was_cut_in_two_is_the_run_in_one(files, tmp_path):
    whole = pretrain(config_of(files, steps=6), tmp_path / "whole", quiet=True, plot=False)
    pretrain(config_of(files, steps=6), tmp_path / "cut", quiet=True, plot=False)
    for folder in sorted((tmp_path / "cut" / "checkpoints").iterdir())[2:]:
        shutil.rmtree(folder)  # the last third did not happen
    again = pretrain(config_of(files, steps=6), tmp_path / "cut", resume="auto", quiet=True, plot=False)
    assert again.loss == whole.loss
    one, other = (load_model(result.checkpoint).state_dict() for result in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_goes_on_with_its_own_pairs_alone(files, tmp_path):
    config = config_of(files)
    pretrain(config, tmp_path / "run", quiet=True, plot=False)
    for name, line in zip(files, ("x\n", "y\n"), strict=True):
        path = Path(name)
        path.write_text(path.read_text() + line)
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        pretrain(config, tmp_path / "run", resume="auto", quiet=True, plot=False)


def begun(folder, family):
    """A fresh checkpoint whose tokenizer puts [CLS] before a text and [SEP] behind it."""
    tokenizer, _ = for_reading(byte_tokenizer())
    config = FAMILIES[family].config_class().tiny()
    save_model(folder, build(dataclasses.replace(config, vocab_size=tokenizer.vocab_size)), tokenizer)
    return tokenizer


def test_two_of_a_bert_learn_to_write_and_read_sources_as_in_training(files, tmp_path):
    tokenizer = begun(tmp_path / "bert", "bert")
    config = settings.load(
        PretrainConfig,
        overrides=[
            ("objective", "seq2seq"), ("init", str(tmp_path / "bert")), ("steps", 2), ("data.batch_size", 8),
            ("data.source", files[0]), ("data.target", files[1]),
        ],
    )  # fmt: skip
    done = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    model = load_model(done.checkpoint)
    assert model.config.family == "encoder-decoder"
    with portlm.load(done.checkpoint, "torch") as session:
        assert session.start_ids == tuple(tokenizer.begin_ids)  # [CLS], as of what the BERT read
        assert session.eos_ids == {*tokenizer.end_ids}  # [SEP]
        source = PAIRS[0][0]
        assert (
            session.translate(source).prompt_tokens == len(source) + 2
        )  # and not without what is put around it


def test_a_checkpoint_that_cannot_read_a_source_is_no_beginning(files, tmp_path):
    begun(tmp_path / "gpt2", "gpt2")
    config = settings.load(
        PretrainConfig,
        overrides=[
            ("objective", "seq2seq"), ("init", str(tmp_path / "gpt2")), ("data.source", files[0]),
            ("data.target", files[1]),
        ],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"gpt2 has no encoder that could read a source"):
        pretrain(config, tmp_path / "run", quiet=True, plot=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__family": "gpt2"}, "objective seq2seq is not for the family gpt2"),
        ({"objective": "causal", "model__family": "t5"}, "objective causal is not for the family t5"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"data__target": ""}, "give both, or neither"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(files, change, words):
    with pytest.raises(ConfigError, match=words):
        config_of(files, **change)


def test_smoothing_is_for_pairs_alone():
    with pytest.raises(ConfigError, match="label_smoothing is for objective seq2seq"):
        PretrainConfig(label_smoothing=0.1)


# ---- span corruption on plain text -------------------------------------------------------------------------------


def span_config(tmp_path, **more):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    values = {
        "objective": "span", "data.texts": [str(tmp_path / "text.txt")], "model.family": "t5", "model.n_layer": 1,
        "model.n_head": 2, "model.width": 32, "model.context_length": 32, "data.batch_size": 8, "steps": 40,
        "optimizer.lr": 3e-3, "evaluation.interval": 20, "checkpoint.interval": 20,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def span_objective(tmp_path, **more):
    config = span_config(tmp_path, **more)
    corpus = open_corpus(config.data, tmp_path / "data", fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return SpanObjective(config, corpus, torch.device("cpu"))


def test_what_was_taken_out_and_what_is_left_are_the_text(tmp_path):
    objective = span_objective(tmp_path)
    ids, _ = objective.sampler.batch(0)
    (part,) = objective.batches()
    V, config = objective.corpus.tokenizer.vocab_size, objective.model.config
    assert (objective.start, objective.end, objective.first) == (V, V + 1, config.vocab_size - 1)
    assert part.source.shape[1] <= config.context_length
    for text, source, read, target in zip(ids, part.source, part.read, part.targets, strict=True):
        said, spans = target[target != -100].tolist(), {}
        assert read[: len(said)].tolist() == [V, *said[:-1]]
        for token in said[:-1]:
            if token > V + 1:
                spans[number := token] = []
            else:
                spans[number].append(token)
        again = [
            t for token in source.tolist() if token < V or token > V + 1 for t in spans.get(token, [token])
        ]
        assert again == text.tolist()


def test_parts_of_a_corrupted_batch_have_the_gradient_of_the_whole(tmp_path):
    gradients = []
    for rows, parts in ((8, 1), (2, 4)):
        objective = span_objective(tmp_path, data__batch_size=rows, data__accumulate=parts)
        objective.model.double()
        sum(objective.loss(part) for part in objective.batches()).backward()
        gradients.append([p.grad for p in objective.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_t5_learns_to_fill_holes_and_a_resumed_run_is_the_same(tmp_path):
    whole = pretrain(span_config(tmp_path), tmp_path / "whole", quiet=True, plot=False)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert whole.loss == losses[-1] < losses[0] - 1
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    again = pretrain(span_config(tmp_path), tmp_path / "cut", resume="auto", quiet=True, plot=False)
    assert again.loss == whole.loss
