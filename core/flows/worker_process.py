"""A worker process that answers one JSON object per line with another, and blocks in read() in between."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from portlm.errors import PortlmError


class WorkerProcess:
    """The near side of a module that answers commands on stdin.

    Attributes:
        name: of what runs there, for errors.
        pid: of the process.
    """

    def __init__(self, name: str, module: str, environment: Mapping[str, str] | None = None, log: Any = None):
        """Start the process.

        Args:
            name: see above.
            module: what `python -m` runs.
            environment: of the process; None for this one's.
            log: a file for what it says on stderr; None for this process's stderr.
        """
        self.name = name
        self._pipe = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
            env=dict(os.environ if environment is None else environment),
        )  # fmt: skip
        self.pid = self._pipe.pid

    def call(self, command: str, patience: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Args:
            command: its name.
            patience: seconds; a process that takes longer is killed. None waits for as long as it takes.
            arguments: of the command, what JSON can hold.

        Raises:
            PortlmError: the worker reported an error, died, or took too long.
        """
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        try:
            self._pipe.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._pipe.stdin.flush()
            if patience is not None:
                self._wait(command, patience)
            line = self._pipe.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PortlmError(f"{self.name}: the engine's process died (exit code {self._pipe.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PortlmError(f"{self.name}: {answer['error']}")
        return answer

    def _wait(self, command: str, patience: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            if not selector.select(patience):
                self._pipe.kill()
                self._pipe.wait()
                raise PortlmError(f"{self.name}: no answer to {command} within {patience:.0f} s")

    def close(self) -> None:
        """End the worker."""
        if self._pipe.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died with a command unread
                self._pipe.stdin.close()
        try:
            self._pipe.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._pipe.kill()
            self._pipe.wait()
        if self._pipe.stdout is not None:
            self._pipe.stdout.close()
