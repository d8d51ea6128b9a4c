"""The mean of checkpoints is the mean of their weights, is a checkpoint itself, and is made of one model alone."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from click.testing import CliRunner
from tiny_runs import TEXT, pretrain, tiny

import portlm
from portlm.cli import cli
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.models import FAMILIES, build, load_config, save_model, write_config
from portlm.models.gpt2 import GPT2Config
from portlm.train.average import average, last_checkpoints
from portlm.weights import load_numpy, save_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose three checkpoints, of steps 4, 8 and 12, are all kept."""
    folder = tmp_path_factory.mktemp("average")
    text = folder / "text.txt"
    text.write_text(TEXT)
    pretrain(tiny(text, checkpoint__keep=3), folder / "run", quiet=True)
    return folder / "run"


def weights(folder):
    return {name: np.array(array) for name, array in load_numpy(folder / "model.safetensors").items()}


def test_every_weight_is_the_mean_and_all_else_is_as_in_the_last(run, tmp_path):
    checkpoints = last_checkpoints(run, 3)
    assert [path.name for path in checkpoints] == ["step-4", "step-8", "step-12"]
    made = average(checkpoints, tmp_path / "mean")
    each = [weights(path) for path in checkpoints]
    found = weights(made)
    assert found.keys() == each[0].keys()
    for name, array in found.items():
        expected = np.mean([one[name].astype(np.float64) for one in each], axis=0)
        assert np.array_equal(array, expected.astype(np.float32)), name
        assert not np.array_equal(array, each[-1][name]), name
    rest = {path.name for path in made.iterdir()} - {"model.safetensors"}
    assert rest == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in rest:
        assert (made / name).read_bytes() == (checkpoints[-1] / name).read_bytes()
    with portlm.load(made, engine="torch") as session:
        assert session.generate("9 bottles", max_new_tokens=3, temperature=0).token_ids


def test_weights_are_added_in_64_bits(tmp_path):
    """1, 2^-24 and -1: in float32 the second one is lost in the first sum."""
    model = build(GPT2Config.tiny())
    for number, value in enumerate((1.0, 2.0**-24, -1.0)):
        for parameter in model.parameters():
            parameter.data.fill_(value)
        save_model(tmp_path / str(number), model)
    made = average([tmp_path / str(number) for number in range(3)], tmp_path / "mean")
    assert all((array == np.float32(2.0**-24 / 3)).all() for array in weights(made).values())


def test_a_run_is_averaged_by_the_command_line(run, tmp_path):
    out = tmp_path / "mean"
    result = CliRunner().invoke(cli, ["average", str(run), "--last", "2", "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == {"checkpoint": str(out), "averaged": [str(path) for path in last_checkpoints(run, 2)]}
    by_name = average(last_checkpoints(run, 2), tmp_path / "by_name")
    assert weights(out).keys() == weights(by_name).keys()
    assert all(np.array_equal(array, weights(by_name)[name]) for name, array in weights(out).items())


def test_too_few_and_twice_the_same_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match=r"has 3 checkpoints, not 5: train with --set checkpoint.keep=5"):
        last_checkpoints(run, 5)
    last = last_checkpoints(run, 2)[-1]
    with pytest.raises(UsageError, match="at least two checkpoints, got 1"):
        average([last], tmp_path / "mean")
    with pytest.raises(UsageError, match="named twice"):
        average([last, last.parent / "." / last.name], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_nothing_that_exists_is_written_over(run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already and is left alone"):
        average(last_checkpoints(run, 2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_checkpoints_of_two_models_have_no_mean(run, tmp_path):
    first, last = last_checkpoints(run, 2)
    other = shutil.copytree(first, tmp_path / "other")
    (other / "checkpoint.json").unlink()
    config = load_config(first)
    write_config(other, dataclasses.replace(config, context_length=config.context_length + 1))
    with pytest.raises(ConfigError, match=r"are not of one model: their config\.json say other things"):
        average([other, last], tmp_path / "mean")
    write_config(other, config)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ConfigError, match="have not the same tokenizer"):
        average([other, last], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    first, last = last_checkpoints(run, 2)
    damaged = shutil.copytree(first, tmp_path / "step-8")
    tensors = weights(damaged)
    save_tensors(damaged / "model.safetensors", {name: array * 2 for name, array in tensors.items()})
    with pytest.raises(FormatError, match="step-8"):
        average([damaged, last], tmp_path / "mean")


def test_whole_numbers_have_no_mean(tmp_path):
    for name in ("one", "other"):
        save_model(tmp_path / name, build(FAMILIES["ngram"].config_class().tiny()))
    with pytest.raises(ConfigError, match=r"has no mean: .* of a model of family ngram are whole numbers"):
        average([tmp_path / "one", tmp_path / "other"], tmp_path / "mean")


def test_last_is_for_a_run_alone(run, tmp_path):
    first, last = map(str, last_checkpoints(run, 2))
    result = CliRunner().invoke(cli, ["average", first, last, "--last", "2", "-o", str(tmp_path / "mean")])
    assert result.exit_code != 0
    assert "--last is for one RUN" in str(result.exception)
