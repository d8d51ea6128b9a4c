"""ONNX Runtime's engine goes on by itself, many tokens in one call: the same ones as when each is asked for."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")

from advance_cases import started

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest
from portlm.errors import PortlmError
from portlm.runtimes.ort import OrtEngine
from portlm.runtimes.ort_cache import LEAST_ROOM, Bound

V = 257


def opened(compiled, family, profile="fused"):
    folder = compiled[family]
    return OrtEngine.open(OpenRequest(folder, read_manifest(folder), "cpu", profile))


@pytest.fixture(scope="module")
def engine(compiled):
    return opened(compiled, "llama")


def test_the_loop_goes_on_where_memory_ends_and_when_its_time_is_up(engine):
    count = min(LEAST_ROOM + 9, engine.context_length - 6)
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    rows, last, choices = started(engine, texts)
    expected, step = [], last
    for _ in range(count):
        step = rows.next(step)[:, :V].argmax(1)
        expected.append(step)
    rows, last, choices = started(engine, texts)
    np.testing.assert_array_equal(rows.advance(last, choices, V, frozenset(), count, 60.0), expected)
    rows, last, choices = started(engine, texts)
    first = rows.advance(last, choices, V, frozenset(), count, 0.0)
    assert len(first) == 1
    rest = rows.advance(first[-1].tolist(), choices, V, frozenset(), count - 1, 60.0)
    np.testing.assert_array_equal(np.concatenate([first, rest]), expected)


def test_a_graph_whose_cache_is_copied_leaves_the_loop_to_others(compiled):
    rows, last, choices = started(opened(compiled, "llama", "portable"), [[1, 2, 3]])
    assert rows.advance(last, choices, V, frozenset(), 5, 60.0) is None
    assert rows.next(last).shape == (1, V)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_and_what_came_before_is_kept(
    temperature, engine, monkeypatch
):
    rows, last, choices = started(engine, [[1, 2, 3]])
    choices = [choices[0]._replace(temperature=temperature)]
    twin, logits, runs, receive, run = rows.copy(), [], [], Bound.receive, OrtEngine._run

    def received(self, *arguments):
        logits.append(receive(self, *arguments))
        return logits[-1]

    def poisoned(self, session, binding):
        run(self, session, binding)
        runs.append(binding)
        if len(runs) > 2:
            logits[-1][..., 7] = np.nan

    expected = twin.advance(last, choices, V, frozenset(), 2, 60.0)
    monkeypatch.setattr(Bound, "receive", received)
    monkeypatch.setattr(OrtEngine, "_run", poisoned)
    drawn = rows.advance(last, choices, V, frozenset(), 8, 60.0)
    np.testing.assert_array_equal(drawn, expected)
    with pytest.raises(PortlmError, match=r"ort:cpu: new token 0: .*token 7 is nan"):
        rows.copy().advance(drawn[-1].tolist(), choices, V, frozenset(), 8, 60.0)
    monkeypatch.setattr(OrtEngine, "_run", run)
    good = rows.advance(drawn[-1].tolist(), [choices[0]._replace(step=2)], V, frozenset(), 1, 60.0)
    np.testing.assert_array_equal(
        twin.advance(drawn[-1].tolist(), [choices[0]._replace(step=2)], V, frozenset(), 1, 60.0), good
    )
