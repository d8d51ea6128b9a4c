"""Signals: the first is noted, the second ends the process, and nothing stays installed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from portlm.train.interrupt import Interrupt, InterruptedTraining


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_only_noted(number, capfd):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.signal_number == 0
        os.kill(os.getpid(), number)
        assert interrupt.signal_number == number
    assert signal.getsignal(number) is before
    assert "finishing this step" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_exit_code_is_128_plus_the_signal(number, code):
    assert InterruptedTraining("stopped", number).exit_code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_the_process_at_once(number, code):
    program = f"""
        import os, signal, time
        from portlm.train.interrupt import Interrupt
        with Interrupt() as interrupt:
            os.kill(os.getpid(), {number})
            assert interrupt.signal_number == {number}
            os.kill(os.getpid(), {number})
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == code
    assert "the last checkpoint is intact" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number, capfd):
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.signal_number == 0
    finally:
        signal.signal(number, previous)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("stop_at_once", [False, True])
def test_the_answer_comes_in_the_middle_of_one_long_instruction(stop_at_once):
    """Python's own handlers run behind it: a step on a busy machine may keep them waiting for seconds."""
    program = f"""
        import ctypes, os, select, signal, threading
        from portlm.train.interrupt import Interrupt
        answers, told = os.pipe()
        os.dup2(told, 2)
        waiting, over = os.pipe()

        def ask():
            os.kill(os.getpid(), signal.SIGINT)
            heard = select.select([answers], [], [], 10)[0]
            os.write(1, os.read(answers, 1000) if heard else b"silence")

        def watch():
            started.wait()
            ask()
            if {stop_at_once}:
                ask()  # only the second signal ends it now
            else:
                os.write(over, b"x")

        with Interrupt() as interrupt:
            started = threading.Event()
            watcher = threading.Thread(target=watch)
            watcher.start()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the watcher gets it: nothing wakes us
            read = ctypes.CDLL(None).read  # lets other threads run meanwhile, as PyTorch and the kernels do
            buffer = ctypes.create_string_buffer(1)
            started.set()
            read(waiting, buffer, 1)
            print("the instruction ended", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("SIGINT: finishing this step"), done
    assert done.returncode == (130 if stop_at_once else 0)
    assert ("the instruction ended" in done.stdout) == (not stop_at_once)


def test_somebody_elses_wakeup_pipe_is_given_back():
    """asyncio has one in the main thread."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with Interrupt():
            pass
        assert signal.set_wakeup_fd(before) == write
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with Interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
