"""scripts/gpu_check.sh is ready before a GPU is: its dry run passes here, and nothing that it found is ever lost."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu"
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
ENV = {**os.environ, "PYTHON": sys.executable}


def listed() -> list[dict]:
    done = subprocess.run([SCRIPT, "--list", "--json"], env=ENV, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict, str]:
    """Return exit code, report and table of a run in a folder of its own."""
    command = [SCRIPT, "--out", tmp_path / "out", "--work", tmp_path / "work", *arguments]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    out = tmp_path / "out"
    return (
        done.returncode,
        json.loads((out / "gpu-check.json").read_text()),
        (out / "gpu-check.md").read_text(),
    )


def test_every_cuda_kernel_has_a_section_that_measures_it():
    text = (ROOT / "csrc" / "cuda" / "kernels.def").read_text()
    kernels = re.findall(r"^PORTLM_CUDA_KERNEL\((\w+),", text, re.MULTILINE)
    assert kernels
    measured = [kernel for section in listed() for kernel in section["kernels"]]
    assert sorted(measured) == sorted(kernels)


def test_every_section_names_a_function_and_needs_earlier_sections():
    seen: set[str] = set()
    for section in listed():
        module, _, function = section["function"].partition(":")
        assert re.search(
            rf"^def {function}\(context: Context\) -> str:", (GPU / f"{module}.py").read_text(), re.M
        )
        assert set(section["needs"]) <= seen, section["name"]
        seen.add(section["name"])


def test_the_dry_run_of_the_quick_sections_passes_without_a_gpu(tmp_path):
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    names = ["machine", "twins", "swiglu", "training"]
    code, report, table = run(tmp_path, "--dry-run", "--only", *names)
    assert [(s["section"], s["status"]) for s in report["sections"]] == [(name, "ok") for name in names], (
        table
    )
    assert code == 0
    assert report["dry_run"]
    contenders = {(f["section"], f["contender"]) for f in report["figures"] if "contender" in f}
    assert {
        ("swiglu", "portlm"),
        ("swiglu", "eager"),
        ("swiglu", "compile"),
        ("training", "portlm"),
    } <= contenders
    assert not any(f.get("seconds") or f.get("rate") for f in report["figures"]), "a dry run times nothing"


@pytest.mark.parametrize(
    ("words", "times"), [((), 1), (("--dry-run",), 6), (("--dry-run", "--budget", "90"), 6)]
)
def test_a_dry_run_has_more_time_than_a_machine_with_a_gpu(words, times):
    """Its limits are that machine's, and a few busy cores take longer to make models."""
    code = (
        f"import sys; sys.path[:0] = [{str(GPU)!r}]; import check\n"
        "def told(sections, out, work, *, dry, budget):\n"
        "    print(sections[0].seconds, budget)\n"
        "    sys.exit()\n"
        "check.Check = told\n"
        "check.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--only", "models", *words], capture_output=True, text=True, check=True
    )
    seconds, budget = map(float, done.stdout.split())
    (models,) = (section for section in listed() if section["name"] == "models")
    assert seconds == times * models["seconds"]
    assert budget == (90 if "--budget" in words else 600 * times)


def test_without_a_cuda_device_the_run_fails_and_says_why(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, report, table = run(tmp_path, "--only", "machine", "swiglu")
    assert code == 1
    assert [s["status"] for s in report["sections"]] == ["failed", "skipped"]
    assert "finds no CUDA device" in table


# A section of each kind of bad end, run by the same driver from a table of their own.
SECTIONS = """
import os, time
from context import MissingError

def good(context):
    context.figure(case="first", contender="portlm", seconds=1.0)
    return "fine"

def bad(context):
    context.figure(case="before the end", contender="portlm", seconds=1.0)
    raise ValueError("wrong | answer")

def killed(context):
    os.kill(os.getpid(), 11)

def hangs(context):
    context.figure(case="before the limit", contender="portlm", seconds=1.0)
    time.sleep(60)

def lacks(context):
    import a_package_that_nobody_has

def missing(context):
    raise MissingError("no such device")
"""
DRIVER = """
import sys
sys.path[:0] = [{gpu!r}]
import check
from pathlib import Path
from sections import Section
names = sys.argv[2:]
limits, needs = {{"hangs": 6}}, {{"good": ("bad",)}}
sections = [Section(n, n, limits.get(n, 30), "strange:" + n, needs.get(n, ())) for n in names]
folder = Path(sys.argv[1])
check.environment = lambda work, real=check.environment: {{**real(work), "PYTHONPATH": str(folder)}}
sys.exit(check.Check(sections, folder / "out", folder / "work", dry=True, budget={budget}).run())
"""


def start(tmp_path: Path, *names: str, budget: int = 100) -> subprocess.Popen:
    (tmp_path / "strange.py").write_text(SECTIONS)
    code = DRIVER.format(gpu=str(GPU), budget=budget)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), *names],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def results(tmp_path: Path) -> tuple[dict[str, dict], set[str]]:
    report = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    return {s["section"]: s for s in report["sections"]}, {f["case"] for f in report["figures"]}


def test_a_section_that_fails_crashes_or_hangs_costs_only_itself(tmp_path):
    assert start(tmp_path, "killed", "hangs", "lacks", "missing", "good", "bad").wait(60) == 1
    found, cases = results(tmp_path)
    assert {name: s["status"] for name, s in found.items()} == {
        "killed": "failed",
        "hangs": "timed out",
        "lacks": "skipped",
        "missing": "skipped",
        "good": "ok",
        "bad": "failed",
    }
    assert "SIGSEGV" in found["killed"]["reason"]
    assert "a_package_that_nobody_has is not installed" in found["lacks"]["reason"]
    assert found["missing"]["reason"] == "no such device"
    assert cases == {"before the limit", "first", "before the end"}
    table = (tmp_path / "out" / "gpu-check.md").read_text()
    assert "wrong \\| answer" in table


def test_a_section_whose_need_failed_is_skipped_with_that_reason(tmp_path):
    assert start(tmp_path, "bad", "good").wait(60) == 1
    found, _ = results(tmp_path)
    assert found["good"]["status"] == "skipped"
    assert "wrong | answer" in found["good"]["reason"]


def test_a_spent_budget_skips_the_rest_and_still_writes_the_table(tmp_path):
    assert start(tmp_path, "missing", "good", budget=0).wait(60) == 0
    found, _ = results(tmp_path)
    assert {s["reason"] for s in found.values()} == {"the time for all sections is used up"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_section_and_writes_what_is_there(tmp_path, number):
    process = start(tmp_path, "good", "hangs")
    records = tmp_path / "out" / "records.jsonl"
    deadline = time.monotonic() + 30
    while not (records.exists() and "before the limit" in records.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    found, cases = results(tmp_path)
    assert {name: s["status"] for name, s in found.items()} == {"good": "ok", "hangs": "interrupted"}
    assert cases == {"first", "before the limit"}


@pytest.fixture
def modules(monkeypatch):
    """Load modules of the check, which import each other by their bare names, for one test."""
    monkeypatch.syspath_prepend(str(GPU))
    for name in ("record", "context", "timing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in ("record", "context", "timing"):
        sys.modules.pop(name, None)


def test_the_table_shows_wins_losses_and_who_could_not_run(modules):
    def figure(contender, **values):
        return {"section": "swiglu", "case": "forward", "contender": contender, **values}

    report = {
        "date": "2026-01-01", "commit": "abc", "dry_run": False,
        "sections": [{"section": "swiglu", "status": "ok", "reason": "", "seconds": 3.0}],
        "figures": [
            {"section": "machine", "case": "device", "value": "A GPU"},
            figure("portlm", seconds=1e-4, rate=4000.0, unit="GB/s", of_limit=0.93),
            figure("eager", seconds=3e-4, rate=1333.0, unit="GB/s", of_limit=0.31, ratio=3.0, interval=[2.9, 3.1]),
            figure("compile", seconds=9e-5, rate=4400.0, unit="GB/s", of_limit=1.0, ratio=0.9, interval=[0.88, 0.92]),
            figure("other", absent="it is not installed"),
        ],
    }  # fmt: skip
    table = modules("record").markdown(report)
    assert "## 2026-01-01: A GPU" in table
    assert "| swiglu | forward | portlm | 0.100 ms | 4,000 GB/s | 93% |  |" in table
    assert "| 3.00 [2.90, 3.10] |" in table
    assert "| 0.90 [0.88, 0.92], slower |" in table
    assert "absent: it is not installed" in table


@pytest.fixture
def timing(modules, monkeypatch):
    """The module that races, with a clock of its own: a call takes as long as it says."""
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    module = modules("timing")
    monkeypatch.setattr(module, "sample", lambda call, repeats, dry: getattr(call, "seconds", 1.0))
    return module


def call(value: float, seconds: float):
    import torch

    def function():
        return torch.tensor([value, 0.5])

    function.seconds = seconds
    return function


def race(timing, tmp_path, contenders, **case) -> list[dict]:
    context = timing.Context("a section", tmp_path / "records.jsonl", tmp_path, dry=False)
    limits = timing.Limits(dry=True, copy=1e12)
    timing.race(context, timing.Case("a case", contenders, **case), limits)
    return [json.loads(line) for line in context.records.read_text().splitlines()]


def test_a_race_keeps_times_ratios_and_shares_of_the_limit(timing, tmp_path):
    def broken():
        raise ImportError("no such package")

    contenders = {
        "portlm": call(1.0, 1.0),
        "eager": call(1.0, 2.0),
        "compile": call(1.0, 0.5),
        "other": broken,
    }
    lines = race(timing, tmp_path, contenders, moved=int(5e11))
    found = {line["contender"]: line for line in lines}
    assert found["other"]["absent"] == "ImportError: no such package"
    assert (found["portlm"]["seconds"], found["portlm"]["rate"], found["portlm"]["of_limit"]) == (
        1.0,
        500.0,
        0.5,
    )
    assert "ratio" not in found["portlm"]
    assert (found["eager"]["ratio"], found["eager"]["interval"]) == (2.0, [2.0, 2.0])
    assert (found["compile"]["ratio"], found["compile"]["of_limit"]) == (0.5, 1.0)


def test_nobody_is_timed_when_results_differ(timing, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"eager differs from the first contender by 0\.1.*nothing was timed"
    ):
        race(timing, tmp_path, {"portlm": call(1.0, 1.0), "eager": call(1.1, 1.0)}, moved=1)
    assert not (tmp_path / "records.jsonl").exists()


def test_a_result_that_is_not_a_number_never_agrees(timing, tmp_path):
    with pytest.raises(RuntimeError, match="nothing was timed"):
        race(timing, tmp_path, {"portlm": call(float("nan"), 1.0), "eager": call(1.0, 1.0)}, moved=1)


def test_a_line_that_was_cut_off_is_left_out(modules, tmp_path):
    path = tmp_path / "records.jsonl"
    record = modules("record")
    record.append(path, {"section": "a", "case": "b"})
    with path.open("a") as file:
        file.write('{"section": "a", "ca')
    assert record.read(path) == [{"section": "a", "case": "b"}]
