"""Check the CUDA parts on a machine with a GPU: right first, then how fast, in at most ten minutes.

Each section runs in a process of its own under its own time limit; what it found is kept whatever happens to the
others. The folder --out receives gpu-check.md (for docs/gpu-results.md), gpu-check.json, records.jsonl (written as
it happens) and log.txt. A section whose needs are missing is skipped with the reason. Exit code 0 if no section
failed, 1 if one did or there is no CUDA device, 130 or 143 if interrupted.

    scripts/gpu_check.sh                        # everything
    scripts/gpu_check.sh --only build swiglu    # some
    scripts/gpu_check.sh --dry-run              # anywhere: all of it up to the launch, on the CPU with tiny sizes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import FrameType

import record
from context import DONE, ROOT, SKIPPED
from sections import SECTIONS, Section

HERE = Path(__file__).resolve().parent
WORDS = {DONE: "ok", SKIPPED: "skipped"}
RESERVE = 10  # seconds of the budget that are kept for writing the table
DRY_TIMES = 6  # as much time in a dry run: limits are of a machine with a GPU, not of a few busy cores


class InterruptionError(Exception):
    """A signal came."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Check:
    """One run: sections in order, within the budget.

    Args:
        sections: what to do.
        out: receives the records and the table.
        work: shared by the sections, and kept between runs: the build is the expensive part.
        dry: see the module.
        budget: seconds in all.
    """

    def __init__(self, sections: list[Section], out: Path, work: Path, *, dry: bool, budget: float):
        self.sections, self.out, self.work, self.dry = sections, out, work, dry
        self.end = time.monotonic() + budget
        self.bad: dict[str, str] = {}
        self._running: subprocess.Popen[bytes] | None = None
        self._killed = False

    def run(self) -> int:
        """Run every section and write the table; return the exit code."""
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        for name in (record.RECORDS, record.REPORT, record.TABLE, record.LOG):
            (self.out / name).unlink(missing_ok=True)
        make_view(self.work)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)
        code = 0
        try:
            for section in self.sections:
                status = self._section(section)
                code = max(code, int(status not in WORDS.values()))
        except InterruptionError as interrupted:
            code = 128 + interrupted.number
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # from here on the table is all that counts
            about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "dry_run": self.dry}
            record.write_report(self.out, about)
        print((self.out / record.TABLE).read_text(), flush=True)
        return code

    def _section(self, section: Section) -> str:
        """Run one section, keep its record, and return its result in a word."""
        begin = time.monotonic()
        status, reason = "interrupted", ""
        say(f"{section.name}: {section.summary}")
        try:
            status, reason = self._result(section)
        except InterruptionError as interrupted:
            reason = str(interrupted)
            raise
        finally:
            seconds = round(time.monotonic() - begin, 1)
            line = {"section": section.name, "status": status, "reason": reason, "seconds": seconds}
            record.append(self.out / record.RECORDS, line)
            say(f"{section.name}: {status} after {seconds:.0f} s{': ' if reason else ''}{reason}")
            if status != "ok":
                self.bad[section.name] = f"{section.name} {status}: {reason}"
        return status

    def _result(self, section: Section) -> tuple[str, str]:
        unmet = [self.bad[name] for name in section.needs if name in self.bad]
        if unmet:
            return "skipped", unmet[0]
        limit = min(section.seconds, self.end - time.monotonic() - RESERVE)
        if limit < 5:
            return "skipped", "the time for all sections is used up"
        reason = self.work / "reason.txt"
        reason.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(HERE / "context.py"),
            section.name,
            section.function,
            "--reason",
            str(reason),
        ]
        command += ["--records", str(self.out / record.RECORDS), "--work", str(self.work)]
        command += ["--dry-run"] if self.dry else []
        with (self.out / record.LOG).open("ab") as log:
            log.write(f"\n==== {section.name}\n".encode())
            log.flush()
            # A group of its own, so that what it started ends with it.
            self._running = subprocess.Popen(
                command, cwd=ROOT, env=environment(self.work), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = self._running.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return "timed out", f"not finished after {limit:.0f} s; what it measured until then is kept"
            finally:
                self._end_group()
        said = reason.read_text() if reason.exists() else ""
        if code in WORDS and (said or code == DONE):
            return WORDS[code], said
        if code < 0:
            said = f"the process was ended by {signal.Signals(-code).name}"
        return "failed", said or f"exit code {code}, see {record.LOG}"

    def _end_group(self) -> None:
        assert self._running is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise InterruptionError(number)


def say(message: str) -> None:
    """Report progress."""
    print(f"gpu_check: {message}", file=sys.stderr, flush=True)


def make_view(work: Path) -> None:
    """Show this checkout as the package portlm, without installing it: a folder of links."""
    view = work / "view" / "portlm"
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir(parents=True)
    for entry in (ROOT / "core").iterdir():
        if entry.name != "__pycache__" and entry.suffix != ".so":
            (view / entry.name).symlink_to(entry)
    for name in ("compile", "runtimes"):
        (view / name).symlink_to(ROOT / name)
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    built = [folder / name for folder in (work / "extension", ROOT / "core") if (folder / name).exists()]
    if built:
        (view / name).symlink_to(max(built, key=lambda path: path.stat().st_mtime))


def environment(work: Path) -> dict[str, str]:
    """Return the environment of a section: this checkout first, then wheels that were brought along."""
    path = [str(work / "view"), str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PORTLM_HOME": str(work / "home"),  # trust in what is compiled here ends here
    }


def commit() -> str:
    """Return what git calls this tree, if git is here and this is a clone."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ) if shutil.which("git") else None  # fmt: skip
    return done.stdout.strip() if done is not None and done.returncode == 0 else "unknown commit"


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    default = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    parser.add_argument(
        "--out", type=Path, default=default, help="results (default: $OUT, or build/gpu-check)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "gpu-work",
        help="build and models (default: build/gpu-work)",
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help="run these sections only")
    parser.add_argument("--dry-run", action="store_true", help="everything up to the launch, on the CPU")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds in all (default: 600; {DRY_TIMES} times as many, as of each section, in a dry run)",
    )
    parser.add_argument("--list", action="store_true", help="list the sections and stop; with --json as JSON")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON")
    options = parser.parse_args()
    if options.list:
        if options.json:
            print(json.dumps([section._asdict() for section in SECTIONS], indent=1))
        else:
            for section in SECTIONS:
                print(f"{section.name:>14} {section.seconds:4d} s  {section.summary}")
        return 0
    chosen = [section for section in SECTIONS if options.only is None or section.name in options.only]
    out, work = options.out.resolve(), options.work.resolve()
    times = DRY_TIMES if options.dry_run else 1
    chosen = [section._replace(seconds=times * section.seconds) for section in chosen]
    budget = 600 * times if options.budget is None else options.budget
    return Check(chosen, out, work, dry=options.dry_run, budget=budget).run()


if __name__ == "__main__":
    sys.exit(main())
