"""UniLM's objective: modes in their shares, spans that are hidden, a run that learns and writes."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.data.noising import hide_spans  # noqa: E402
from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.models import load_model  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.corpus import Corpus, open_corpus  # noqa: E402
from portlm.train.objectives.prefix import PrefixObjective  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(text, **more):
    values = {
        "objective": "prefix", "data.texts": [str(text)], "model.family": "unilm", "model.n_layer": 1,
        "model.n_head": 2, "model.width": 16, "model.context_length": 15, "data.batch_size": 4, "steps": 4,
        "evaluation.interval": 4, "evaluation.max_tokens": 64, "evaluation.sample_tokens": 4,
        "checkpoint.interval": 2, "threads": 1,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def objective_of(config, folder, corpus=None):
    corpus = corpus or open_corpus(config.data, folder, fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return PrefixObjective(config, corpus, torch.device("cpu"))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_15_percent_are_hidden_of_what_may_be():
    tokens, free = np.arange(200), np.arange(200) % 50 != 0
    for seed in range(5):
        read, said = hide_spans(tokens, free, generator(seed), mask=999, vocab_size=200)
        hidden = said != -100
        assert hidden.sum() == round(196 * 0.15)
        assert not hidden[~free].any()
        assert (said[hidden] == tokens[hidden]).all()
        assert (read[~hidden] == tokens[~hidden]).all()


def test_80_percent_of_the_choices_are_single_tokens():
    """Of 3 % hidden, spans rarely touch. Over 400 texts the standard deviation of the share is below 1 %."""
    free, lengths = np.ones(300, bool), list[int]()
    for seed in range(400):
        _, said = hide_spans(np.arange(300), free, generator(seed), mask=999, vocab_size=300, share=0.03)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], (said != -100).astype(int), [0]))))
        lengths += (edges[1::2] - edges[::2]).tolist()
    share = np.bincount(lengths, minlength=4)[1:4] / len(lengths)
    assert (
        np.abs(share - [0.8, 0.1, 0.1]).max() < 0.06
    )  # touching spans and the cut of the last one move some


def test_of_hidden_tokens_80_percent_are_masks_10_random_and_10_as_they_were():
    """Of 15000 hidden tokens the standard deviation of each share is below 0.4 %."""
    read, said = hide_spans(np.full(100000, 5), np.ones(100000, bool), generator(), mask=999, vocab_size=90)
    hidden = read[said != -100]
    assert abs((hidden == 999).mean() - 0.8) < 0.015
    assert abs((hidden == 5).mean() - 0.1 - 0.1 / 90) < 0.015


def test_steps_have_the_modes_in_their_shares(text, tmp_path):
    """Of 300 steps the standard deviation of each count is at most 8.2."""
    objective = objective_of(config_of(text, data__batch_size=1), tmp_path / "data")
    modes = [objective.batches()[0].mode for _ in range(300)]
    for mode, share in (
        ("bidirectional", 100),
        ("seq2seq", 100),
        ("left_to_right", 50),
        ("right_to_left", 50),
    ):
        assert abs(modes.count(mode) - share) < 33


def test_a_window_is_one_text_or_two_between_control_tokens(text, tmp_path):
    objective = objective_of(config_of(text), tmp_path / "data")
    for _ in range(12):
        (part,) = objective.batches()
        for row, segments, kinds, said in zip(*part[1:5], strict=True):
            whole = torch.where(said == -100, row, said)
            places = (whole == objective.end).nonzero().flatten().tolist()
            one = part.mode in ("left_to_right", "right_to_left")
            assert (whole[0].item(), places[-1]) == (objective.begin, len(whole) - 1)
            assert len(places) == (1 if one else 2)
            assert kinds.tolist() == [0] * places[0] + [1] * (len(whole) - places[0])
            assert segments.tolist() == [0] * (places[0] + 1) + [1] * (len(whole) - places[0] - 1)
            assert said[0] == -100
            if part.mode != "seq2seq":
                assert (said[places] == -100).all()


def test_parts_of_a_batch_have_the_gradient_of_the_whole(text, tmp_path):
    """In float64, only rounding differs."""
    gradients = []
    for rows, parts in ((8, 1), (2, 4)):
        config = config_of(text, data__batch_size=rows, data__accumulate=parts)
        objective = objective_of(config, tmp_path / f"{rows}")
        objective.model.double()
        objective.sampler.step = 3
        sum(objective.loss(part) for part in objective.batches()).backward()
        gradients.append([p.grad for p in objective.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_a_run_learns_writes_and_resumes(text, tmp_path):
    import shutil

    config = config_of(text, steps=30, optimizer__lr=5e-3, evaluation__interval=15, checkpoint__interval=15)
    result = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["kind"] == "eval"]
    assert result.loss == last["loss"] < first["loss"] - 0.5
    assert [key for key in last if key.endswith("_loss")] == [
        "bidirectional_loss", "seq2seq_loss", "left_to_right_loss", "right_to_left_loss",
    ]  # fmt: skip
    assert any(line["kind"] == "sample" for line in lines)
    model = load_model(result.checkpoint)
    assert (model.config.decoder_start_token_id, model.config.mask_token_id) == (258, 259)
    with portlm.load(result.checkpoint, "torch") as session:
        found = session.translate(["99 bottles"], max_new_tokens=4)[0]
        assert found.prompt_tokens == 11  # [CLS] and the text, without [SEP]
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1])
    shutil.rmtree(tmp_path / "run" / "final")
    assert pretrain(config, tmp_path / "run", resume="auto", quiet=True, plot=False).loss == result.loss


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__family": "bert"}, "objective prefix is not for the family bert: set model.family = unilm"),
        ({"objective": "causal"}, "objective causal is not for the family unilm: set objective = prefix"),
    ],
)
def test_a_family_that_cannot_learn_it_is_refused(text, change, words):
    with pytest.raises(ConfigError, match=words):
        config_of(text, **change)


def test_a_tokenizer_without_mask_is_refused(text, tmp_path):
    config = config_of(text)
    plain = open_corpus(config.data, tmp_path / "data", fresh=True, note=lambda text: None)
    corpus = Corpus(byte_tokenizer("[SEP]"), plain.train, plain.validation, plain.digest)
    with pytest.raises(FormatError, match=r"the tokenizer has no \[CLS\], but others"):
        objective_of(config, tmp_path, corpus)
