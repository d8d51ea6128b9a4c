"""Objectives: what masked training hides, and that whatever an objective needs survives an interruption."""

import dataclasses
import hashlib
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from portlm import models, settings  # noqa: E402
from portlm.data.batches import IGNORE  # noqa: E402
from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.train.checkpoint import check_checkpoint, list_checkpoints  # noqa: E402
from portlm.train.config import PretrainConfig, RunConfig  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.loop import Trainer, accumulate_gradients, train  # noqa: E402
from portlm.train.metrics import comparable, read_metrics  # noqa: E402
from portlm.train.objectives import OBJECTIVES, objective_class  # noqa: E402
from portlm.train.objectives.masked import hide  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402
from portlm.weights import load_torch, save_tensors  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
pytestmark = pytest.mark.usefixtures("one_thread")


def masked(text, **values):
    """Return settings of a run that trains the toy encoder to guess hidden tokens."""
    values = {
        "objective": "masked", "steps": 12, "log_interval": 3, "model.family": "toy-encoder", "data.batch_size": 4,
        "evaluation.interval": 6, "evaluation.max_tokens": 128, "evaluation.sample_tokens": 16,
        "checkpoint.interval": 4, "data.texts": [str(text)], "threads": 1,
    } | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


def digest(run):
    """Return the sha256 of all tensors of the newest checkpoint, and what two equal runs have equal in words."""
    folder = list_checkpoints(run / "checkpoints")[-1][1]
    files = sorted(folder.glob("*.safetensors"))
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return (
        hashes,
        check_checkpoint(folder).state["objective"],
        comparable(read_metrics(run / "metrics.jsonl")),
    )


def interrupt_at(monkeypatch, *steps):
    original = Trainer.train_step

    def train_step(self):
        original(self)
        if self.step in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", train_step)


# ---- hiding ------------------------------------------------------------------------------------------------------


def test_a_seventh_is_hidden_and_that_as_bert_does():
    """200,000 tokens: the shares are known to a few tenths of a per cent, the bounds are five standard errors."""
    V = 50
    ids = np.random.default_rng(0).integers(0, V, (200, 1000))
    inputs, targets = hide(ids, 1, 2, V, V)
    chosen = targets != IGNORE
    assert chosen.mean() == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / ids.size) ** 0.5)
    assert np.array_equal(targets[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    count = chosen.sum()
    assert (inputs[chosen] == V).mean() == pytest.approx(0.8, abs=5 * (0.16 / count) ** 0.5)
    other = (inputs != ids) & (inputs != V)
    # A random token is the old one once in V times.
    assert (other & chosen).sum() / count == pytest.approx(0.1 * (1 - 1 / V), abs=5 * (0.09 / count) ** 0.5)
    assert set(inputs[other]) == set(range(V))


def test_hiding_depends_on_seed_and_step_alone_and_always_hides_something():
    ids = np.arange(64).reshape(4, 16) % 7
    for seed, step in ((0, 0), (2**64 - 1, 5), (3, 2**64 - 1)):
        first, again = hide(ids, seed, step, 7, 7), hide(ids.copy(), seed, step, 7, 7)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(hide(ids, 0, 0, 7, 7)[1], hide(ids, 0, 1, 7, 7)[1])
    assert not np.array_equal(hide(ids, 0, 0, 7, 7)[1], hide(ids, 1, 0, 7, 7)[1])
    for step in range(50):
        padded = np.array([[3, IGNORE, IGNORE]])
        inputs, targets = hide(padded, 0, step, 7, 7)
        assert targets.tolist() == [[3, IGNORE, IGNORE]]
        assert inputs[0, 1:].tolist() == [0, 0]


# ---- masked runs -------------------------------------------------------------------------------------------------


def test_a_masked_run_learns_to_fill_holes_and_leaves_a_model(tmp_path, toy_encoder):
    """Runs of equal letters: a hole is what its neighbours on either side are, once in 40 times there is a doubt."""
    letters = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(letters.choice("abcdefghijklmnopqrstuvwxyz") * 40 for _ in range(400)))
    config = masked(
        text, steps=300, data__batch_size=16, optimizer__lr=1e-2, evaluation__interval=150,
        evaluation__max_tokens=0, checkpoint__interval=300,
    )  # fmt: skip
    result = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    assert first["loss"] == pytest.approx(np.log(257), abs=0.1)  # of a model that knows nothing
    assert last["loss"] < 0.5  # ln 26 = 3.3 for one that sees no neighbours
    assert last["accuracy"] > 0.9 > first["accuracy"]
    assert (result.loss, result.bits_per_byte) == (last["loss"], None)
    holes, filled = [record["text"] for record in records if record["kind"] == "sample"][-1].split("\n")
    assert len(holes) == len(filled) == 16
    assert "_" in holes
    assert len(set(filled)) == 1
    model = models.load_model(result.checkpoint)
    assert type(model) is toy_encoder.ToyEncoder
    assert model.config.vocab_size == 257


def test_the_toy_encoder_sees_both_sides(toy_encoder):
    """Otherwise the masked objective would not be tried on what it is for."""
    torch.manual_seed(0)
    model = models.build(toy_encoder.ToyConfig.tiny()).eval()
    ids = torch.arange(16)[None]
    changed = ids.clone()
    changed[0, 15] = 99
    assert not torch.equal(model(ids)[0, 0], model(changed)[0, 0])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_masked_run_resumes_bit_for_bit(text, tmp_path, monkeypatch, toy_encoder, accumulate):
    config = masked(text, model__dropout=0.2, data__accumulate=accumulate)
    pretrain(config, tmp_path / "straight", quiet=True, plot=False)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 7, 11)
        for _ in range(3):
            with pytest.raises(InterruptedTraining):
                pretrain(config, tmp_path / "broken", resume="auto", quiet=True, plot=False)
    torch.manual_seed(99)  # whatever the process did before does not matter
    pretrain(config, tmp_path / "broken", resume="auto", quiet=True, plot=False)
    assert digest(tmp_path / "broken") == digest(tmp_path / "straight")
    newest = list_checkpoints(tmp_path / "broken" / "checkpoints")[-1][1]
    assert check_checkpoint(newest).state["kind"] == "masked"


def test_parts_of_a_masked_batch_have_the_gradient_of_the_whole(text, tmp_path, toy_encoder):
    """Parts hide different numbers of tokens: their means must not count alike."""
    gradients = []
    for rows, parts in ((12, 1), (4, 3), (1, 12)):
        torch.manual_seed(0)
        config = masked(text, data__batch_size=rows, data__accumulate=parts)
        objective = objective_class("masked")(
            config, corpus_of(config, tmp_path / f"{rows}"), torch.device("cpu")
        )
        batches = objective.batches()
        assert sum(part.share for part in batches) == pytest.approx(1)
        loss = accumulate_gradients(objective.loss, batches)
        gradients.append((loss, [p.grad for p in objective.model.parameters()]))
    (whole, expected), *others = gradients
    for loss, found in others:
        torch.testing.assert_close(loss, whole)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)  # the same sum in another order


def corpus_of(config, folder):
    from portlm.train.corpus import open_corpus

    return open_corpus(config.data, folder, fresh=True, note=lambda text: None)


@pytest.mark.parametrize("family", models.DECODERS)
def test_every_family_can_be_trained_on_holes(text, tmp_path, family):
    shape = {"model.family": family, "model.n_layer": 1, "model.n_head": 2, "model.width": 16}
    config = masked(text, **{key.replace(".", "__"): value for key, value in shape.items()}, steps=2)
    assert pretrain(config, tmp_path / "run", quiet=True, plot=False).steps == 2


def test_a_run_cannot_change_its_objective(text, tmp_path):
    config = masked(text, model__family="gpt2", steps=2)
    pretrain(config, tmp_path / "run", quiet=True, plot=False)
    other = dataclasses.replace(config, objective="causal")
    with pytest.raises(ConfigError, match="objective is 'masked' in the checkpoint and 'causal' now"):
        pretrain(other, tmp_path / "run", resume="auto", quiet=True, plot=False)


def test_every_objective_of_the_table_has_the_name_it_is_listed_under():
    assert {name: objective_class(name).kind for name in OBJECTIVES} == {name: name for name in OBJECTIVES}


# ---- a run from before there were objectives ---------------------------------------------------------------------


def test_a_run_that_an_earlier_version_began_is_continued(tmp_path):
    """Saved by version 0.1.0 at step 4 of 8; the rest of metrics.jsonl is what it went on to do.

    Another processor rounds differently, which four steps at a small learning rate hardly multiply.
    """
    run = tmp_path / "run"
    shutil.copytree(DATA / "run-1", run)
    expected = [record for record in read_metrics(run / "metrics.jsonl") if record["step"] > 4]
    config = settings.load(PretrainConfig, file=run / "config.toml")
    assert config.objective == "causal"
    result = pretrain(config, run, resume="auto", quiet=True, plot=False)
    found = [record for record in read_metrics(run / "metrics.jsonl") if record["step"] > 4]
    assert [record["kind"] for record in found] == [record["kind"] for record in expected]
    for new, old in zip(found, expected, strict=True):
        for key in {"loss", "bits_per_byte", "grad_norm", "lr"} & old.keys():
            assert new[key] == pytest.approx(old[key], rel=1e-4), key
    assert result.steps == 8
    assert sorted(
        path.name for path in run.glob("checkpoints/step-*/*.json") if path.name.endswith("t.json")
    ) == [
        "checkpoint.json",
        "manifest.json",
    ]


def test_a_checkpoint_whose_state_says_nothing_of_the_batches_is_refused(text, tmp_path):
    objective = objective_class("causal")
    config = masked(text, objective="causal", model__family="gpt2")
    made = objective(config, corpus_of(config, tmp_path / "data"), torch.device("cpu"))
    made.save(tmp_path / "model")
    state, tensors = made.state()
    made.restore(tmp_path / "model", state, tensors)
    for damage in ({"sampler": None}, {"sampler": {"step": "x"}}):
        with pytest.raises(FormatError, match="sampler"):
            made.restore(tmp_path / "model", {**state, **damage}, tensors)
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        made.restore(tmp_path / "model", {**state, "data": None}, tensors)


# ---- what later objectives need ----------------------------------------------------------------------------------


class RolloutObjective:
    """A stranger of PPO's kind: two trained models and a frozen one, its own samples used for three steps, figures."""

    kind = "rollout"
    tokens_per_step = 8

    def __init__(self, start):
        self.model = torch.nn.ModuleDict({"policy": torch.nn.Linear(4, 4), "value": torch.nn.Linear(4, 1)})
        self.reference = torch.nn.Linear(4, 4)
        self.samples = torch.zeros(0, 8, 4)
        self.rollouts = self.unsaid = 0
        self.distance = 0.0

    def facts(self):
        return {}

    def batches(self):
        if not len(self.samples):
            with torch.no_grad():
                noise = torch.randn(3, 8, 4)  # from the generator that checkpoints hold
                self.samples = self.model["policy"](noise) + noise
            self.rollouts += 1
        batch, self.samples = self.samples[0], self.samples[1:]
        return [(part, 0.5) for part in batch.chunk(2)]

    def loss(self, batch):
        x, weight = batch
        apart = (self.model["policy"](x) - self.reference(x)).pow(2).mean()
        self.distance += weight * float(apart.detach())
        self.unsaid += 1
        return weight * (apart + self.model["value"](x).pow(2).mean())

    def metrics(self):
        found = {"distance": 2 * self.distance / self.unsaid, "rollouts": self.rollouts}
        self.distance, self.unsaid = 0.0, 0
        return found

    def evaluate(self, stop):
        return {"loss": float(self.model["policy"](torch.ones(4)).sum().detach())}

    def sample(self, stop):
        return None

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        save_tensors(folder / "model.safetensors", self.model.state_dict())

    def state(self):
        own = {"rollouts": self.rollouts, "unsaid": self.unsaid, "distance": self.distance}
        return own, {"samples": self.samples.contiguous()} | {
            f"reference.{name}": tensor for name, tensor in self.reference.state_dict().items()
        }

    def restore(self, folder, state, tensors):
        self.model.load_state_dict(load_torch(folder / "model.safetensors"))
        self.reference.load_state_dict(
            {name.removeprefix("reference."): t for name, t in tensors.items() if name != "samples"}
        )
        self.samples = tensors["samples"]
        self.rollouts, self.unsaid, self.distance = (state[key] for key in ("rollouts", "unsaid", "distance"))


def test_an_objective_with_several_models_and_its_own_samples_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Interrupted in the middle of a rollout and of a line of metrics."""
    config = settings.load(
        RunConfig, overrides=["steps=13", "log_interval=4", "evaluation.interval=5", "checkpoint.interval=6"]
    )
    options = {"quiet": True, "plot": False}
    done = train(config, tmp_path / "straight", RolloutObjective, **options)
    assert (done.parameters, done.tokens) == (4 * 4 + 4 + 4 + 1, 13 * 8)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 5, 11)
        for _ in range(3):
            with pytest.raises(InterruptedTraining):
                train(config, tmp_path / "broken", RolloutObjective, resume="auto", **options)
    train(config, tmp_path / "broken", RolloutObjective, resume="auto", **options)
    assert digest(tmp_path / "broken") == digest(tmp_path / "straight")
    lines = [r for r in read_metrics(tmp_path / "broken" / "metrics.jsonl") if r["kind"] == "train"]
    assert [line["rollouts"] for line in lines] == [2, 3, 4, 5]
    assert all(line["distance"] > 0 for line in lines)


def test_a_run_of_another_kind_is_refused(tmp_path):
    config = settings.load(RunConfig, overrides=["steps=2"])
    train(config, tmp_path / "run", RolloutObjective, quiet=True, plot=False)

    class Other(RolloutObjective):
        kind = "other"

    with pytest.raises(ConfigError, match="of a run of kind rollout, this one is of kind other"):
        train(config, tmp_path / "run", Other, resume="auto", quiet=True, plot=False)
