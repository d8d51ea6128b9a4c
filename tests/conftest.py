"""Tiny models that several test folders share, and the proof that a test which is about a kernel ran it.

`make test` runs the files of tests in two processes (pytest-xdist), which share what takes long to make.
"""

import fcntl
import os
import shutil
import signal
import sys
from collections import Counter
from functools import partial, wraps
from pathlib import Path

import hypothesis
import pytest

from portlm.threads import bound_spinning

hypothesis.settings.register_profile("portlm", deadline=None)  # no test fails because the machine is busy
hypothesis.settings.load_profile("portlm")

sys.path.insert(0, str(Path(__file__).parent / "shared"))  # for what test files of several folders share
pytest.register_assert_rewrite(
    "recurrent_layers", "recurrent_cells", "cuda_twins"
)  # tests that several files import

USUAL = (
    "gpt2",
    "llama",
)  # made before any test that asks for families: some change what it would be made with


def pytest_configure():
    """Let signals through that whoever started the tests ignores, as nohup and a shell's & do: children inherit it.

    Threads that wait do not spin for long, or those of one process would keep another's from their work.
    """
    bound_spinning()
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, action)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test marked ``runs_kernel(*names, on=...)`` that passes without calling every kernel it names.

    A reference gives the right answer, too: where an op took it by mistake, an accuracy test compares it with itself.
    ``on`` is an instruction set or "cuda", emulated or not; without it, the one that the kernels chose on this machine.
    """
    marker = item.get_closest_marker("runs_kernel")
    if marker is None or item.get_closest_marker("no_kernel"):
        return (yield)
    from portlm.ops.compiled import kernels

    if kernels is None:
        pytest.skip("portlm._C was not built")
    where = marker.kwargs.get("on") or kernels.isa()

    def count():
        found = Counter(
            {name: calls[where] for name, calls in kernels.kernel_calls().items() if where in calls}
        )
        if where == "cuda" and "cuda_on_cpu" in sys.modules:
            found.update(sys.modules["cuda_on_cpu"].calls)
        return found

    before = count()
    result = yield
    after = count()
    missed = [name for name in marker.args if after[name] == before[name]]
    if missed:
        pytest.fail(
            f"no call of kernel {', '.join(missed)} ({where}), of {', '.join(marker.args)} that this test is about: "
            "it has seen the reference, and nothing else. A test that is meant to run without a kernel says why "
            "with @pytest.mark.no_kernel(reason).",
            pytrace=False,
        )
    return result


def pytest_collection_modifyitems(items):
    """Refuse an opt-out without a reason, before anything runs."""
    for item in items:
        for marker in item.iter_markers("no_kernel"):
            if len(marker.args) != 1 or not isinstance(marker.args[0], str):
                raise pytest.UsageError(f"{item.nodeid}: say why: @pytest.mark.no_kernel(reason)")


def _kernel_calls():
    """Calls in this process by kernel and instruction set; empty if none was loaded."""
    compiled = sys.modules.get("portlm.ops.compiled")
    return compiled.kernels.kernel_calls() if compiled is not None and compiled.kernels is not None else {}


_calls_elsewhere = []  # what pytest-xdist's processes said of their kernels when they ended


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take what the process behind a node leaves."""
    _calls_elsewhere.append(getattr(node, "workeroutput", {}).get("kernel_calls", {}))


def pytest_sessionfinish(session):
    """Have the process that started this one add up kernel calls."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernel_calls"] = _kernel_calls()


def pytest_terminal_summary(terminalreporter):
    """Say how often kernels were called by the tests and, with -v, which never were."""
    total, used, known = Counter(), set(), set()
    for counts in (_kernel_calls(), *_calls_elsewhere):
        for name, calls in counts.items():
            known.add(name)
            total.update(calls)
            if any(calls.values()):
                used.add(name)
    if not known:
        return
    ran = ", ".join(f"{where} {calls}" for where, calls in total.items() if calls) or "none"
    terminalreporter.write_line(f"kernel calls: {ran}")
    if terminalreporter.config.option.verbose > 0:
        terminalreporter.write_line(f"kernels never called: {', '.join(sorted(known - used)) or 'none'}")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all processes of this run of the tests have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(shared_folder):
    """Function (name, make) -> the folder of that name, which make(folder) creates in the first process that asks."""

    def folder(name, make):
        path, done = shared_folder / name, shared_folder / f"{name}.done"
        path.parent.mkdir(exist_ok=True)
        with (shared_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # of one that failed
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv(
                        "PORTLM_HOME", str(shared_folder / "home")
                    )  # a test may have one of its own by now
                    make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_trust_store(shared_folder):
    """Compiled code is trusted through a folder in the user's home: tests use one of their own."""
    home = shared_folder / "home"
    home.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTLM_HOME", str(home))
        yield


@pytest.fixture(scope="session", autouse=True)
def _drivers_tried_once():
    """Which engines run here is found out by starting some of them in new processes, for seconds: once is enough."""
    from portlm.runtimes import probe

    known, tried = {}, probe._child

    @wraps(tried)
    def child(*pair):
        if pair not in known:
            try:
                known[pair] = tried(*pair)
            except Exception as error:
                known[pair] = error
        if isinstance(known[pair], Exception):
            raise known[pair]
        return known[pair]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_child", child)
        yield


@pytest.fixture(scope="session")
def checkpoints(once):
    """Folder of a random checkpoint by family, with a tokenizer of 256 bytes and an end of text.

    Weights are large, so that logits reach 7 and the two most probable tokens are rarely closer than 0.01: engines
    that differ by rounding still choose the same token.
    """
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from made import Made
    from random_weights import save_random

    from portlm.models import DECODERS

    others = {"gpt2": {"width": 32}, "llama": {"hidden": 48}}  # what some tests count on
    # Heads of 8 elements, as ONNX Runtime's attention on a cache in place wants them.
    others |= {"gpt3": {"width": 32}, "gpt_neo": {"width": 32}, "opt": {"width": 32, "token_width": 32}}
    others |= {"openai-gpt": {"width": 32}}

    def make(family):
        make_it = partial(save_random, family=family, scale=0.3, **others.get(family, {}))
        return once(f"checkpoints/{family}", make_it)

    return Made(DECODERS, make, USUAL)


@pytest.fixture(scope="session")
def foreign():
    """The module tests/foreign/models.py, which makes models that nobody here shaped."""
    import importlib.util

    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    path = Path(__file__).parent / "foreign" / "models.py"
    spec = importlib.util.spec_from_file_location("foreign_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def artifacts(checkpoints, once):
    """Folder of the exported checkpoint by family. Tests that change one copy it first."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from made import Made

    from portlm.compile.export import export

    return Made(
        checkpoints, lambda family: once(f"artifact-{family}", partial(export, checkpoints[family])), USUAL
    )


@pytest.fixture(scope="session")
def compile_all():
    """Function: compiles an artifact for every engine and device, or those given, that this machine can compile for."""
    from portlm.compile.build import COMPILERS, build
    from portlm.errors import EngineUnavailableError

    def compile_for(artifact, devices=None):
        for key in COMPILERS:
            if devices is None or key[1] in devices:
                try:
                    build(artifact, [key])
                except EngineUnavailableError:
                    continue  # the tests of that engine say what is missing

    return compile_for


@pytest.fixture(scope="session")
def compiled(artifacts, compile_all, once):
    """Folder of the artifact by family, compiled for every engine and device that this machine can compile for."""

    from made import Made

    def make(family, folder):
        compile_all(shutil.copytree(artifacts[family], folder))

    return Made(artifacts, lambda family: once(f"compiled-{family}", partial(make, family)), USUAL)


@pytest.fixture(scope="session")
def packed(artifacts, once):
    """Folder of the artifact by family, compiled for the packed engine alone, which takes next to no time."""
    from made import Made
    from packable import PACKED

    from portlm.compile.build import build

    def make(family, folder):
        build(shutil.copytree(artifacts[family], folder), [("packed", "cpu", "fused")])

    return Made(PACKED, lambda family: once(f"packed-{family}", partial(make, family)), USUAL)


@pytest.fixture(scope="session")
def byte_cache(checkpoints, compile_all, once):
    """Artifact of a LLaMA that keeps keys and values in 8 bits, compiled for every engine here on the CPU."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    return once(
        "byte-cache",
        lambda folder: compile_all(export(checkpoints["llama"], folder, cache="int8"), ["cpu"]),
    )


@pytest.fixture(scope="session")
def divisible(once):
    """Folder of a random checkpoint by family, whose matrices have inputs that groups of 32 divide.

    GPT-2 is tied and has an odd number of groups; weights are as large as those of `checkpoints`.
    """
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from made import Made
    from random_weights import save_random

    from portlm.models import DECODERS

    wide, others = ("gpt2", "gpt3", "openai-gpt"), {"width": 64, "hidden": 96}

    def make(family):
        sizes = {"width": 96} if family in wide else others
        make_it = partial(save_random, family=family, scale=0.2, **sizes)
        return once(f"divisible/{family}", make_it)

    return Made(DECODERS, make, USUAL)


@pytest.fixture(scope="session")
def quantized(divisible, once):
    """Function (family, "int4" or "int8", asymmetric) -> an artifact in groups of 32. Copy it to change it."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    def artifact(family, quantize, asymmetric=False):
        make = partial(export, divisible[family], quantize=quantize, group=32, asymmetric=asymmetric)
        return once(f"quantized-{family}-{quantize}-{asymmetric}", make)

    return artifact
