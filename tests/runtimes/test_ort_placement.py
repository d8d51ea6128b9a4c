"""Where ONNX Runtime's nodes run, and how its threads wait: a node that a device lacks is an error that names it."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from engine_cases import needs_ort

from portlm import ort_support
from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.errors import (
    EngineUnavailableError,
    PlacementError,
)
from portlm.flows.load import load
from portlm.runtimes import engine_class


@pytest.fixture
def det(artifacts, tmp_path):
    """The artifact with a node that the WebGPU provider does not have."""
    onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

    artifact = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    path = artifact / "onnx/decoder.portable.onnx"
    model = onnx.load_model(path, load_external_data=False)
    graph = model.graph
    logits = next(node for node in graph.node if "logits" in node.output)
    logits.output[list(logits.output).index("logits")] = "raw"
    # The determinant of the 1 x 1 matrix of each logit is the logit.
    graph.node.append(onnx.helper.make_node("Unsqueeze", ["raw", "where"], ["matrices"], name="lift"))
    graph.node.append(onnx.helper.make_node("Det", ["matrices"], ["logits"], name="culprit"))
    graph.initializer.append(onnx.helper.make_tensor("where", onnx.TensorProto.INT64, [2], [3, 4]))
    path.write_bytes(model.SerializeToString())
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    return artifact


def load_vulkan(folder, allow_fallback=False):
    """A session on the engine itself, which takes graphs that `load` refuses because portlm never writes them."""
    from portlm.engine import OpenRequest
    from portlm.runtimes.session import Session
    from portlm.tokenizer import Tokenizer

    request = OpenRequest(folder, read_manifest(folder), "vulkan", "portable", allow_fallback)
    try:
        engine = engine_class("ort").open(request)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    return Session(engine, Tokenizer.load(folder), frozenset())


def test_a_node_that_the_device_lacks_is_an_error_that_names_it(det):
    with pytest.raises(PlacementError, match=r"1 of \d+ nodes cannot run on vulkan.*culprit \(Det\)"):
        load_vulkan(det)


def test_with_allow_fallback_it_runs_on_the_cpu_and_is_reported(det, artifacts):
    with load_vulkan(det, allow_fallback=True) as session:
        placement = session.placement()
        tokens = session.generate("hello", max_new_tokens=6).token_ids
    assert placement.fallback == ("culprit (Det)",)
    assert placement.nodes["cpu"] == 1
    assert placement.nodes["vulkan"] > 50
    with load(artifacts["gpt2"], "torch", "cpu") as session:
        assert session.generate("hello", max_new_tokens=6).token_ids == tokens


def test_a_software_device_is_said_to_be_one(artifacts):
    from portlm.runtimes.vulkan import vulkan_devices

    with load_vulkan(artifacts["gpt2"]) as session:
        software = all(device.kind == "software" for device in vulkan_devices())
        assert ("software device" in session.placement().note) == software


@needs_ort
def test_the_switch_for_software_devices_does_not_stay_in_the_environment(artifacts, monkeypatch):
    import os

    from portlm.runtimes.ort_devices import SOFTWARE_ADAPTER

    monkeypatch.delenv(SOFTWARE_ADAPTER, raising=False)
    load_vulkan(artifacts["gpt2"]).close()
    assert SOFTWARE_ADAPTER not in os.environ


@needs_ort
@pytest.mark.parametrize(
    ("said", "running", "spins", "microseconds"),
    [
        (None, 1, "1", "1000"),
        (None, 1000, "0", None),
        ("0", 1, "0", None),
        ("1", 1000, "1", None),
    ],
)
def test_threads_of_onnx_runtime_spin_for_a_bounded_time_unless_asked_or_crowded(
    said, running, spins, microseconds, artifacts, monkeypatch
):
    monkeypatch.setattr(ort_support, "_running", lambda: running)
    monkeypatch.delenv("PORTLM_ORT_SPINNING", raising=False)
    if said is not None:
        monkeypatch.setenv("PORTLM_ORT_SPINNING", said)
    with load(artifacts["gpt2"], "ort", threads=1) as session:
        options = session.engine._session("decoder").get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
    duration = "session.intra_op.spin_duration_us"
    if microseconds is None:
        with pytest.raises(RuntimeError, match=duration):
            options.get_session_config_entry(duration)
    else:
        assert options.get_session_config_entry(duration) == microseconds


@pytest.mark.parametrize(
    ("said", "crowded"),
    [
        ("17.00 9.00 4.00 1/128 99\n", False),  # what made the load has ended
        ("0.00 0.00 0.00 3/128 99\n", True),  # it has only begun
        ("17.00 9.00 4.00 2/128 99\n", False),  # a thread for each core, this one among them
        ("17.00 9.00 4.00 0/0 0\n", True),  # a system that counts nobody: the load stands for it
        ("17.00\n", True),
        (None, True),
    ],
)
def test_a_machine_is_crowded_by_what_runs_now_and_by_its_load_only_where_nothing_says_that(
    said, crowded, tmp_path, monkeypatch
):
    path = tmp_path / "loadavg"
    if said is not None:
        path.write_text(said)
    monkeypatch.setattr(ort_support, "LOADAVG", path)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (17.0, 9.0, 4.0), raising=False)
    assert ort_support._crowded() is crowded


def test_a_thread_that_woke_up_for_a_moment_crowds_nobody(monkeypatch):
    class Loadavg:
        running = iter([1, 9, 1, 9, 1, 9, 9, 9])

        def read_text(self):
            return f"0.00 0.00 0.00 {next(self.running)}/128 99\n"

    monkeypatch.setattr(ort_support, "LOADAVG", Loadavg())
    monkeypatch.setattr(ort_support, "LONGEST_LOOK", 60.0)  # this machine may be slow
    assert ort_support._running() == 1


def test_a_process_that_is_set_aside_for_longer_than_it_may_look_looks_once(tmp_path, monkeypatch):
    (tmp_path / "loadavg").write_text("0.00 0.00 0.00 7/128 99\n")
    monkeypatch.setattr(ort_support, "LOADAVG", tmp_path / "loadavg")
    monkeypatch.setattr(ort_support, "LONGEST_LOOK", -1.0)  # over before the first look
    assert ort_support._running() == 7


@pytest.mark.skipif(not ort_support.LOADAVG.exists(), reason="this system has no /proc/loadavg")
def test_busy_programs_are_seen_as_soon_as_they_run():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() + 1)]
    try:
        deadline = time.monotonic() + 30  # to start them, on a machine with other work
        while not (seen := ort_support._crowded()) and time.monotonic() < deadline:
            pass
    finally:
        for program in busy:
            program.kill()
            program.wait()
    assert seen
