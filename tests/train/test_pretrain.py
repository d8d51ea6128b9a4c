"""Pretraining: it learns, and whatever stops it leaves a good checkpoint."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402
from tiny_runs import TEXT, crash, digest, newest, pretrain, pretrain_and_plot, stop_at, tiny  # noqa: E402

import portlm  # noqa: E402
from portlm import models, settings  # noqa: E402
from portlm.commands.pretrain import command  # noqa: E402
from portlm.data.batches import BatchSampler  # noqa: E402
from portlm.data.shards import TokenShards, prepare  # noqa: E402
from portlm.errors import (  # noqa: E402
    ConfigError,
    ContextLengthError,
    DivergenceError,
    FormatError,
    StorageError,
    UsageError,
)
from portlm.runtimes.decoding import Decoding  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402
from portlm.train.checkpoint import FileOps, check_checkpoint  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.evaluation import HeldOut, evaluate, sample  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.loop import Trainer, accumulate_gradients  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.run_folder import RunFolder  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- learning ----------------------------------------------------------------------------------------------------


def test_it_learns_and_leaves_a_complete_run(text, tmp_path):
    config = tiny(text, steps=200, optimizer__lr=1e-2, evaluation__interval=100, checkpoint__interval=100)
    result = pretrain(config, tmp_path / "run", quiet=True)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[0] > 4.0  # ln 256 = 5.5 for a model that knows nothing
    assert losses[-1] < 2.2
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 100, 200]
    assert [record["step"] for record in records if record["kind"] == "sample"] == [100, 200]
    assert settings.load(PretrainConfig, file=tmp_path / "run" / "config.toml") == config
    assert result.checkpoint == tmp_path / "run" / "final"
    assert result.steps == 200
    assert result.tokens == 200 * 4 * 16
    assert not (result.checkpoint / "optimizer.safetensors").exists()
    model = models.load_model(result.checkpoint)
    assert model.num_parameters() == result.parameters
    for name, weight in models.load_model(newest(tmp_path / "run")).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert not list((tmp_path / "run").glob("loss.*"))


def test_the_loss_curve_is_drawn_also_when_the_run_is_interrupted(text, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    stop_at(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(InterruptedTraining):
        pretrain_and_plot(tiny(text), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "loss.svg").exists()
    assert (tmp_path / "run" / "loss.png").exists()


def test_every_step_is_that_of_plain_pytorch_in_float64(text, tmp_path):
    """Loss, gradient norm and learning rate of each step, against PyTorch's own optimiser and clipping.

    float32 keeps 6e-8 per operation; a dozen steps through Adam's division multiply that a few hundred times.
    """
    config = tiny(text, log_interval=1, optimizer__clip=0.5, optimizer__lr=3e-3, schedule__warmup=3)
    run = pretrain(config, tmp_path / "run", quiet=True).run
    torch.manual_seed(config.seed)
    model = models.build(tiny_model()).double()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
    sampler = BatchSampler(TokenShards.open(run / "data" / "train"), 4, 16, config.seed)
    rates = [1e-3, 2e-3, 3e-3] + [1e-4 + 2.9e-3 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(1, 10)]
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    for step, (rate, record) in enumerate(zip(rates, records, strict=True)):
        inputs, targets = map(torch.from_numpy, sampler.batch(step))
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert math.isclose(record["lr"], rate, rel_tol=1e-12)
        assert math.isclose(record["loss"], loss.item(), rel_tol=2e-5), step
        assert math.isclose(record["grad_norm"], norm.item(), rel_tol=2e-4), step


def test_bits_per_byte_is_the_held_out_likelihood_in_bits_over_the_bytes(text, tmp_path):
    """Recomputed from the logits in float64, over the whole held-out tenth, independently of the windows' code."""
    result = pretrain(tiny(text, evaluation__max_tokens=0), tmp_path / "run", quiet=True)
    raw = TEXT.encode()
    cut = len(raw) - int(len(raw) * 0.1)
    assert raw[cut] & 0xC0 != 0x80, "the text above happens to be cut between characters"
    held_out, T = raw[cut:], 16
    model = models.load_model(result.checkpoint)
    total = 0.0
    for start in range(0, len(held_out), T):
        window = raw[cut + start - 1 : cut + min(start + T, len(held_out))]
        logits = model(torch.tensor([list(window[:-1])])).double()
        total -= torch.log_softmax(logits[0], -1)[range(len(window) - 1), list(window[1:])].sum().item()
    # The trainer adds float32 means of 64 tokens each: a relative error of a few 2^-24.
    assert math.isclose(result.bits_per_byte, total / math.log(2) / len(held_out), rel_tol=1e-5)
    assert math.isclose(result.loss, total / len(held_out), rel_tol=1e-5)


def test_a_part_of_the_held_out_text_counts_its_own_bytes():
    """One byte is one token here, so nats per token and bits per byte differ by ln 2 and nothing else."""
    model = models.build(tiny_model())
    ids = torch.randint(0, 256, (100,)).numpy()
    for count in (1, 15, 16, 17, 99):
        got = evaluate(model, HeldOut(ids[:count], 7, count), 3, torch.device("cpu"))
        assert math.isclose(got.bits_per_byte, got.loss / math.log(2), rel_tol=1e-12)


def tiny_model():
    from portlm.models.gpt2 import GPT2Config

    return GPT2Config(vocab_size=256, context_length=16, n_layer=1, n_head=2, width=16)


@pytest.mark.parametrize("passes", [2, 3, 6])
def test_accumulating_gives_the_gradient_of_the_whole_batch(passes):
    """The sums are the same numbers in another order: float32 keeps 2^-24 of the largest term each time."""
    torch.manual_seed(0)
    model = models.build(tiny_model())
    inputs, targets = torch.randint(0, 256, (2, 6, 16))
    loss = accumulate_gradients(lambda batch: model(*batch), [(inputs, targets)])
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pairs = list(zip(inputs.chunk(passes), targets.chunk(passes), strict=True))
    parts = accumulate_gradients(lambda batch: model(*batch) / passes, pairs)
    assert math.isclose(loss.item(), parts.item(), rel_tol=1e-6)
    for name, parameter in model.named_parameters():
        bound = 1e-5 * whole[name].abs().max().item()
        assert (parameter.grad - whole[name]).abs().max().item() <= bound, name


def test_a_checkpoint_of_an_unfinished_run_can_be_used_as_a_model(text, tmp_path, monkeypatch):
    crash(monkeypatch, tiny(text), tmp_path / "run", 7)
    folder = newest(tmp_path / "run")
    with portlm.load(folder, engine="torch") as session:
        assert session.generate("9", max_new_tokens=3).text
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"model\.safetensors has 0 bytes"):
        portlm.load(folder, engine="torch")


def test_the_llama_family_and_a_trained_tokenizer_work(text, tmp_path):
    config = tiny(
        text, model__family="llama", model__n_kv_head=1, data__tokenizer="bpe:280", evaluation__prompt="1"
    )
    result = pretrain(config, tmp_path / "run", quiet=True)
    assert json.loads((result.checkpoint / "config.json").read_text())["vocab_size"] == 280
    assert result.bits_per_byte < result.loss / math.log(2)  # tokens are longer than a byte


def test_a_run_on_whole_words_makes_its_vocabulary_and_resumes(tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("one two three four five six seven eight nine ten " * 120)
    config = tiny(text, data__tokenizer="word:11", model__context_length=8, evaluation__prompt="one")
    result = pretrain(config, tmp_path / "run", quiet=True)
    with portlm.load(result.checkpoint, engine="torch") as session:
        assert session.tokenizer.encode("nine eleven") == [session.tokenizer.encode("nine")[0], 0]
        assert {*session.generate("one", max_new_tokens=5).text.split()} <= {*text.read_text().split()}
    assert pretrain(tiny(text, **{"data__tokenizer": "word:11", "model__context_length": 8, "evaluation__prompt": "one",
                                  "steps": 32}), tmp_path / "run", resume="auto", quiet=True).steps == 32  # fmt: skip


def test_prepared_shards_are_read_in_place(text, tmp_path):
    prepare(TEXT, byte_tokenizer(), tmp_path / "shards")
    from_text = pretrain(tiny(text), tmp_path / "a", quiet=True)
    from_shards = pretrain(tiny(tmp_path / "shards"), tmp_path / "b", quiet=True)
    assert digest(newest(from_text.run)) == digest(newest(from_shards.run))
    assert not (tmp_path / "b" / "data").exists()


def test_a_sample_outgrows_the_context_and_draws_no_random_number_of_pytorch():
    model, tokenizer = models.build(tiny_model()), byte_tokenizer()
    before = torch.get_rng_state()
    model.train()
    first = sample(model, tokenizer, "abc", Decoding(max_new_tokens=50, temperature=0.8, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert first == sample(model, tokenizer, "abc", Decoding(max_new_tokens=50, temperature=0.8, seed=3))
    assert first != sample(model, tokenizer, "abc", Decoding(max_new_tokens=50, temperature=0.8, seed=4))
    assert first.startswith("abc")
    greedy = sample(model, tokenizer, "a" * 15, Decoding(max_new_tokens=1))
    model.eval()
    assert greedy[15:] == tokenizer.decode([int(model(torch.tensor([[97] * 15]))[0, -1].argmax())])


# ---- what stops a run --------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    text, tmp_path, monkeypatch
):
    run = tmp_path / "run"

    def poison():
        for trainer in trainers:
            with torch.no_grad():
                next(trainer.objective.model.parameters()).fill_(float("nan"))

    trainers = []
    original = Trainer.__init__

    def remember(self, *args):
        original(self, *args)
        trainers.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", remember)
        stop_at(patch, 6, poison)
        with pytest.raises(DivergenceError, match=r"nan at step 7: .*step-4") as caught:
            pretrain(tiny(text, evaluation__interval=100), run, quiet=True)
    assert caught.value.exit_code == 1
    assert check_checkpoint(newest(run)).step == 4
    weights = models.load_model(newest(run)).state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert pretrain(tiny(text), run, resume="auto", quiet=True).steps == 12


@pytest.mark.parametrize("operation", ["write_file", "fill", "rename"])
def test_a_full_disk_stops_the_run_with_one_line_and_keeps_the_last_checkpoint(
    text, tmp_path, monkeypatch, operation
):
    run = tmp_path / "run"
    real = getattr(FileOps, operation)

    def full(self, path, *rest):
        if "step-8" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(FileOps, operation, full)
        with pytest.raises(StorageError, match=r"step-8.*No space left.*intact.*free some space") as caught:
            pretrain(tiny(text), run, quiet=True)
    assert "\n" not in str(caught.value)
    assert check_checkpoint(newest(run)).step == 4
    assert pretrain(tiny(text), run, resume="auto", quiet=True).steps == 12


def test_a_vocabulary_larger_than_the_text_is_refused_in_one_line(text, tmp_path):
    with pytest.raises(UsageError, match="more than this text supports") as caught:
        pretrain(tiny(text, data__tokenizer="bpe:30000"), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)


def test_too_little_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(UsageError) as caught:
        pretrain(tiny(tmp_path / "short.txt"), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    (tmp_path / "short.txt").write_text("abcdefghijklm")
    with pytest.raises(UsageError, match="17"):
        pretrain(tiny(tmp_path / "short.txt"), tmp_path / "run", quiet=True)


def test_no_text_a_missing_text_and_a_long_prompt_are_refused(text, tmp_path):
    with pytest.raises(UsageError, match="no text"):
        pretrain(tiny(text, data__texts=[]), tmp_path / "a", quiet=True)
    with pytest.raises(FormatError, match="absent"):
        pretrain(tiny(tmp_path / "absent.txt"), tmp_path / "b", quiet=True)
    with pytest.raises(ContextLengthError, match="prompt"):
        pretrain(tiny(text, evaluation__prompt="x" * 17), tmp_path / "c", quiet=True)


def test_two_processes_cannot_train_in_one_folder(text, tmp_path):
    with RunFolder(tmp_path / "run").locked(), pytest.raises(UsageError, match="another process"):
        pretrain(tiny(text), tmp_path / "run", quiet=True)


def test_what_a_process_killed_while_it_prepared_the_text_left_behind_goes(text, tmp_path):
    data = tmp_path / "run" / "data"
    stale = [data / where / ".index.json.0123456789abcdef.tmp" for where in ("", "train", "val")]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half of a file")
    (data / ".keep").write_text("somebody else's")
    pretrain(tiny(text, steps=2), tmp_path / "run", resume="auto", quiet=True)
    assert not [path for path in stale if path.exists()]
    assert (data / ".keep").exists()


def test_a_device_that_does_not_exist_is_named(text, tmp_path):
    with pytest.raises(ConfigError, match="abacus"):
        pretrain(tiny(text, device="abacus"), tmp_path / "run", quiet=True)


# ---- command line ------------------------------------------------------------------------------------------------

FLAGS = [
    "--steps", "6", "--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4",
    "--eval-interval", "3", "--checkpoint-interval", "2", "--threads", "1", "--set", "evaluation.sample_tokens=4",
]  # fmt: skip


def test_the_command_prints_the_checkpoint_on_stdout_and_progress_on_stderr(text, tmp_path):
    run = tmp_path / "run"
    done = CliRunner().invoke(command, [str(text), "--out", str(run), *FLAGS], catch_exceptions=False)
    assert done.stdout == f"{run / 'final'}\n"
    assert "held-out loss" in done.stderr
    done = CliRunner().invoke(
        command,
        ["--out", str(run), "--resume", "auto", "--json", "-q", "--steps", "8"],
        catch_exceptions=False,
    )
    result = json.loads(done.stdout)
    assert result["steps"] == 8
    assert Path(result["checkpoint"]) == run / "final"
    assert result["bits_per_byte"] > 0
    assert done.stderr == ""


def test_reading_the_settings_does_not_load_pytorch():
    program = "import sys, portlm.commands.pretrain; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
