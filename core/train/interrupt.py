"""Ctrl-C and SIGTERM, politely: finish the step, save, leave with 130 or 143. Asked twice, leave at once."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from portlm.errors import PortlmError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"


class InterruptedTraining(PortlmError):  # noqa: N818  an outcome the user asked for, not a fault
    """A signal stopped the run after its state was saved. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is only noted; ask :attr:`signal_number` between steps.

    The second one ends the process on the spot. That is safe at any moment, for the same reason kill -9 is:
    nothing on disk is ever half replaced. Signals can only be caught in the main thread; elsewhere this
    does nothing.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # 0 until a signal came
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # A parent may have set SIGINT to be ignored (nohup, a background job): respect that.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            if sys.stderr.isatty():
                _say(_SHOW_CURSOR)  # a progress bar may have hidden it
            _say(b"stopped at once; the last checkpoint is intact\n")
            os._exit(128 + number)
        self.signal_number = number
        name = signal.Signals(number).name.encode()
        _say(name + b": finishing this step, then saving; once more to stop at once\n")


def _say(text: bytes) -> None:
    # os.write, not print: the handler may run in the middle of another print.
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text)
