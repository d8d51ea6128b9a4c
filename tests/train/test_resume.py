"""Resuming: bit for bit, from whatever an interruption or a user left behind."""

import dataclasses
import os
import random
import signal

import pytest

torch = pytest.importorskip("torch")

from tiny_runs import crash, digest, newest, pretrain, stop_at, tiny, told  # noqa: E402

from portlm.errors import ConfigError, FormatError, UsageError  # noqa: E402
from portlm.train.checkpoint import check_checkpoint, list_checkpoints  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("dropout", "accumulate", "precision", "optimizer"),
    [
        (0.0, 1, "fp32", "adamw"),
        (0.0, 2, "fp32", "adamw"),
        (0.2, 1, "fp32", "adamw"),
        (0.2, 2, "fp32", "adamw"),
        (0.2, 2, "bf16", "adamw"),
        (0.0, 1, "fp32", "muon"),
        (0.2, 2, "bf16", "muon"),
    ],
)
def test_a_run_resumed_at_random_steps_is_the_uninterrupted_one_bit_for_bit(
    text, tmp_path, monkeypatch, dropout, accumulate, precision, optimizer
):
    """Weights, moments, random state and every line of metrics but the clock's."""
    config = tiny(
        text,
        model__dropout=dropout,
        data__accumulate=accumulate,
        precision=precision,
        optimizer__name=optimizer,
    )
    straight = pretrain(config, tmp_path / "straight", quiet=True)
    broken = tmp_path / "broken"
    for step in sorted(random.Random(f"{dropout} {accumulate}").sample(range(1, 12), 3)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(InterruptedTraining, match=f"after step {step} of 12") as caught:
                pretrain(config, broken, resume="auto", quiet=True)
        assert caught.value.exit_code == 143
        assert check_checkpoint(newest(broken)).step == step
    torch.manual_seed(99)  # whatever the process did before does not matter
    resumed = pretrain(config, broken, resume="auto", quiet=True)
    assert digest(newest(broken)) == digest(newest(straight.run))
    assert told(broken) == told(straight.run)
    assert (resumed.loss, resumed.bits_per_byte) == (straight.loss, straight.bits_per_byte)
    assert (
        check_checkpoint(newest(broken)).state["objective"]
        == check_checkpoint(newest(straight.run)).state["objective"]
    )


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon"), ("bf16", "muon")]
)
def test_two_threads_resume_bit_for_bit_as_well(text, tmp_path, monkeypatch, precision, optimizer):
    """Large enough that every kernel divides its work."""
    config = tiny(
        text,
        precision=precision,
        optimizer__name=optimizer,
        threads=2,
        steps=6,
        model__width=64,
        model__context_length=64,
        data__batch_size=8,
        model__dropout=0.1,
    )
    straight = pretrain(config, tmp_path / "straight", quiet=True)
    crash(monkeypatch, config, tmp_path / "run", 5)
    pretrain(config, tmp_path / "run", resume="auto", quiet=True)
    assert digest(newest(tmp_path / "run")) == digest(newest(straight.run))


@pytest.mark.parametrize("step", [6, 12])
def test_a_signal_before_an_evaluation_puts_it_off_until_the_resume(text, tmp_path, monkeypatch, step):
    """Evaluating may take minutes; stopping must not. 12 is the last step."""
    straight = pretrain(tiny(text), tmp_path / "straight", quiet=True)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(InterruptedTraining) as caught:
            pretrain(tiny(text), run, quiet=True)
    assert caught.value.exit_code == 130
    assert not (run / "final").exists()
    assert [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "eval" and r["step"] == step] == []
    for _ in range(2):
        resumed = pretrain(tiny(text), run, resume="auto", quiet=True)
        assert resumed.loss == straight.loss
        assert told(run) == told(straight.run)


def test_a_crash_loses_at_most_the_steps_since_the_last_checkpoint(text, tmp_path, monkeypatch):
    straight = pretrain(tiny(text), tmp_path / "straight", quiet=True)
    run = tmp_path / "run"
    crash(monkeypatch, tiny(text), run, 7)
    assert newest(run).name == "step-4"
    pretrain(tiny(text), run, resume="auto", quiet=True)
    assert digest(newest(run)) == digest(newest(straight.run))
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == [3, 6, 9, 12]


def test_resuming_a_finished_run_only_repeats_its_result(text, tmp_path):
    first = pretrain(tiny(text), tmp_path / "run", quiet=True)
    before = digest(newest(first.run))
    again = pretrain(tiny(text), tmp_path / "run", resume="auto", quiet=True)
    assert dataclasses.replace(again, seconds=0, tokens_per_second=0) == dataclasses.replace(
        first, seconds=0, tokens_per_second=0
    )
    assert digest(newest(first.run)) == before


def test_a_damaged_newest_checkpoint_is_reported_kept_and_not_used(text, tmp_path, monkeypatch, capsys):
    straight = pretrain(tiny(text), tmp_path / "straight", quiet=True)
    run = tmp_path / "run"
    crash(monkeypatch, tiny(text), run, 10)
    damaged = newest(run) / "optimizer.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-5] ^= 4
    damaged.write_bytes(raw)
    pretrain(tiny(text), run, resume="auto", quiet=True)
    said = capsys.readouterr().err
    assert "step-8 is damaged" in said
    assert "optimizer.safetensors was altered" in said
    assert (run / "checkpoints" / "step-8.aside" / "optimizer.safetensors").read_bytes() == raw
    assert digest(newest(run)) == digest(newest(straight.run))


def test_with_no_intact_checkpoint_resuming_stops(text, tmp_path):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    for _, folder in list_checkpoints(run / "checkpoints"):
        (folder / "checkpoint.json").unlink()
    with pytest.raises(FormatError, match="none of the 2 checkpoints"):
        pretrain(tiny(text), run, resume="auto", quiet=True)
    assert len(list_checkpoints(run / "checkpoints")) == 2


def test_resuming_from_an_earlier_checkpoint_keeps_the_later_ones(text, tmp_path):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    expected = digest(newest(run))
    pretrain(tiny(text), run, resume=str(run / "checkpoints" / "step-8"), quiet=True)
    assert digest(newest(run)) == expected
    assert check_checkpoint(run / "checkpoints" / "step-12.aside").step == 12


def test_another_run_can_be_continued_in_a_new_folder(text, tmp_path):
    first = pretrain(tiny(text), tmp_path / "run", quiet=True)
    longer = tiny(text, steps=16)
    for number, source in enumerate((first.run, first.run / "checkpoints", newest(first.run))):
        result = pretrain(longer, tmp_path / f"more-{number}", resume=str(source), quiet=True)
        assert result.steps == 16
    with pytest.raises(UsageError, match="another run"):
        pretrain(longer, tmp_path / "more-0", resume=str(first.run), quiet=True)


def test_a_second_run_does_not_overwrite_the_first(text, tmp_path):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    with pytest.raises(UsageError, match="--resume auto"):
        pretrain(tiny(text), run, quiet=True)


@pytest.mark.parametrize(
    "change",
    ["model.width=32", "data.batch_size=2", "seed=4", "data.tokenizer=bpe:280", "optimizer.name=muon"],
)
def test_a_setting_that_decides_the_run_cannot_change_on_resume(text, tmp_path, change):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    with pytest.raises(ConfigError, match=change.partition("=")[0]):
        pretrain(tiny(text, change), run, resume="auto", quiet=True)


def test_other_settings_may_change_on_resume_and_are_reported(text, tmp_path, capsys):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    assert pretrain(tiny(text, steps=14, optimizer__lr=5e-4), run, resume="auto").steps == 14
    assert "optimizer.lr = 0.0005 instead of 0.001" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="14 steps already"):
        pretrain(tiny(text, steps=5), run, resume="auto", quiet=True)


@pytest.mark.parametrize("name", ["step-500", "step-5"])
def test_a_run_goes_on_from_its_newest_checkpoint_under_another_number(text, tmp_path, monkeypatch, name):
    straight = pretrain(tiny(text), tmp_path / "straight", quiet=True)
    for number, resume in enumerate(("auto", f"checkpoints/{name}")):
        run = tmp_path / str(number)
        crash(monkeypatch, tiny(text), run, 10)
        newest(run).rename(run / "checkpoints" / name)
        resume = resume if resume == "auto" else str(run / resume)
        pretrain(tiny(text), run, resume=resume, quiet=True)
        assert digest(newest(run)) == digest(newest(straight.run))
        assert told(run) == told(straight.run)


def test_a_run_whose_checkpoints_were_all_renamed_is_not_begun_anew(text, tmp_path, monkeypatch):
    straight = pretrain(tiny(text), tmp_path / "straight", quiet=True)
    run = tmp_path / "run"
    crash(monkeypatch, tiny(text), run, 6)
    best = newest(run).rename(run / "checkpoints" / "best")
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"--resume .*best"):
        pretrain(tiny(text), run, resume="auto", quiet=True)
    with pytest.raises(UsageError, match="holds a run already"):
        pretrain(tiny(text), run, quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    pretrain(tiny(text), run, resume=str(best), quiet=True)
    assert digest(newest(run)) == digest(newest(straight.run))
