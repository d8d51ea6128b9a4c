"""A process that forks after a model was loaded and used: the child goes on where that can work, or is told why not.

Everything happens in processes of its own, with a deadline, because what is wrong here hangs.
"""

import os
import subprocess
import sys

import pytest

import portlm
from portlm.errors import UsageError

if not hasattr(os, "fork"):
    pytest.skip("this system forks no processes", allow_module_level=True)

PACKAGES = {"ort": "onnxruntime", "packed": "portlm._C"}
TARGETS = (
    "torch:native",
    "torch:portable",
    "tvm:fused",
    "ort:fused",
    "packed:fused",
)  # each runs its loops in another way

START = """
import os, signal, sys, threading, time
folder, engine, profile, threads = sys.argv[1:5]
import numpy as np, portlm
session = portlm.load(folder, engine, "cpu", profile, threads=int(threads) or None)
prompt = list(range(100, 140))  # enough for loops on several threads
answer = session.generate(prompt, max_new_tokens=6).token_ids


def child(body):
    "Run body in a forked child; it must end within the deadline, with 0."
    pid = os.fork()
    if not pid:
        body()
        sys.exit(0)  # through the end of a program, where everything is freed
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    sys.exit("the child hangs")


def same():
    assert session.generate(prompt, max_new_tokens=6).token_ids == answer
"""

# each in one child or more; together, because starting and loading takes longer than all of them
CLAIMS = """
child(same); same()  # the child gives the same tokens, and so does the parent after it
child(lambda: (same(), child(same), same()))  # a child of the child, too
child(lambda: None)  # one that only ends
child(lambda: (session.close(), globals().pop("session")))  # one that lets go of it


def state_goes_on():
    # The child has one thread; among several, MKL divides long sums of PyTorch's own products (the portable profile).
    tolerance = 1e-5 * np.abs(expected).max() if (engine, profile) == ("torch", "portable") else 0.0
    assert np.abs(other.next(steps) - expected).max() <= tolerance


from portlm.rows import Rows
rows, steps = Rows(session.engine, 2), np.array([1, 2])
rows.read(np.array([prompt, prompt]))
other = rows.copy()
expected = rows.next(steps)
child(state_goes_on)


def in_a_thread():
    failed = []
    def run():
        try:
            same()
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=run)
    thread.start(); thread.join()
    assert not failed, failed


child(in_a_thread)


def load_again():
    with portlm.load(folder, engine, "cpu", profile) as another:
        assert another.generate(prompt, max_new_tokens=6).token_ids == answer


session.close()
del session, rows, other
child(load_again)
"""


def run(program, folder, target, threads):
    engine, profile = target.split(":")
    pytest.importorskip(PACKAGES.get(engine, engine))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {"OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-c", START + program, str(folder), engine, profile, str(threads)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_forked_child_gives_the_same_tokens_and_ends(target, wide):
    done = run(CLAIMS, wide, target, 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["torch:native", "tvm:fused", "ort:fused"])
def test_a_forked_child_goes_on_where_the_user_chose_the_number_of_threads(target, wide):
    done = run("child(same)", wide, target, 2)
    assert done.returncode == 0, done.stderr


def test_a_lock_that_another_thread_held_is_not_held_in_the_child(wide):
    pytest.importorskip("tvm", reason="apache-tvm is missing: pip install portlm[tvm]")
    done = run("with session.engine._lock: child(same)", wide, "tvm:fused", 0)
    assert done.returncode == 0, done.stderr


def test_a_fork_before_any_engine_is_open_changes_nothing(wide):
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    program = (
        "import os, sys, torch, portlm.threads, portlm.runtimes.eager\n"
        "torch.set_num_threads(3)\n"
        "pid = os.fork()\n"
        "if not pid: os._exit(torch.get_num_threads())\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_engine_on_a_device_says_in_a_forked_child_that_it_cannot_go_on(artifacts):
    with portlm.load(artifacts["gpt2"], engine="null") as session:
        session.engine.device = "cuda"
        session.engine.enter_child()
        with pytest.raises(
            UsageError, match="null:cuda: a forked process cannot use the device of its parent"
        ):
            session.generate("hello", max_new_tokens=2)
