"""Runs of the objectives in which a decoder says what was taken from a text: denoise and mass."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.models import load_model  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.corpus import Corpus, open_corpus  # noqa: E402
from portlm.train.objectives import objective_class  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("denoise", "mass")


def config_of(text, objective="denoise", **more):
    values = {
        "objective": objective, "data.texts": [str(text)], "model.family": "bart", "model.n_layer": 1,
        "model.n_head": 2, "model.width": 16, "model.context_length": 24, "data.batch_size": 4, "steps": 4,
        "evaluation.interval": 4, "evaluation.max_tokens": 64, "checkpoint.interval": 2, "threads": 1,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def objective_of(config, folder, corpus=None):
    corpus = corpus or open_corpus(config.data, folder, fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return objective_class(config.objective)(config, corpus, torch.device("cpu"))


def test_denoising_reads_a_noised_text_and_says_all_of_it(text, tmp_path):
    objective = objective_of(config_of(text), tmp_path / "data")
    ids, _ = objective.sampler.batch(0)
    (part,) = objective.batches()
    config, (begin,), (end,) = objective.model.config, objective.begin, objective.end
    assert objective.tokenizer.special["[MASK]"] == objective.mask_id
    assert (config.decoder_start_token_id, config.eos_token_ids) == (end, (end,))
    assert part.source.shape[1] <= config.context_length
    for row, source, mask, read, said in zip(ids, *part[:4], strict=True):
        assert said.tolist() == [*row.tolist(), end]
        assert read.tolist() == [end, *row.tolist()]
        seen = source[mask == 1].tolist()
        assert (seen[0], seen[-1]) == (begin, end)
        kept = [token for token in seen[1:-1] if token != objective.mask_id]
        assert len(kept) == 22 - round(0.3 * 22)
        for token in kept:
            assert kept.count(token) <= row.tolist().count(token)


def test_mass_says_half_of_a_text(text, tmp_path):
    objective = objective_of(config_of(text, "mass"), tmp_path / "data")
    ids, _ = objective.sampler.batch(0)
    (part,) = objective.batches()
    assert ((part.targets != -100).sum(1) == 11).all()
    for row, source, said in zip(torch.from_numpy(ids), part.source, part.targets, strict=True):
        inside = said != -100
        assert (said[inside] == row[inside]).all()
        assert (source[1:-1][~inside] == row[~inside]).all()


@pytest.mark.parametrize("kind", ["masking", "deletion", "infilling", "permutation", "rotation"])
def test_each_noise_alone_makes_batches(text, tmp_path, kind):
    objective = objective_of(config_of(text, noise__kinds=[kind]), tmp_path / "data")
    (part,) = objective.batches()
    masks = (part.source == objective.mask_id).sum().item()
    assert (masks > 0) == (kind in ("masking", "infilling"))
    assert torch.isfinite(objective.loss(part))


@pytest.mark.parametrize("name", BOTH)
def test_parts_of_a_batch_have_the_gradient_of_the_whole(text, tmp_path, name):
    """In float64, only rounding differs."""
    gradients = []
    for rows, parts in ((8, 1), (2, 4)):
        config = config_of(text, name, data__batch_size=rows, data__accumulate=parts)
        objective = objective_of(config, tmp_path / f"{rows}")
        objective.model.double()
        sum(objective.loss(part) for part in objective.batches()).backward()
        gradients.append([p.grad for p in objective.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("name", "family"), [("denoise", "bart"), ("denoise", "t5"), ("mass", "marian")])
def test_a_run_learns_and_its_checkpoint_reads_masks(text, tmp_path, name, family):
    config = config_of(
        text, name, model__family=family, steps=30, optimizer__lr=5e-3, evaluation__interval=15
    )
    result = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert result.loss == losses[-1] < losses[0] - 0.5
    again = pretrain(config, tmp_path / "run", resume="auto", quiet=True, plot=False)
    assert again.loss == result.loss
    assert load_model(result.checkpoint).config.eos_token_ids == (258,)
    with portlm.load(result.checkpoint, "torch") as session:
        source = session.tokenizer.encode("99 bottles [MASK] wall", special=True)
        assert len(source) == 19  # one for the mask, and one at each end
        assert session.generate(source, max_new_tokens=4).prompt_tokens == 19


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"noise__kinds": ["blur"]},
            "noise.kinds must be of permutation, rotation, deletion, masking, infilling, got 'blur'",
        ),
        ({"noise__kinds": []}, "noise.kinds is empty: name some of permutation"),
        ({"noise__kinds": ["masking", "masking"]}, "names masking twice"),
        ({"noise__share": 0.0}, "noise.share"),
        ({"noise__span": -1.0}, "noise.span"),
        ({"noise__fragment": 0.25}, "noise.fragment is for objective mass"),
        ({"objective": "mass", "noise__span": 2.0}, "noise.span is for objective denoise"),
        ({"objective": "mass", "noise__fragment": 1.5}, "noise.fragment"),
        ({"model__family": "gpt2"}, "objective denoise is not for the family gpt2: set model.family = .*bart"),
        ({"objective": "mass", "model__family": "bert"}, "objective mass is not for the family bert"),
        ({"objective": "causal"}, "objective causal is not for the family bart: set objective = .*denoise or mass"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(text, change, words):
    with pytest.raises(ConfigError, match=words):
        config_of(text, **change)


@pytest.mark.parametrize("name", BOTH)
def test_a_context_of_few_tokens_is_refused(text, tmp_path, name):
    with pytest.raises(ConfigError, match="context_length 7 is too short for objective"):
        objective_of(config_of(text, name, model__context_length=7), tmp_path / "data")


@pytest.mark.parametrize("name", BOTH)
def test_a_tokenizer_with_some_of_the_control_tokens_is_refused(text, tmp_path, name):
    config = config_of(text, name)
    plain = open_corpus(config.data, tmp_path / "data", fresh=True, note=lambda text: None)
    corpus = Corpus(byte_tokenizer("[MASK]"), plain.train, plain.validation, plain.digest)
    with pytest.raises(FormatError, match=r"the tokenizer has no \[CLS\], but others"):
        objective_of(config, tmp_path, corpus)
