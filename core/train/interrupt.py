"""Ctrl-C, SIGTERM and a closed terminal, politely: finish the step, save, leave with 130, 143 or 129.

Asked twice, leave at once. Python runs its own handlers only between two of its instructions, and a step on a busy
machine may be one instruction for seconds. So a thread hears of every signal through a pipe that Python's handler in C
writes to, and answers meanwhile.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from portlm.errors import PortlmError

# A closed terminal sends SIGHUP more than once, and a session that ends sends it after SIGTERM: it is never the second
# request of somebody who does not want to wait.
_IMPATIENT = (signal.SIGINT, signal.SIGTERM)
_SIGNALS = (*_IMPATIENT, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h"


class InterruptedTraining(PortlmError):  # noqa: N818  an outcome the user asked for, not a fault
    """A signal stopped the run after its state was saved. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Interrupt:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is only noted; ask :attr:`signal_number` between steps.

    A second SIGINT or SIGTERM ends the process on the spot. That is safe at any moment, for the same reason kill -9
    is: nothing on disk is ever half replaced. Signals can only be caught in the main thread; elsewhere this does
    nothing. A signal that is ignored, as SIGHUP is under nohup, stays so.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # 0 until a signal came
        self._previous: dict[int, Any] = {}
        self._previous_pipe = self._pipe = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self
        listening, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)  # or a handler could wait for a reader
        for number in _SIGNALS:
            # None is a handler that is not Python's.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._note)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._answer, args=(listening,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._previous_pipe)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._pipe)
        self._thread.join()
        self._thread = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number

    def _answer(self, listening: int) -> None:
        """Say what every signal leads to, and let the second one lead to it."""
        asked = False
        with os.fdopen(listening, "rb", buffering=0) as pipe:
            while heard := pipe.read(1):
                number, impatient = heard[0], heard[0] in _IMPATIENT
                if number not in self._previous:
                    continue
                if asked and impatient:
                    if sys.stderr.isatty():
                        _say(_SHOW_CURSOR)  # a progress bar may have hidden it
                    _say(b"stopped at once; the last checkpoint is intact\n")
                    os._exit(128 + number)
                line = b"\n" if sys.stderr.isatty() else b""  # below ^C, or the progress bar
                again = b"; once more to stop at once\n" if impatient else b"\n"
                _say(
                    line
                    + signal.Signals(number).name.encode()
                    + b": finishing this step, then saving"
                    + again
                )
                asked = asked or impatient


def _say(text: bytes) -> None:
    # os.write, not print: another thread may be in the middle of one.
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text)
