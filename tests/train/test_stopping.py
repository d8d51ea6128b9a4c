"""A command that is told to stop, and one that nobody listens to any more: what it has learned is on the disk."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from tiny_runs import newest  # noqa: E402

from portlm.train.checkpoint import check_checkpoint, list_checkpoints  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.progress import ProgressReport  # noqa: E402

# Nothing is saved but when the run is told to stop.
FLAGS = [
    "--steps", "1000000", "--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4",
    "--eval-interval", "1000000", "--checkpoint-interval", "1000000", "--threads", "1", "--set", "log_interval=5",
]  # fmt: skip


def command(text, run, *options):
    return [sys.executable, "-m", "portlm", "pretrain", str(text), "--out", str(run), *FLAGS, *options]


def wait_for_steps(run, running):
    """Return when a run has taken some steps; fail if it ended before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if any(record["kind"] == "train" for record in read_metrics(run / "metrics.jsonl")):
                return
        assert running(), "the command ended before its first steps"
        time.sleep(0.05)
    pytest.fail("no step within two minutes")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_run_that_is_told_to_stop_saves_and_says_so(text, tmp_path, name, code):
    run = tmp_path / "run"
    with subprocess.Popen(command(text, run), stderr=subprocess.PIPE, text=True) as child:
        wait_for_steps(run, lambda: child.poll() is None)
        child.send_signal(signal.Signals[name])
        said = child.communicate(timeout=60)[1]
    assert child.returncode == code, said
    assert f"{name}: finishing this step, then saving" in said
    step = check_checkpoint(newest(run)).step
    assert f"stopped after step {step}" in said
    assert "Traceback" not in said


def test_hanging_up_again_and_again_is_no_second_request(text, tmp_path):
    """A shell and the kernel both send SIGHUP when a terminal closes, and a session's end sends SIGTERM before it."""
    run = tmp_path / "run"
    with subprocess.Popen(command(text, run), stderr=subprocess.PIPE, text=True) as child:
        wait_for_steps(run, lambda: child.poll() is None)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            child.send_signal(number)
            time.sleep(0.002)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == 129, said
    assert len(list_checkpoints(run / "checkpoints")) == 1


def test_under_nohup_a_closed_terminal_is_not_noticed(text, tmp_path):
    run = tmp_path / "run"

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with subprocess.Popen(
        command(text, run), stderr=subprocess.PIPE, text=True, preexec_fn=ignore
    ) as child:  # fmt: skip
        wait_for_steps(run, lambda: child.poll() is None)
        child.send_signal(signal.SIGHUP)
        before = len(read_metrics(run / "metrics.jsonl"))
        while len(read_metrics(run / "metrics.jsonl")) <= before + 2:
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == 143, said
    assert "SIGHUP" not in said


@pytest.mark.parametrize("quiet", [False, True], ids=["with a bar", "quiet"])
def test_closing_the_terminal_saves_and_leaves_with_129(text, tmp_path, quiet):
    """The real thing: the only end of a pseudo-terminal that anybody held is closed, and every write to it fails."""
    run = tmp_path / "run"
    program, *arguments = command(text, run, *(["--quiet"] if quiet else []))
    child, terminal = os.forkpty()
    if not child:
        os.execv(program, [program, *arguments])

    def running():
        return os.waitpid(child, os.WNOHANG) == (0, 0)

    wait_for_steps(run, running)
    if not quiet:
        seen = b""
        while b"loss" not in seen:
            seen += os.read(terminal, 4096)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert len(list_checkpoints(run / "checkpoints")) == 1
    assert check_checkpoint(newest(run)).step > 0
    assert code == 129


@pytest.mark.parametrize("reason", [errno.EIO, errno.EPIPE, errno.ENOSPC], ids=errno.errorcode.get)
def test_progress_that_cannot_be_written_does_not_stop_the_training(reason):
    """A closed terminal, `portlm pretrain ... 2>&1 | head`, and a log on a full disk."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(reason, os.strerror(reason))

        def flush(self):
            raise OSError(reason, os.strerror(reason))

    report = ProgressReport(3, stream=Gone())
    report.note("nobody reads this")
    report.update(1, 2.0, 3.0)
    report.warn("nor this")


def test_a_bar_whose_terminal_has_gone_does_not_stop_the_training(monkeypatch):
    pytest.importorskip("rich")
    watching, terminal = os.openpty()
    with open(terminal, "w") as stream, ProgressReport(3, stream=stream) as report:  # noqa: PTH123
        report.update(1, 2.0, 3.0)
        os.close(watching)
        report.update(2, 2.0, 3.0)
        report.note("nobody reads this")
        report.update(3, 2.0, 3.0)
