"""ONNX Runtime's engine goes on by itself, many tokens in one call: the same ones as when each is asked for."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")

from advance_cases import started

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest
from portlm.errors import PortlmError
from portlm.ops.compiled import kernels
from portlm.ops.token_selection import select_tokens
from portlm.runtimes.ort import OrtEngine
from portlm.runtimes.ort_cache import LEAST_ROOM, Bound, Cache

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


def kernel_calls():
    return sum(kernels.kernel_calls()["select_tokens"].values()) if kernels else 0


@pytest.mark.parametrize(
    "texts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6, 7, 8]]], ids=len
)
@pytest.mark.parametrize("vocabulary", [V, V - 60])
@pytest.mark.parametrize("alike", [True, False])
def test_the_tokens_are_those_that_select_tokens_draws(texts, vocabulary, alike, engine):
    """One row, rows that begin together and rows that do not; settings of all or of each; ids that nobody may draw."""
    rows, last, choices = started(engine, texts)
    choices = [
        choice._replace(temperature=1.0, top_k=9 if alike else 9 + i, seed=5 + i, stream=i, step=2)
        for i, choice in enumerate(choices)
    ]
    expected, step = [], last
    for n in range(5):
        logits = rows.next(step)[:, :vocabulary]
        step = [
            int(select_tokens(logits[i : i + 1], *c[:4], c.seed, c.step + n, [c.stream])[0])
            for i, c in enumerate(choices)
        ]
        expected.append(step)
    rows, last, _ = started(engine, texts)
    before = kernel_calls()
    np.testing.assert_array_equal(rows.advance(last, choices, vocabulary, frozenset(), 5, 60.0), expected)
    calls = 5 if alike or len(texts) == 1 else 5 * len(texts)
    assert kernel_calls() - before == (calls if kernels else 0)


def test_memory_that_was_lent_is_not_taken_for_an_input_of_its_own():
    class Session:
        """Takes bindings down."""

        def __init__(self):
            self.bound = {}

        def io_binding(self):
            return self

        def get_modelmeta(self):
            return SimpleNamespace(custom_metadata_map={})

        def bind_input(self, name, device, index, dtype, shape, address):
            self.bound[name] = shape, address

    session = Session()
    bound = Bound(session, Cache({}, 1, 1), slice(None), [], [])
    ones = np.ones((1, 6), np.int64)
    for shape in ((1, 4), (1, 5)):
        bound.lend("mask", ones, shape)
        assert session.bound["mask"] == (shape, ones.ctypes.data)
    zeros = np.zeros((1, 6), np.int64)
    held = bound.put("mask", zeros)  # as large as what is lent, of which five were bound
    assert session.bound["mask"] == ((1, 6), held.ctypes.data)
    bound.lend("mask", ones, (1, 4))
    assert bound.put("mask", zeros) is not held
    assert ones.all()


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
