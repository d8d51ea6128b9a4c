"""Fine-tuning: what a classifier begins with, what its loss is, what it learns, saves and goes on with."""

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from tiny_runs import TEXT  # noqa: E402

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.control_tokens import for_labelling  # noqa: E402
from portlm.errors import ConfigError, FormatError, UsageError  # noqa: E402
from portlm.models import FAMILIES, build, load_model, save_model  # noqa: E402
from portlm.models.heads import with_labels  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.evaluation import evaluating  # noqa: E402
from portlm.train.finetune import PRESET, finetune, in_epochs  # noqa: E402
from portlm.train.initial import begun_from, with_ids  # noqa: E402
from portlm.train.layers import layer_groups  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.objectives.classify import ClassifyObjective, open_labelled  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = {"good": "!+", "bad": "?-"}


def text_of(label, draw):
    """Return two words, and between or beside them a sign that says the label."""
    words = [*draw.choices(["the", "day", "was", "so", "a", "film"], k=2), draw.choice(NAMES[label])]
    draw.shuffle(words)
    return " ".join(words)


@pytest.fixture
def labelled(tmp_path):
    """A file of 48 texts with two labels, sorted by label."""
    draw = random.Random(0)
    path = tmp_path / "labelled.tsv"
    path.write_text("".join(f"{label}\t{text_of(label, draw)}\n" for label in NAMES for _ in range(24)))
    return path


def config_of(labelled, **more):
    values = {
        "data.texts": [str(labelled)], "data.batch_size": 8, "model.family": "openai-gpt", "model.n_layer": 1,
        "model.n_head": 2, "model.width": 16, "model.context_length": 32, "steps": 6, "evaluation.interval": 3,
        "checkpoint.interval": 2, "log_interval": 2, "threads": 1, "optimizer.lr": 3e-3,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    if "init" in more:
        values = {key: value for key, value in values.items() if not key.startswith("model.")}
    return settings.load(PretrainConfig, preset=PRESET, overrides=list(values.items()))


def objective_of(config, folder):
    corpus = open_labelled(config.data, folder, fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return ClassifyObjective(config, corpus, torch.device("cpu"))


def checkpoint_of(family, folder):
    """Save a tiny language model, or an encoder that fills in masks, with a tokenizer of bytes."""
    from portlm.control_tokens import for_reading

    tokenizer = byte_tokenizer()
    if FAMILIES[family].kind == "encoder":
        tokenizer = for_reading(tokenizer)[0]
    config = dataclasses.replace(
        FAMILIES[family].config_class().tiny(), vocab_size=tokenizer.vocab_size, eos_token_ids=()
    )
    torch.manual_seed(5)
    save_model(folder, build(config), tokenizer)
    return folder


# ---- what is begun with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt", "gemma2", "bert", "roberta", "distilbert"])
def test_a_checkpoint_gives_all_but_the_head_and_new_tokens(family, tmp_path):
    old = load_model(checkpoint_of(family, tmp_path / "old"))
    tokenizer = for_labelling(byte_tokenizer())
    V = max(tokenizer.vocab_size, old.config.vocab_size)
    torch.manual_seed(0)
    model, fresh = begun_from(tmp_path / "old", lambda c: with_labels(with_ids(V, c), ("a", "b")))
    known = dict(old.named_parameters())
    for name, p in model.named_parameters():
        if name in fresh:
            continue
        assert torch.equal(p, known[name]), name
    for name in fresh:
        if name in known:  # a table with more rows
            assert torch.equal(dict(model.named_parameters())[name][: len(known[name])], known[name])
        else:
            assert name.startswith(("heads.classify", "pooler."))
    assert any(name.startswith("heads.classify") for name in fresh)
    assert model.config.labels == ("a", "b")


def test_a_head_is_kept_for_the_same_labels_and_fresh_for_others(tmp_path):
    config = with_labels(FAMILIES["gpt2"].config_class().tiny(), ("a", "b"))
    model = build(config)
    save_model(tmp_path, model)
    same, fresh = begun_from(tmp_path, lambda c: with_labels(c, ("a", "b")))
    assert fresh == ()
    assert torch.equal(same.heads["classify"].weight, model.heads["classify"].weight)
    for labels in (("a", "c"), ("a", "b", "c")):
        other, fresh = begun_from(tmp_path, lambda c, labels=labels: with_labels(c, labels))
        assert fresh == ("heads.classify.weight",)
        assert other.heads["classify"].weight.shape == (len(labels), config.width)


def test_a_smaller_vocabulary_than_the_checkpoints_is_refused(tmp_path):
    checkpoint_of("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="has 256 ids and its tokenizer 100: they do not belong together"):
        begun_from(tmp_path, lambda c: dataclasses.replace(c, vocab_size=100))


def test_pretraining_goes_on_from_a_checkpoint(tmp_path):
    """The first evaluation is that of the checkpoint: same weights, same text."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    values = {"data.texts": [str(tmp_path / "text.txt")], "data.batch_size": 4, "evaluation.interval": 4,
              "evaluation.sample_tokens": 0, "threads": 1, "steps": 8}  # fmt: skip
    shape = {"model.n_layer": 1, "model.n_head": 2, "model.width": 16, "model.context_length": 16}
    first = pretrain(
        settings.load(PretrainConfig, overrides=[*(values | shape).items()]),
        tmp_path / "a",
        quiet=True,
        plot=False,
    )
    values |= {"init": str(first.checkpoint)}
    pretrain(
        settings.load(PretrainConfig, overrides=[*values.items()]), tmp_path / "b", quiet=True, plot=False
    )
    begun = next(line for line in read_metrics(tmp_path / "b" / "metrics.jsonl") if line["kind"] == "eval")
    assert begun["step"] == 0
    assert begun["loss"] == pytest.approx(first.loss, rel=1e-6)


# ---- the loss ----------------------------------------------------------------------------------------------------


def test_the_loss_of_a_decoder_is_that_of_the_label_and_half_that_of_the_text(labelled, tmp_path):
    """Written down again, text by text; both sums run in another order, in float32."""
    objective = objective_of(config_of(labelled), tmp_path)
    step = objective.sampler.step
    (part,) = objective.batches()
    objective.sampler.step = step
    rows = [objective.rows[i] for i in next(objective.sampler).tolist()]
    model, said, predicted = objective.model, [], []
    for row in rows:
        ids = torch.tensor([row.ids])
        label = torch.tensor([row.label])
        said.append(torch.nn.functional.cross_entropy(model.answer("classify", ids), label))
        following = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        predicted += following.tolist()
    expected = sum(said) / len(said) + 0.5 * sum(predicted) / len(predicted)
    torch.testing.assert_close(objective.loss(part), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["openai-gpt", "bert"])
def test_parts_of_a_batch_add_up_to_its_gradient(family, labelled, tmp_path):
    gradients = []
    for name, more in (("whole", {}), ("parts", {"data__batch_size": 4, "data__accumulate": 2})):
        objective = objective_of(config_of(labelled, model__family=family, **more), tmp_path / name)
        parts = objective.batches()
        assert len(parts) == (1 if name == "whole" else 2)
        sum(objective.loss(part) for part in parts).backward()
        gradients.append({n: p.grad for n, p in objective.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_without_lm_coef_a_decoder_learns_of_labels_alone(labelled, tmp_path):
    objective = objective_of(config_of(labelled, lm_coef=0.0), tmp_path)
    (part,) = objective.batches()
    logits = objective.model.answer("classify", part.ids, part.mask)
    torch.testing.assert_close(objective.loss(part), torch.nn.functional.cross_entropy(logits, part.labels))


def test_a_text_longer_than_the_context_keeps_its_last_token(tmp_path):
    path = tmp_path / "long.tsv"
    path.write_text("".join(f"{label}\t{'x' * 90}{i}\n" for i, label in enumerate(["a", "b"] * 4)))
    objective = objective_of(config_of(path), tmp_path / "data")
    assert objective.facts()["texts_cut"] == 8
    classify = objective.tokenizer.special["_classify_"]
    for row in objective.rows:
        assert (len(row.ids), row.ids[-1]) == (32, classify)


# ---- runs --------------------------------------------------------------------------------------------------------


def learning(data, **more):
    """Return settings with which a tiny model learns a rule of one token in 60 steps."""
    more = {"model__width": 32, "data__batch_size": 16, "schedule__warmup": 0.1} | more
    return config_of(
        data, data__held_out=str(data), steps=60, evaluation__interval=60, checkpoint__interval=60, **more
    )


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_rule_is_learned_and_the_checkpoint_classifies(family, labelled, tmp_path):
    config = learning(labelled, model__family=family)
    done = finetune(config, tmp_path / "run", quiet=True, plot=False)
    assert done.accuracy == 1
    assert done.loss < 0.2
    assert done.trained == done.parameters
    with portlm.load(done.checkpoint, "torch") as session:
        found = session.classify(["a + film", "so -", "? the day"])
    assert [each.label for each in found] == ["good", "bad", "bad"]


def test_pairs_are_learned_and_classified(tmp_path):
    path = tmp_path / "pairs.jsonl"
    # "yx" and "xy" have the same letters on other sides: the label is that of the second text.
    rows = [{"label": b, "text": a, "text_pair": b} for a in "xy" for b in "xy"] * 12
    path.write_text("\n".join(map(json.dumps, rows)))
    done = finetune(learning(path, model__family="gpt2"), tmp_path / "run", quiet=True, plot=False)
    assert done.accuracy == 1
    with portlm.load(done.checkpoint, "torch") as session:
        assert [each.label for each in session.classify(["x", "x", "y"], ["x", "y", "x"])] == ["x", "y", "x"]


def test_a_frozen_backbone_stays_as_it_was_to_the_last_bit(labelled, tmp_path):
    checkpoint_of("gpt2", tmp_path / "old")
    config = config_of(labelled, init=str(tmp_path / "old"), layers__freeze="backbone")
    done = finetune(config, tmp_path / "run", quiet=True, plot=False)
    model, old = load_model(done.checkpoint), dict(load_model(tmp_path / "old").named_parameters())
    (head,) = layer_groups(model)[-1]
    assert done.trained == head.numel() == 2 * model.config.width
    for name, p in model.named_parameters():
        if name in old:
            assert torch.equal(p[: len(old[name])], old[name]), name


def test_layers_that_do_not_learn_yet_stay_as_they_were(labelled, tmp_path):
    """With 6 steps and a layer more after each 2, the embeddings of a model of one block begin at step 5."""
    checkpoint_of("gpt2", tmp_path / "old")
    old = dict(load_model(tmp_path / "old").named_parameters())
    config = config_of(
        labelled, init=str(tmp_path / "old"), layers__unfreeze=2, layers__decay=2.6, optimizer__weight_decay=0.0,
        steps=6, checkpoint__keep=3,
    )  # fmt: skip
    finetune(config, tmp_path / "run", quiet=True, plot=False)
    for step, learned in ((2, 1), (4, 2), (6, 3)):
        model = load_model(tmp_path / "run" / "checkpoints" / f"step-{step}")
        changed = [
            any(name not in old or not torch.equal(p[: len(old[name])], old[name]) for name, p in named)
            for named in [
                [(n, p) for n, p in model.named_parameters() if any(p is q for q in group)]
                for group in layer_groups(model)
            ]
        ]
        assert changed == [False] * (len(changed) - learned) + [True] * learned


def digest(folder):
    names = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize("more", [{}, {"layers__unfreeze": 2}, {"layers__freeze": "backbone"}], ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_last_bit(more, labelled, tmp_path):
    config = config_of(labelled, model__dropout=0.1, **more)
    finetune(config, tmp_path / "whole", quiet=True, plot=False)
    finetune(
        config_of(labelled, model__dropout=0.1, checkpoint__keep=3, **more),
        tmp_path / "cut",
        quiet=True,
        plot=False,
    )
    for gone in ("checkpoints/step-6", "checkpoints/step-4", "final"):
        shutil.rmtree(tmp_path / "cut" / gone)
    finetune(config, tmp_path / "cut", resume="auto", quiet=True, plot=False)
    ends = [digest(tmp_path / name / "checkpoints" / "step-6") for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_a_run_is_not_resumed_on_other_texts(labelled, tmp_path):
    config = config_of(labelled)
    finetune(config, tmp_path / "run", quiet=True, plot=False)
    labelled.write_text(labelled.read_text().replace("+", "*"))
    with pytest.raises(ConfigError, match="the texts are not those of the checkpoint"):
        finetune(
            dataclasses.replace(config, steps=8), tmp_path / "run", resume="auto", quiet=True, plot=False
        )


def test_epochs_are_counted_in_steps(labelled):
    """Of 48 texts a tenth, rounded, is held out: 43 in batches of 8 are 6 steps."""
    config = in_epochs(config_of(labelled), 2.5, gradual=True)
    assert (config.steps, config.evaluation.interval, config.checkpoint.interval) == (15, 6, 6)
    assert config.layers.unfreeze == 6
    assert in_epochs(config_of(labelled, data__held_out=str(labelled)), 1).steps == 6
    assert in_epochs(config_of(labelled, data__accumulate=2), 1).steps == 3


def test_what_is_judged_is_not_changed_by_judging(labelled, tmp_path):
    objective = objective_of(config_of(labelled, model__dropout=0.5), tmp_path)
    objective.model.train()
    with evaluating(objective.model):
        before = objective.evaluate(lambda: False)
    state = torch.get_rng_state()
    assert objective.evaluate(lambda: False) == before
    assert objective.sample(lambda: False)
    assert torch.equal(torch.get_rng_state(), state)
    assert objective.evaluate(lambda: True) is None


# ---- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (
            {"init": "x", "objective": "span"},
            ConfigError,
            "init is for objectives causal, masked, classify, answer",
        ),
        ({"init": "x", "model.n_layer": 2}, ConfigError, "the model is that of init"),
        ({"init": "x", "data.tokenizer": "bpe:300"}, ConfigError, "the tokenizer is that of init"),
        ({"lm_coef": -1}, ConfigError, "lm_coef must be at least 0"),
        ({"objective": "causal", "lm_coef": 0.1}, ConfigError, "lm_coef is for objective classify"),
        (
            {"objective": "causal", "data.held_out": "x"},
            ConfigError,
            "data.held_out is for objective classify or answer",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(more, kind, message):
    with pytest.raises(kind, match=message):
        settings.load(PretrainConfig, overrides=[*({"objective": "classify"} | more).items()])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model__family": "bert", "lm_coef": 0.1}, "lm_coef is for decoders, and bert is an encoder"),
        ({"model__context_length": 2}, "a context of 2 tokens holds no text beside control tokens"),
    ],
    ids=str,
)
def test_models_that_do_not_fit_are_refused(more, message, labelled, tmp_path):
    with pytest.raises(ConfigError, match=message):
        objective_of(config_of(labelled, **more), tmp_path)


def test_a_decoder_whose_output_matrix_is_its_own_is_refused_to_predict_texts(labelled, tmp_path):
    checkpoint_of("llama", tmp_path / "old")
    config = config_of(labelled, init=str(tmp_path / "old"))
    with pytest.raises(ConfigError, match="a llama with an output matrix of its own has none beside labels"):
        objective_of(config, tmp_path / "data")
    objective_of(dataclasses.replace(config, lm_coef=0.0), tmp_path / "data")


def test_a_family_without_a_head_for_labels_is_refused(labelled, tmp_path):
    given = [("model.family", "recurrent"), ("data.texts", [str(labelled)])]
    config = settings.load(PretrainConfig, preset=PRESET, overrides=given)
    with pytest.raises(ConfigError, match="a recurrent has no head for labels"):
        objective_of(config, tmp_path)


def test_files_that_do_not_fit_are_refused(labelled, tmp_path):
    others = tmp_path / "others.tsv"
    others.write_text("good\tx\nmiddling\ty\n")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("good\tx\ty\nbad\tx\ty\n")
    one = tmp_path / "one.tsv"
    one.write_text("good\tx\ngood\ty\n")
    cases = [
        (
            {"data__held_out": str(others)},
            "others.tsv has the label middling, of which there is no text to learn from",
        ),
        ({"data__held_out": str(pairs)}, "some hold pairs and some single texts"),
        ({"data__texts": [str(one)]}, "one.tsv has one label alone"),
        ({"data__texts": []}, "no texts with labels"),
    ]
    for more, message in cases:
        with pytest.raises(UsageError, match=message):
            objective_of(config_of(labelled, **more), tmp_path / "data")
    with pytest.raises(FormatError, match=r"gone.tsv"):
        objective_of(config_of(labelled, data__texts=[str(tmp_path / "gone.tsv")]), tmp_path / "data")


def test_a_checkpoint_without_a_tokenizer_is_refused(labelled, tmp_path):
    save_model(tmp_path / "old", build(FAMILIES["gpt2"].config_class().tiny()))
    with pytest.raises(FormatError, match=r"tokenizer.json"):
        finetune(config_of(labelled, init=str(tmp_path / "old")), tmp_path / "run", quiet=True, plot=False)


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_recipe_of_ulmfit_is_taken_as_the_page_writes_it(labelled, tmp_path):
    """With a checkpoint of one block there are three groups of layers, and eight epochs of six steps."""
    from click.testing import CliRunner

    from portlm.commands.finetune import command

    checkpoint_of("gpt2", tmp_path / "old")
    page = (Path(__file__).resolve().parents[2] / "docs" / "finetune.md").read_text()
    (line,) = [
        line for line in page.splitlines() if "--schedule slanted" in line and line.startswith("portlm ")
    ]
    words = line.split()[2:]
    words[words.index("reviews.tsv")] = str(labelled)
    words[words.index("gpt/final")] = str(tmp_path / "old")
    call = [*words, "--out", str(tmp_path / "run"), "--threads", "1", "--batch", "8", "--quiet"]
    result = CliRunner().invoke(command, call, standalone_mode=False)
    assert result.exit_code == 0, result.output
    made = settings.load(PretrainConfig, file=tmp_path / "run" / "config.toml")
    assert (made.schedule.shape, made.schedule.warmup, made.optimizer.lr) == ("slanted", 0.1, 0.01)
    assert (made.layers.decay, made.layers.unfreeze, made.steps) == (2.6, 6, 48)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_file_of_settings_may_ask_for_a_triangle_and_a_resumed_run_keeps_it(labelled, tmp_path):
    from portlm.commands.finetune import resolve
    from portlm.settings import to_toml

    data = ("data.texts", [str(labelled)])
    (tmp_path / "given.toml").write_text('[schedule]\nshape = "slanted"\n')
    made = resolve([data, "steps=6"], tmp_path, "none", tmp_path / "given.toml", 3, gradual=False)
    assert (made.schedule.shape, made.schedule.warmup, made.schedule.min_lr) == ("slanted", 0.002, 1e-4)
    (tmp_path / "config.toml").write_text(to_toml(made))
    assert resolve([], tmp_path, "auto", None, 3, gradual=False) == made
    over = resolve(
        [data, "schedule.shape=linear"], tmp_path, "none", tmp_path / "given.toml", 3, gradual=False
    )
    assert over.schedule.min_lr == 0
