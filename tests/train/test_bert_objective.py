"""BERT's two tasks: pairs of texts, both heads, a loss that is transformers', and a checkpoint that keeps both."""

import json
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.data.sentence_pairs import sentence_pair  # noqa: E402
from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.hub import export_hf, import_hf  # noqa: E402
from portlm.models import build, load_model  # noqa: E402
from portlm.models.bert import BertConfig  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.corpus import Corpus, open_corpus  # noqa: E402
from portlm.train.objectives.bert import BertObjective  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("masked_lm", "next_sentence")
ENDS = np.zeros(100, bool)
ENDS[9] = True


def config_of(text, **more):
    values = {
        "objective": "bert", "data.texts": [str(text)], "model.family": "bert", "model.n_layer": 1,
        "model.n_head": 2, "model.width": 16, "model.context_length": 32, "data.batch_size": 4, "steps": 4,
        "evaluation.interval": 4, "evaluation.max_tokens": 128, "checkpoint.interval": 2, "threads": 1,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def objective_of(config, folder, corpus=None):
    corpus = corpus or open_corpus(config.data, folder, fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return BertObjective(config, corpus, torch.device("cpu"))


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def test_half_of_the_second_texts_follow_and_texts_are_cut_behind_sentences():
    """Of 1000 pairs the standard deviation is 16."""
    window = np.array([10, 11, 9, 12, 13, 9, 14, 15])
    other = np.array([30, 9, 31, 32, 33, 34, 35, 36])
    found = [sentence_pair(window, other, ENDS, generator(seed)) for seed in range(1000)]
    assert {len(pair.first) for pair in found} == {3, 6}
    assert abs(sum(pair.random for pair in found) - 500) < 80
    for pair in found:
        assert pair.first.tolist() == window[: len(pair.first)].tolist()
        assert len(pair.first) + len(pair.second) == 8
        if pair.random:
            assert pair.second.tolist() == other[2 : 2 + len(pair.second)].tolist()
        else:
            assert pair.second.tolist() == window[len(pair.first) :].tolist()


def test_a_window_without_the_end_of_a_sentence_is_cut_in_the_middle():
    pair = sentence_pair(np.full(7, 10), np.full(7, 20), ENDS, generator(0))
    assert (len(pair.first), len(pair.second)) == (3, 4)


def test_pairs_stand_between_control_tokens_with_segments(text, tmp_path):
    objective = objective_of(config_of(text), tmp_path / "data")
    (part,) = objective.batches()
    (begin,), (end,) = objective.begin, objective.end
    assert part.inputs.shape == (4, 32)
    for row, kinds, targets in zip(*part[:3], strict=True):
        places = (row == end).nonzero().flatten().tolist()
        assert (row[0].item(), len(places), places[1]) == (begin, 2, 31)
        assert kinds.tolist() == [0] * (places[0] + 1) + [1] * (31 - places[0])
        assert (targets[[0, *places]] == -100).all()
    assert objective.model.config.heads == BOTH


def test_parts_of_a_batch_have_the_gradient_of_the_whole(text, tmp_path):
    """In float64, only rounding differs."""
    gradients = []
    for rows, parts in ((8, 1), (2, 4)):
        objective = objective_of(
            config_of(text, data__batch_size=rows, data__accumulate=parts), tmp_path / f"{rows}"
        )
        objective.model.double()
        sum(objective.loss(part) for part in objective.batches()).backward()
        gradients.append([p.grad for p in objective.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_logits_of_both_heads_and_the_loss_are_those_of_transformers(text, tmp_path):
    """The same formulas in float64: only the order of summation may differ, so 1e-9 leaves a margin of 1e5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="pip install portlm[hf]")
    objective = objective_of(config_of(text), tmp_path / "data")
    model = objective.model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other = transformers.BertForPreTraining(transformers.BertConfig(**model.config.to_hf())).double().eval()
    state = {model.hf_name(name)[0]: p.detach() for name, p in model.named_parameters()}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert {*missing} <= {*model.hf_tied(model.config)}
    (part,) = objective.batches()
    theirs = other(
        input_ids=part.inputs, token_type_ids=part.kinds, labels=part.targets, next_sentence_label=part.random
    )
    hidden, follows = objective._logits(part)
    torch.testing.assert_close(follows, theirs.seq_relationship_logits, atol=1e-9, rtol=1e-9)
    wanted = theirs.prediction_logits.flatten(0, 1)[part.targets.flatten() != -100]
    torch.testing.assert_close(hidden, wanted, atol=1e-9, rtol=1e-9)
    loss = objective.loss(part)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-9, rtol=1e-9)
    loss.backward()
    theirs.loss.backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if not name.endswith("key.bias"):  # it shifts all scores of a query alike: both are rounding
            torch.testing.assert_close(p.grad, gradients[model.hf_name(name)[0]].grad, atol=1e-10, rtol=1e-8)


def test_the_base_model_with_both_heads_has_the_published_number_of_parameters():
    assert build(BertConfig(heads=BOTH), device="meta").num_parameters() == 110_106_428


def test_both_heads_learn_from_one_batch(text, tmp_path):
    objective = objective_of(config_of(text), tmp_path / "data")
    (part,) = objective.batches()
    optimizer = torch.optim.AdamW(objective.model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss(part).backward()
        optimizer.step()
    hidden, follows = objective._logits(part)
    assert (follows.argmax(-1) == part.random).all()
    assert (hidden.argmax(-1) == part.targets[part.targets != -100]).float().mean() > 0.8


def test_a_checkpoint_keeps_both_heads_and_is_asked_with_both(text, tmp_path):
    result = pretrain(config_of(text, steps=30), tmp_path / "run", quiet=True, plot=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["kind"] == "eval"]
    assert last["loss"] == pytest.approx(last["masked_loss"] + last["next_sentence_loss"])
    assert last["masked_loss"] < first["masked_loss"]
    assert 0 <= last["next_sentence_accuracy"] <= 1
    model = load_model(result.checkpoint)
    assert model.config.heads == BOTH
    export_hf(result.checkpoint, tmp_path / "theirs")
    import_hf(tmp_path / "theirs", tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert again.config.heads == BOTH
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    with portlm.load(tmp_path / "ours", "torch") as session:
        assert len(session.classify("9 bottles.", "8 bottles.", head="next_sentence").labels) == 2
        assert session.fill("9 bott[MASK]es")


def test_a_resumed_run_is_the_run_in_one(text, tmp_path):
    import shutil

    whole = pretrain(config_of(text), tmp_path / "whole", quiet=True, plot=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    again = pretrain(config_of(text), tmp_path / "cut", resume="auto", quiet=True, plot=False)
    assert again.loss == whole.loss


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__family": "gpt2"}, "objective bert is not for the family gpt2: set model.family = bert"),
        ({"model__family": "roberta"}, "a roberta has none: set model.family = bert"),
        ({"model__context_length": 7}, "context_length 7 holds no two texts"),
    ],
)
def test_a_model_that_cannot_learn_it_is_refused(text, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        objective_of(config_of(text, **change), tmp_path / "data")


def test_a_tokenizer_without_sep_is_refused(text, tmp_path):
    config = config_of(text)
    plain = open_corpus(config.data, tmp_path / "data", fresh=True, note=lambda text: None)
    corpus = Corpus(byte_tokenizer("[CLS]"), plain.train, plain.validation, plain.digest)
    with pytest.raises(FormatError, match=r"the tokenizer has no \[SEP\], but others"):
        objective_of(config, tmp_path, corpus)
