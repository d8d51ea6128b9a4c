"""The kernels' own threads: loops on them, and what a process with such threads must still be able to do."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import portlm

ROOT = Path(__file__).parents[2]
LOADED = """
import os, sys, threading
folder, threads = sys.argv[1], int(sys.argv[2])
import portlm, portlm._C
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
with portlm.load(folder, "packed", "cpu", "fused", threads=threads or None) as session:
    tokens = session.generate(list(range(40)), max_new_tokens=8).token_ids
print(before, count(), *tokens)
"""


def test_loops_on_the_pool_visit_everything_once_and_race_with_nothing(tmp_path):
    """From three threads at once, nested, throwing and in a forked child, under the thread sanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is needed to build the program, and is not installed")
    program = tmp_path / "pool_loops"
    sources = [Path(__file__).with_name("pool_loops.cpp"), ROOT / "csrc" / "cpu" / "pool.cpp"]
    flags = ["-std=c++17", "-O1", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run(
        [compiler, *flags, *map(str, sources), "-o", str(program)], capture_output=True, text=True
    )
    if "tsan" in built.stderr:
        pytest.skip("the thread sanitizer is not installed")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program), "500"], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr


def generated(folder, threads, prefix=()):
    """Load and generate in a process of its own; return its threads after the import, at the end, and the tokens."""
    pytest.importorskip("portlm._C", reason="portlm's kernels are not built")
    if not Path("/proc/self/task").is_dir():
        pytest.skip("this system does not list the threads of a process")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "OPENBLAS"))}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", LOADED, str(folder), str(threads)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after, *tokens = map(int, done.stdout.split())
    return before, after, tokens


def test_threads_begin_with_the_first_loop_on_several_and_end_with_the_process(wide):
    before, after, tokens = generated(wide, 3)
    assert (before, after) == (1, 3)
    before, after, alone = generated(wide, 1)
    assert (before, after) == (1, 1)
    assert tokens == alone


def test_on_one_core_no_thread_is_begun(wide):
    if shutil.which("taskset") is None:
        pytest.skip("taskset is not installed")
    core = min(os.sched_getaffinity(0))
    before, after, _ = generated(wide, 0, ("taskset", "-c", str(core)))
    assert (before, after) == (1, 1)


def test_engines_in_two_threads_at_once_give_the_tokens_that_they_give_alone(wide):
    pytest.importorskip("portlm._C", reason="portlm's kernels are not built")
    prompts, found = [list(range(40)), list(range(5, 30))], {}
    sessions = [portlm.load(wide, "packed", "cpu", "fused", threads=3) for _ in prompts]
    alone = [s.generate(p, max_new_tokens=20).token_ids for s, p in zip(sessions, prompts, strict=True)]

    def generate(i):
        found[i] = [sessions[i].generate(prompts[i], max_new_tokens=20).token_ids for _ in range(5)]

    callers = [threading.Thread(target=generate, args=(i,)) for i in range(len(prompts))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == {i: [tokens] * 5 for i, tokens in enumerate(alone)}
    for session in sessions:
        session.close()
