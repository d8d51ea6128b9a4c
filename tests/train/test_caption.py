"""The objective of pictures and captions: what is predicted, and runs that learn, go on and begin with a checkpoint."""

import dataclasses
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
Image = pytest.importorskip("PIL.Image", reason="Pillow is missing: pip install portlm[image]")

from click.testing import CliRunner  # noqa: E402

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.commands.generate import command  # noqa: E402
from portlm.errors import ConfigError, UsageError  # noqa: E402
from portlm.models import load_model  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.objectives.caption import CaptionObjective, open_captions  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture
def captions(tmp_path):
    """A table of pictures of one colour each, and its names."""
    lines = []
    for i in range(40):
        name = list(COLOURS)[i % 4]
        shade = np.random.default_rng(i).uniform(0.6, 1.0)
        Image.fromarray(np.full((9, 8, 3), np.array(COLOURS[name]) * shade, np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        lines.append(f"{i}.png\t{name}\n" if i % 2 else f"{i}.png\tcolour?\t{name}\n")
    (tmp_path / "captions.tsv").write_text("".join(lines))
    return tmp_path / "captions.tsv"


def config_of(captions, **more):
    values = {
        "objective": "caption", "data.texts": [str(captions)], "model.family": "llava", "model.n_layer": 1,
        "model.n_head": 2, "model.width": 32, "model.context_length": 24, "model.image_size": 8,
        "model.patch_size": 4, "model.vision_layers": 1, "model.vision_heads": 2, "model.vision_width": 16,
        "data.batch_size": 8, "steps": 4, "evaluation.interval": 2, "evaluation.sample_tokens": 6,
        "checkpoint.interval": 2, "threads": 1, **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return settings.load(PretrainConfig, overrides=[(key, v) for key, v in values.items() if v is not None])


def objective_of(config, folder):
    corpus = open_captions(config.data, folder, fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return CaptionObjective(config, corpus, torch.device("cpu"))


def test_the_text_and_its_end_are_predicted_and_nothing_else(captions, tmp_path):
    objective = objective_of(config_of(captions), tmp_path / "run")
    places, end = objective.model.config.places, objective.end
    pair = next(pair for pair in objective.pairs if pair.prompt)
    (part,) = [objective.part([pair], len(pair.text) + 1)]
    read, targets = part.read[0].tolist(), part.targets[0].tolist()
    assert read == [objective.image] * places + pair.prompt + pair.text
    assert targets == [-100] * (places + len(pair.prompt) - 1) + pair.text + [end]
    assert part.share == 1
    assert part.pixels.shape == (1, 3, 8, 8)


def test_parts_add_up_to_the_whole_batch(captions, tmp_path):
    whole = objective_of(config_of(captions), tmp_path / "a")
    parts = objective_of(config_of(captions, data__batch_size=4, data__accumulate=2), tmp_path / "b")
    losses = [sum(objective.loss(part) for part in objective.batches()) for objective in (whole, parts)]
    # A mean over 8 rows in float32, added in another order.
    assert abs(losses[0] - losses[1]) <= 1e-5


def test_a_run_learns_what_pictures_show_and_a_session_says_it(captions, tmp_path):
    """40 pictures of four colours; the four that are judged were not learned from."""
    done = pretrain(config_of(captions, steps=300, optimizer__lr=5e-3, evaluation__interval=300), tmp_path / "run",
                    quiet=True, plot=False)  # fmt: skip
    assert done.loss < 0.1  # unseen, the choice of a colour alone would be 1.39 nats in 5 tokens
    with portlm.load(done.checkpoint) as session:
        pictures = [captions.parent / f"{i}.png" for i in range(36, 40)]
        prompts = ["<image>colour?" if i % 2 == 0 else "<image>" for i in range(36, 40)]
        found = [result.text for result in session.generate(prompts, image=pictures, max_new_tokens=8)]
        assert found == list(COLOURS)
        with pytest.raises(
            UsageError, match="the prompt has a place for a picture, <image>, and none is shown"
        ):
            session.generate("<image>")
        with pytest.raises(UsageError, match="the prompt has no place for its picture: write <image> once"):
            session.generate("colour?", image=pictures[0])
        assert session.score("red").total < 0  # of a text without a picture
    said = CliRunner().invoke(command, [str(done.checkpoint), "<image>colour?", "--image", str(pictures[0])])
    assert (said.exit_code, said.stdout) == (0, "red\n")


def test_a_resumed_run_repeats_the_uninterrupted_one_and_knows_its_pictures(captions, tmp_path):
    whole = pretrain(config_of(captions), tmp_path / "whole", quiet=True, plot=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)  # the second half did not happen
    again = pretrain(config_of(captions), tmp_path / "cut", resume="auto", quiet=True, plot=False)
    assert again.loss == whole.loss
    one, other = (load_model(done.checkpoint).state_dict() for done in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(captions.parent / "3.png")
    with pytest.raises(ConfigError, match="the pairs are not those of the checkpoint"):
        pretrain(config_of(captions), tmp_path / "cut", resume="auto", quiet=True, plot=False)


def test_a_run_that_begins_with_a_checkpoint_goes_on_from_its_weights(captions, tmp_path):
    done = pretrain(config_of(captions), tmp_path / "a", quiet=True, plot=False)
    config = settings.load(PretrainConfig, overrides=[
        ("objective", "caption"), ("data.texts", [str(captions)]), ("init", str(done.checkpoint)), ("steps", 2),
        ("data.batch_size", 8),
    ])  # fmt: skip
    data = dataclasses.replace(config.data, tokenizer=str(done.checkpoint / "tokenizer.json"))
    corpus = open_captions(data, tmp_path / "b", fresh=True, note=lambda text: None)
    begun = CaptionObjective(config, corpus, torch.device("cpu")).model.state_dict()
    assert all(
        torch.equal(begun[name], value) for name, value in load_model(done.checkpoint).state_dict().items()
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": "causal"}, "objective causal is not for the family llava: set objective = caption"),
        ({"model__image_size": 9}, "image_size 9 must be a multiple of patch_size 4"),
        ({"model__vision_heads": 3}, "vision width 16 must be a multiple of n_head 3"),
        ({"model__context_length": 4}, "context_length 4 leaves no room for a text behind the 4 places"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(captions, change, words):
    with pytest.raises(ConfigError, match=words):
        config_of(captions, **change)


def test_a_family_that_sees_no_pictures_is_refused(captions, tmp_path):
    with pytest.raises(
        ConfigError, match=r"objective caption is not for the family gpt2: set model\.family = llava"
    ):
        settings.load(PretrainConfig, overrides=[("objective", "caption")])
    from portlm.models import FAMILIES, build, save_model

    save_model(tmp_path / "gpt2", build(FAMILIES["gpt2"].config_class().tiny()))
    config = settings.load(PretrainConfig, overrides=[("objective", "caption"), ("init", str(tmp_path / "gpt2")),
                                                      ("data.texts", [str(captions)])])  # fmt: skip
    with pytest.raises(ConfigError, match="init is a gpt2, which sees no pictures"):
        objective_of(config, tmp_path / "run")
