"""Signals: the first is noted, the second ends the process, and nothing stays installed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from portlm.train.interrupt import Interrupt, InterruptedTraining


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_noted(number, capfd):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.signal_number == 0
        os.kill(os.getpid(), number)
        assert interrupt.signal_number == number
    assert signal.getsignal(number) is before
    assert "finishing this step" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def test_an_ignored_signal_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.signal_number == 0
    finally:
        signal.signal(signal.SIGINT, previous)


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
