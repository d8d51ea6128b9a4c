"""The test suite's own word on the CUDA parts: the twins of the kernels, and every other test that needs a GPU."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

from context import ROOT, Context, last_line

TWINS = tuple(
    f"tests/ops/{file.name}"
    for file in sorted((ROOT / "tests" / "ops").glob("test_cuda*.py"))
    if file.name != "test_cuda_on_cpu.py"
)
# Other versions of PyTorch warn about other things than those of the test suite, where warnings are errors.
PYTEST = (sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider")


class Counts(NamedTuple):
    """How the tests of a run ended."""

    passed: int
    failed: int
    skipped: int
    first: str  # why the first that did not pass did not


def twins(context: Context) -> str:
    """Every CUDA kernel against its float64 oracle, on the device: not as compiled for the CPU."""
    return _run(context, "-k", "not emulated", *TWINS)


def marked_tests(context: Context) -> str:
    """Every test that is marked gpu outside the files of the twins."""
    others = (f"--ignore={file}" for file in TWINS)
    return _run(context, "-m", "gpu", *others, "tests", none="no other test is marked gpu")


def contract(context: Context) -> str:
    """The tests that every engine passes on every device, for those that run on CUDA."""
    files = (f"tests/runtimes/test_{name}.py" for name in ("every_decoder", "contract", "states"))
    return _run(context, "-k", "cuda", *files)


def _run(context: Context, *arguments: str, none: str = "") -> str:
    """Run tests and say how they ended; a dry run only collects them.

    Args:
        context: of the section.
        arguments: what pytest is told.
        none: what it means that there are no such tests; "" makes it an error.

    Raises:
        RuntimeError: one failed, all were skipped, or there are none.
    """
    if context.dry:
        done = context.command(*PYTEST, "--collect-only", *arguments)
        found = sum("::" in line for line in done.stdout.splitlines())
        if done.returncode not in (0, 5) or not (found or none):
            raise RuntimeError(f"they cannot be collected: {last_line(done.stdout + done.stderr)}")
        return f"{found} tests collected" if found else none
    report = context.work / "tests.xml"
    report.unlink(missing_ok=True)
    done = context.command(*PYTEST, f"--junitxml={report}", *arguments)
    if done.returncode == 5 and none:
        return none
    if not report.exists():
        raise RuntimeError(f"pytest did not run: {last_line(done.stdout + done.stderr)}")
    counts = _counts(report.read_text())
    said = f"{counts.passed} passed, {counts.failed} failed, {counts.skipped} skipped"
    context.claim(" ".join(arguments), said)
    if counts.failed or not counts.passed:
        raise RuntimeError(f"{said}: {counts.first}")
    return said


def _counts(text: str) -> Counts:
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    failed, skipped, first = 0, 0, ""
    for case in cases:
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is None:
                continue
            failed, skipped = failed + (kind != "skipped"), skipped + (kind == "skipped")
            if not first or kind != "skipped":
                first = first if first.startswith("FAILED") else f"{case.get('name')}: {found.get('message')}"
            if kind != "skipped" and not first.startswith("FAILED"):
                first = f"FAILED {first}"
            break
    return Counts(len(cases) - failed - skipped, failed, skipped, first)
