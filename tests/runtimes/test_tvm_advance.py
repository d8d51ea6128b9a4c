"""TVM's engine goes on by itself, many tokens in one call: the same ones as when each is asked for."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")

from advance_cases import started

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest, RowChoice
from portlm.runtimes.tvm import TvmEngine

V = 257


def opened(compiled, family, profile="fused"):
    folder = compiled[family]
    return TvmEngine.open(OpenRequest(folder, read_manifest(folder), "cpu", profile))


@pytest.fixture(scope="module")
def engine(compiled):
    return opened(compiled, "llama")


def test_the_loop_comes_back_when_its_time_is_up_and_goes_on_from_there(engine):
    rows, last, choices = started(engine, [[1, 2, 3], [4, 5, 6]])
    whole = rows.advance(last, choices, V, frozenset(), 12, 60.0)
    rows, last, choices = started(engine, [[1, 2, 3], [4, 5, 6]])
    first = rows.advance(last, choices, V, frozenset(), 12, 0.0)
    assert len(first) == 1
    rest = rows.advance(first[-1].tolist(), choices, V, frozenset(), 11, 60.0)
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


def test_logits_that_are_no_numbers_are_an_error_and_what_came_before_is_kept(engine):
    """The library's own function is called with a step that answers with NaN from its third call on."""
    import tvm_ffi

    from portlm.runtimes.tvm_advance import Plan, advance

    calls = []

    def step(ids, state):
        calls.append(np.from_dlpack(ids).copy())
        logits = np.zeros((1, 1, 5), np.float32)
        logits[..., len(calls)] = 1
        logits[...] *= np.nan if len(calls) > 2 else 1
        results = [tvm_ffi.from_dlpack(logits), tvm_ffi.from_dlpack(np.full((1, 1), len(calls), np.float32))]
        return tvm_ffi.convert(results)

    plan = Plan((-1, 0), (1,), 0, ("state",))
    asked = engine_call([3])
    state = {"state": tvm_ffi.from_dlpack(np.zeros((1, 1), np.float32))}
    function = tvm_ffi.get_global_func("portlm.advance")
    drawn, bad, results = advance(function, tvm_ffi.convert(step), plan, state, 0, asked, 8)
    assert drawn[:, 0].tolist() == [1, 2]
    assert [call.item() for call in calls] == [3, 1, 2]
    assert bad == 0
    assert np.from_dlpack(results[1]).item() == 2, "the state before the step that failed"


def engine_call(tokens):
    from portlm.engine import Advance

    choices = [RowChoice(0.0, 0, 1.0, 0.0, 0, 0, 0)] * len(tokens)
    return Advance(np.zeros(len(tokens), np.int64), np.array(tokens), choices, 5, frozenset(), 8, 60.0)


def test_a_step_that_fails_is_the_error_it_raised(engine):
    import tvm_ffi

    from portlm.runtimes.tvm_advance import Plan, advance

    def step(ids, state):
        raise ValueError("no memory, say")

    state = {"state": tvm_ffi.from_dlpack(np.zeros((1, 1), np.float32))}
    function = tvm_ffi.get_global_func("portlm.advance")
    with pytest.raises(ValueError, match="no memory, say"):
        advance(
            function, tvm_ffi.convert(step), Plan((-1, 0), (1,), 0, ("state",)), state, 0, engine_call([3]), 8
        )
