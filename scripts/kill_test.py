"""Kill a training that saves all the time, again and again, and count what it costs.

A tiny model is trained with a checkpoint after every step. Each trial resumes it in a child process and ends that
with SIGKILL: half of them at a random moment, half at a random file operation, before it, after it, or with half of
its bytes written. After every kill all checkpoints are verified; when a run is complete, its weights,
moments, random state and metrics are compared with those of an undisturbed run, bit for bit, and the next run begins.

    python scripts/kill_test.py --kills 200
    python scripts/kill_test.py --kills 100 --signal TERM    # asks politely, and half of the time a second time
    python scripts/kill_test.py --objective masked           # a toy encoder that guesses hidden tokens

Counts, all of which but the first have to be 0: kills; corrupt checkpoints under a final name; unresumable runs;
fallbacks to an older checkpoint; lost steps that had been reported as saved; runs that ended differently; and
leftovers after a completed run. A kill loses the process, not the power: what the page cache holds survives it, so
the waiting for the disk is what tests/train/test_checkpoint.py is for.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from portlm import settings
from portlm.errors import FormatError
from portlm.models import FAMILIES
from portlm.train.checkpoint import FileOps, check_checkpoint, list_checkpoints
from portlm.train.config import PretrainConfig
from portlm.train.interrupt import InterruptedTraining
from portlm.train.loop import Trainer
from portlm.train.metrics import comparable, read_metrics
from portlm.train.objectives import objective_class
from portlm.train.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "train"))
import toy_encoder

FAMILIES[toy_encoder.NAME] = toy_encoder.FAMILY
OBJECTIVES = {"causal": next(iter(FAMILIES)), "masked": toy_encoder.NAME}  # each with a family that suits it
STEPS = 30
MEMORY = Path("/dev/shm")
TEXT = "".join(
    f"{i} green bottles hanging on the wall, and if one should fall: {i - 1}.\n" for i in range(99, 0, -1)
)
FILE_OPERATIONS = [name for name in vars(FileOps) if not name.startswith("_")]


@dataclass
class Counts:
    """What happened. Everything but the first three is a failure."""

    kills: int = 0
    kills_inside_a_save: int = 0
    runs: int = 0
    corrupt: int = 0
    unresumable: int = 0
    fallbacks: int = 0
    lost: int = 0
    different: int = 0
    leftovers: int = 0
    notes: list[str] = field(default_factory=list)

    def failures(self) -> int:
        """Return how much went wrong."""
        return self.corrupt + self.unresumable + self.fallbacks + self.lost + self.different + self.leftovers


def config(text: Path, objective: str) -> PretrainConfig:
    """Return settings under which a step and a save take about equally long; dropout draws random numbers."""
    return settings.load(PretrainConfig, overrides=[
        ("steps", STEPS), ("log_interval", 4), ("threads", 1), ("data.texts", [str(text)]), ("data.batch_size", 4),
        ("objective", objective), ("model.family", OBJECTIVES[objective]), ("model.n_layer", 2), ("model.n_head", 2),
        ("model.width", 32), ("model.context_length", 16), ("model.dropout", 0.1), ("evaluation.interval", 7),
        ("evaluation.max_tokens", 64), ("evaluation.sample_tokens", 8), ("checkpoint.interval", 1),
    ])  # fmt: skip


def start_child(
    run: Path, options: PretrainConfig, prepare: Callable[[], None] | None = None
) -> tuple[int, int]:
    """Train in a forked process; return its id and a pipe that carries the step of every completed save.

    Forking costs milliseconds where starting Python costs seconds. It is safe because this process never computes:
    PyTorch starts its threads in the children.
    """
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 3
    try:
        os.close(read)
        save = Trainer.save

        def reporting(self: Trainer) -> None:
            save(self)
            os.write(write, struct.pack("<q", self.step))

        Trainer.save = reporting  # type: ignore[method-assign]
        if prepare is not None:
            prepare()
        pretrain(options, run, resume="auto", quiet=True, plot=False)
        code = 0
    except InterruptedTraining as error:
        code = error.exit_code
    except KeyboardInterrupt:  # before training began; the command line makes the same of it
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_at_operation(number: int, how: str) -> None:
    """Make this process kill itself at one file operation: of its saves, or by which any other file appears."""
    count = 0

    def patch(cls: type, name: str) -> None:
        original = getattr(cls, name)

        def operation(self: Any, *arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count != number:
                return original(self, *arguments)
            if how == "after":
                original(self, *arguments)
            elif how == "half" and name == "write_file":
                path, data = arguments
                path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("still alive after SIGKILL")

        setattr(cls, name, operation)

    for name in FILE_OPERATIONS:
        patch(FileOps, name)
    patch(Path, "replace")  # by which every other file appears: settings, tokens, tokenizer, metrics


def wait(child: int, pipe: int) -> tuple[int, int]:
    """Return the child's status and the last step it reported as saved, -1 for none."""
    reported = -1
    while chunk := os.read(pipe, 8 * 1024):
        if whole := len(chunk) // 8 * 8:
            (reported,) = struct.unpack("<q", chunk[whole - 8 : whole])
    os.close(pipe)
    return os.waitpid(child, 0)[1], reported


def fingerprint(run: Path) -> dict[str, Any]:
    """Return all that a bit-exact resume has to reproduce."""
    last = run / "checkpoints" / f"step-{STEPS}"
    names = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
    state = check_checkpoint(last).state
    # Clocks; and a signal may put the last evaluation off until after the save, its result is in the metrics.
    for key in ("seconds", "seconds_since_log", "evaluation", "evaluated_step"):
        state.pop(key)
    return {
        **{name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names},
        "final": hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest(),
        "state": state,
        "metrics": comparable(read_metrics(run / "metrics.jsonl")),
    }


def inspect(run: Path, saved: int, counts: Counts) -> None:
    """Verify every checkpoint after a kill; ``saved`` is the last step that was reported as saved."""
    good = []
    found = list_checkpoints(run / "checkpoints")
    for step, folder in found:
        try:
            check_checkpoint(folder)
            good.append(step)
        except FormatError as error:
            counts.corrupt += 1
            counts.notes.append(f"{folder.name}: {error}")
    if found and not good:
        counts.unresumable += 1
    elif found and good[-1] != found[-1][0]:
        counts.fallbacks += 1
    if saved > (good[-1] if good else -1):
        counts.lost += 1
        counts.notes.append(f"step {saved} was reported as saved, the newest intact one is {good[-1:]}")


def leftovers(run: Path) -> list[str]:
    """Return the temporary files and folders below a run."""
    return [
        str(path.relative_to(run)) for path in run.rglob("*") if ".tmp" in path.name or ".aside" in path.name
    ]


def was_stopped(status: int, number: signal.Signals) -> bool:
    """Say whether a child ended because of the signal: at once, or after saving."""
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == number
    return os.WEXITSTATUS(status) == 128 + number


def test(
    folder: Path, objective: str, kills: int, generator: random.Random, number: signal.Signals
) -> Counts:
    """Kill and resume until ``kills`` kills happened and the last run is complete."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    options = config(text, objective)
    begin = time.monotonic()
    status, _ = wait(*start_child(folder / "undisturbed", options))
    if status:
        raise SystemExit("the undisturbed run failed")
    # Long enough to get through the start and some saves, short enough to be killed many times per run.
    horizon = (time.monotonic() - begin) / 5
    expected = fingerprint(folder / "undisturbed")
    counts = Counts()
    while counts.kills < kills:
        counts.runs += 1
        run = folder / f"run-{counts.runs}"
        saved = -1
        status = -1
        while status != 0:
            prepare = None
            timed = number != signal.SIGKILL or generator.random() < 0.5
            if counts.kills < kills and not timed:
                operation, how = generator.randint(1, 120), generator.choice(["before", "after", "half"])
                prepare = functools.partial(kill_at_operation, operation, how)
            child, pipe = start_child(run, options, prepare)
            if counts.kills < kills and timed:
                time.sleep(generator.uniform(0, horizon))
                os.kill(child, number)
                if number != signal.SIGKILL and generator.random() < 0.5:
                    time.sleep(generator.uniform(0, 0.02))
                    os.kill(child, number)
            status, reported = wait(child, pipe)
            saved = max(saved, reported)
            killed = was_stopped(status, number)
            counts.kills += killed
            counts.kills_inside_a_save += killed and any((run / "checkpoints").glob("*.tmp-*"))
            if not killed and status:
                counts.unresumable += 1
                counts.notes.append(f"a resumed run failed with status {status}")
                break
            if (run / "checkpoints").exists():
                inspect(run, saved, counts)
        else:
            found = fingerprint(run)
            if found != expected:
                counts.different += 1
                unequal = [key for key, value in found.items() if value != expected[key]]
                counts.notes.append(f"run {counts.runs} ended with other {', '.join(unequal)}")
            if rest := leftovers(run):
                counts.leftovers += 1
                counts.notes.append(f"left behind: {', '.join(rest)}")
        print(
            f"run {counts.runs}: {counts.kills}/{kills} kills, {counts.failures()} failures", file=sys.stderr
        )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="kills to survive (default: %(default)s)")
    parser.add_argument(
        "--signal", choices=["KILL", "TERM", "INT", "HUP"], default="KILL", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--objective", choices=list(OBJECTIVES), default="causal", help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to train (default: in memory if possible)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    objective_class(
        arguments.objective
    )  # like torch._dynamo and the family: by every child it would take seconds
    begin = time.monotonic()
    place = arguments.folder or (MEMORY if os.access(MEMORY, os.W_OK) else None)
    with tempfile.TemporaryDirectory(prefix="portlm-kill-", dir=place) as folder:
        number = signal.Signals[f"SIG{arguments.signal}"]
        counts = test(
            Path(folder), arguments.objective, arguments.kills, random.Random(arguments.seed), number
        )
    result = {
        "objective": arguments.objective,
        **asdict(counts),
        "seconds": round(time.monotonic() - begin, 1),
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        for key, value in result.items():
            print(f"{key:>20}: {value}")
    sys.exit(1 if counts.failures() else 0)


if __name__ == "__main__":
    main()
