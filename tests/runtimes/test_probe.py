import importlib.metadata
import json
import sys

import pytest
from click.testing import CliRunner

from portlm.commands.doctor import command, examine
from portlm.engines import ENGINES
from portlm.errors import EngineUnavailableError
from portlm.runtimes import probe
from portlm.runtimes.vulkan import KINDS, vulkan_devices

PAIRS = [(engine, device) for engine, entry in ENGINES.items() for device in entry.devices]


@pytest.fixture(autouse=True)
def _drivers_are_tried(monkeypatch):
    """And not remembered, as by the other tests: here some are broken."""
    monkeypatch.setattr(probe, "_child", probe._child.__wrapped__)


@pytest.fixture(scope="module")
def rows():
    return {(row["engine"], row["device"]): row for row in probe.probe()}


@pytest.fixture
def installed(monkeypatch):
    """Replace the packages that are installed by name -> version."""

    def pretend(**found):
        def version(name):
            try:
                return found[name.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_every_engine_and_device_has_a_row(rows):
    assert list(rows) == PAIRS


@pytest.mark.parametrize("pair", PAIRS, ids=":".join)
def test_a_row_says_what_is_there_or_why_it_is_not(rows, pair):
    row = rows[pair]
    assert (row["engine"], row["device"]) == pair
    assert bool(row["reason"]) != row["available"]
    assert bool(row["detail"]) == row["available"]
    assert not (row["available"] and row["command"])


@pytest.mark.parametrize("pair", PAIRS, ids=":".join)
def test_what_is_called_available_can_be_loaded(rows, pair, compiled):
    import portlm

    row = rows[pair]
    if not row["available"]:
        pytest.skip(f"{row['engine']}:{row['device']}: {row['reason']}")
    with portlm.load(compiled["gpt2"], *pair) as session:
        assert session.generate("hello", max_new_tokens=2).new_tokens == 2


def test_nothing_installed_gives_the_command_for_each(installed):
    installed()
    for row in probe.probe():
        if row["engine"] in ("null", "packed"):  # which run on nothing but portlm
            continue
        assert not row["available"]
        assert row["reason"].endswith("is not installed")
        assert row["command"].startswith("pip install 'portlm[")


def test_wheels_that_overwrite_each_other_are_found(installed):
    installed(onnxruntime="1.31.1", onnxruntime_gpu="1.31.1")
    (sentence,) = probe.conflicts()
    assert "onnxruntime and onnxruntime-gpu install the same module" in sentence
    row = probe._row("ort", "cpu")
    assert not row["available"]
    assert row["command"].startswith("pip uninstall onnxruntime onnxruntime-gpu")


def test_the_wheels_here_do_not_conflict():
    assert probe.conflicts() == []


def test_a_build_of_torch_without_cuda_is_told_from_a_missing_driver(installed, monkeypatch, tmp_path):
    installed(torch="2.13.0+cpu")
    assert "built without CUDA" in probe._row("torch", "cuda")["reason"]
    installed(torch="2.13.0")
    monkeypatch.setattr(probe, "NVIDIA_DRIVER", tmp_path / "none")
    assert "no NVIDIA driver" in probe._row("torch", "cuda")["reason"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed the process \(signal 11\)"),
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
        ("raise ImportError('no such symbol')", "cannot be loaded: ImportError: no such symbol"),
        ("print('[1, 2]')", "cannot be loaded"),
        ("print('nonsense')", "cannot be loaded"),
        ('print(\'{"reason": "no device", "command": "buy one"}\')', "no device"),
    ],
)
def test_a_driver_that_crashes_or_hangs_is_reported_and_not_met(program, reason, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{program}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(probe, "CHILD_SECONDS", 1)
    row = probe._row("tvm", "vulkan")  # a check that asks the child and nothing else
    assert not row["available"]
    with pytest.raises(probe._MissingError, match=reason):
        probe._child("ort", "vulkan")


@pytest.mark.parametrize("found", [True, False])
def test_tvm_on_opencl_says_which_device_of_which_platform_is_underneath(found, monkeypatch):
    tvm_opencl = pytest.importorskip("portlm.tvm_opencl")
    pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")

    def device():
        if not found:
            raise EngineUnavailableError(f"tvm:opencl: no OpenCL device: {tvm_opencl.HOW_TO_GET_ONE}")

    chosen = ("Box", "cpu", "Some Platform", "OpenCL 3.0, driver 7")
    monkeypatch.setattr(tvm_opencl, "device", device)
    monkeypatch.setattr(tvm_opencl, "_function", lambda name: lambda: chosen)
    answer = probe._answer("tvm", "opencl")
    if found:
        said = "Box of Some Platform, OpenCL 3.0, driver 7 (this machine's processor)"
        assert answer == {"detail": said}
    else:
        reason = "no OpenCL device: a GPU's driver brings it, and there is one for processors"
        assert answer == {"reason": reason, "command": "pip install pyopencl[pocl]"}


def test_a_probe_that_fails_itself_is_an_answer_too(monkeypatch):
    def broken(engine, device):
        raise RuntimeError("surprise")

    monkeypatch.setattr(probe, "ort", broken)
    assert probe._row("ort", "cpu")["reason"] == "RuntimeError: surprise"


def test_the_machine_is_described():
    about = probe.machine()
    assert about["cores"] >= 1
    assert about["kernels"] in ("", *about["instruction_sets"])
    if sys.platform == "linux":
        assert 0 < about["available_bytes"] <= about["memory_bytes"]


def test_vulkan_devices_have_names_and_kinds():
    for device in vulkan_devices():
        assert device.name
        assert device.kind in KINDS
        assert device.version.startswith("1.")


@pytest.fixture
def report(rows, monkeypatch):
    """What doctor examines, without trying every driver again."""
    monkeypatch.setattr(probe, "probe", lambda: list(rows.values()))
    return examine()


def test_doctor_prints_every_row_as_json(report):
    result = CliRunner().invoke(command, ["--json"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["engines"] == report["engines"]
    assert answer["versions"]["portlm"]
    assert answer["machine"]["processor"]
    assert answer["warnings"] == []


def test_doctor_prints_a_table_for_a_person(report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    missing = {
        "engine": "ort", "device": "vulkan", "available": False,
        "reason": "[no] loader", "command": "pip install 'portlm[vulkan]'", "detail": "",
    }  # fmt: skip
    monkeypatch.setattr(probe, "probe", lambda: [*report["engines"][:1], missing])
    monkeypatch.setattr(probe, "conflicts", lambda: ["two wheels clash"])
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0
    for words in (
        "torch",
        "[no] loader",
        "→ pip install 'portlm[vulkan]'",
        "processor",
        "warning: two wheels clash",
    ):
        assert words in result.stdout
