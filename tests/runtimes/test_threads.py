"""The threads of a step: how many, whose setting stays, and that nothing else changes with them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import portlm
from portlm import threads as threads_module
from portlm.rows import Rows
from portlm.threads import FEW_TOKENS, GovernedThreads, cores

OWN = (
    "torch:native",
    "torch:fused",
    "torch:portable",
    "tvm:fused",
    "packed:fused",
)  # whose threads portlm sets step by step
GOVERNED = ("torch:native", "torch:fused", "torch:portable")
TARGETS = (*OWN, "tvm:portable", "ort:fused", "ort:portable")


def opened(folder, target, threads):
    engine, profile = target.split(":")
    return portlm.load(folder, engine, "cpu", profile, threads=threads)


def inside(engine, look):
    """Have the engine call look() in the middle of every call of the decoder."""
    if engine.name == "torch":
        role = engine._functions["decoder"]

        def function(*tensors, run=role.function):
            look()
            return run(*tensors)

        engine._functions["decoder"] = replace(role, function=function)
    elif engine.name == "packed":
        program = engine._programs["decoder"]

        def ran(of):
            def function(*arguments):
                look()
                return of(*arguments)

            return function

        engine._programs["decoder"] = SimpleNamespace(
            start=program.start,
            run=ran(program.run),
            advance=ran(program.advance),
            can_advance=True,
            can_score=program.can_score,
            score=ran(program.score),
        )
    else:
        library = engine._library("decoder")

        def step(*arguments, run=library.step):
            look()
            return run(*arguments)

        engine._opened["decoder"] = library._replace(step=step)


def threads_now():
    """The number of threads that a loop started here would take."""
    from portlm import _C

    count = _C.set_threads(1)
    _C.set_threads(count)
    return count


@pytest.fixture
def three_threads():
    """The caller's own setting."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from portlm import _C

    before, kernels_before = torch.get_num_threads(), threads_now()
    torch.set_num_threads(3)
    assert threads_now() == 3
    yield
    torch.set_num_threads(before)
    _C.set_threads(kernels_before)


@pytest.mark.parametrize("target", OWN)
@pytest.mark.parametrize(("asked", "taken"), [(None, 3), (1, 1), (2, 2)])
def test_a_step_takes_the_threads_that_were_asked_for_and_gives_the_callers_back(
    target, asked, taken, compiled, three_threads
):
    import torch

    seen = []
    with opened(compiled["gpt2"], target, asked) as session:
        inside(session.engine, lambda: seen.append(threads_now()))
        session.generate("hello", max_new_tokens=3)
    assert set(seen) == {taken}
    assert threads_now() == torch.get_num_threads() == 3


@pytest.mark.parametrize("target", GOVERNED)
def test_steps_of_few_tokens_run_on_one_thread_while_that_is_better(target, compiled, three_threads):
    seen = []
    with opened(compiled["gpt2"], target, None) as session:
        inside(session.engine, lambda: seen.append(threads_now()))
        session.engine._threads._governor.took = lambda *step: None
        session.engine._threads._governor.alone = True
        rows = Rows(session.engine, 2)
        rows.read(np.ones((2, FEW_TOKENS // 2), np.int64))
        rows.next(np.ones(2, np.int64))
        Rows(session.engine, 2).read(np.ones((2, FEW_TOKENS // 2 + 1), np.int64))
    assert seen == [1, 1, 3]


@pytest.mark.parametrize("target", OWN)
def test_a_step_that_fails_gives_the_callers_threads_back(target, compiled, three_threads):
    def fail():
        raise MemoryError

    with opened(compiled["gpt2"], target, 1) as session:
        inside(session.engine, fail)
        with pytest.raises(MemoryError):
            session.generate("hello", max_new_tokens=3)
    assert threads_now() == 3


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(threads_module.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(threads_module, "cores", lambda: 2)
    return Clock


def steps(threads, clock, seconds):
    """Run steps that take so long; return on how many threads each ran, 0 for the caller's own setting."""
    used, setting = [], [0]

    def use(count):
        before, setting[0] = setting[0], count
        return before

    chosen = GovernedThreads(use, threads)
    for length in seconds:
        with chosen.governed_step("decoder", np.zeros((1, 1))):
            used.append(setting[0])
            clock.now += length
        assert setting == [0]
    return used


def test_after_a_step_that_waited_long_the_next_run_on_one_thread(clock):
    assert steps(None, clock, [0.005] * 5 + [0.2] + [0.005] * 20) == [0] * 6 + [1] * 20


def test_a_number_that_the_user_chose_is_kept_whatever_happens(clock):
    assert steps(4, clock, [0.005] * 5 + [0.2] + [0.005] * 20) == [4] * 26


def test_on_an_idle_machine_no_setting_is_touched(clock):
    assert steps(None, clock, [0.005] * 200) == [0] * 200


def test_cores_are_those_that_this_process_may_use():
    assert cores() >= 1


# --- results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_results_are_the_same_bits_on_any_number_of_threads_where_products_are_not_pytorchs(target, wide):
    engine = target.partition(":")[0]
    pytest.importorskip({"ort": "onnxruntime", "packed": "portlm._C"}.get(engine, engine))
    found = []
    for threads in (1, 2, 3):
        with opened(wide, target, threads) as session:
            rows = Rows(session.engine, 3)
            ids = np.arange(60, dtype=np.int64).reshape(3, 20)
            logits = [rows.read(ids)] + [rows.next(np.array([5, 6, 7]) * i) for i in range(3)]
        found.append(np.concatenate([array.reshape(3, -1) for array in logits], axis=1))
    for other in found[1:]:
        if (
            target == "torch:portable"
        ):  # PyTorch's products: on Intel's processors MKL divides a long sum among threads
            assert (
                np.abs(other - found[0]).max() <= 1e-5 * np.abs(found[0]).max()
            )  # sums of 1024 in another order
        else:
            assert np.array_equal(found[0], other)
