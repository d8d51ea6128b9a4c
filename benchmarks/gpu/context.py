"""What a section is given, and how it ends: the process in which one section runs.

Started by check.py as ``python context.py SECTION ...``. Exit codes: 0 done, 1 failed, 3 skipped because something is
missing; the one-line reason is left in a file, because a process that is killed says nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, SKIPPED = 0, 1, 3


class MissingError(Exception):
    """A section cannot run here, because something that nobody can set up from here is missing."""


@dataclass(frozen=True)
class Context:
    """Where a section runs, and whether it may launch anything.

    Attributes:
        section: its name.
        records: file that it appends figures to.
        work: folder that sections share: the build, the models.
        dry: go through everything on the CPU, with tiny sizes, and time nothing.
    """

    section: str
    records: Path
    work: Path
    dry: bool

    @property
    def device(self) -> str:
        """Where tensors live: a dry run has no GPU."""
        return "cpu" if self.dry else "cuda"

    def figure(self, **fields: Any) -> None:
        """Keep one figure, now."""
        record.append(self.records, {"section": self.section, **fields})

    def fact(self, name: str, value: Any) -> None:
        """Keep something that every figure depends on."""
        self.figure(case=name, value=str(value))

    def claim(self, case: str, result: str) -> None:
        """Keep what a comparison found."""
        self.figure(case=case, claim=result)

    def command(self, *words: str | Path, echo: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the checkout's package, its output kept; a bad exit code is for the caller."""
        done = subprocess.run([str(w) for w in words], cwd=ROOT, capture_output=True, text=True, check=False)
        if echo:
            print("$", *words, done.stdout, done.stderr, sep="\n", flush=True)
        return done

    def portlm(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the portlm command of this checkout."""
        return self.command(sys.executable, "-m", "portlm", *words)

    def command_json(self, *words: str | Path) -> Any:
        """Run the portlm command and read the JSON that it prints.

        Raises:
            RuntimeError: it failed.
        """
        done = self.portlm(*words)
        if done.returncode:
            raise RuntimeError(last_line(done.stderr))
        return json.loads(done.stdout)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("function")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--reason", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    context = Context(options.name, options.records, options.work, options.dry_run)
    module, _, name = options.function.partition(":")
    try:
        function: Callable[[Context], str] = getattr(importlib.import_module(module), name)
        status, reason = DONE, function(context)
    except MissingError as missing:
        status, reason = SKIPPED, str(missing)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "portlm":
            raise
        status, reason = SKIPPED, f"the package {error.name} is not installed for {sys.executable}"
    except Exception as error:  # whatever it is, it is this section's result
        traceback.print_exc()
        status, reason = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    options.reason.write_text(reason)
    sys.stdout.flush()
    os._exit(status)  # a driver that hangs while it unloads must not cost the section its result


if __name__ == "__main__":
    sys.modules["context"] = sys.modules["__main__"]  # one MissingError, not two
    sys.exit(_main())
