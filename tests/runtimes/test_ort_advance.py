"""ONNX Runtime's engine goes on by itself, many tokens in one call: the same ones as when each is asked for."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest, RowChoice
from portlm.errors import PortlmError, UsageError
from portlm.models import FAMILIES
from portlm.rows import Rows
from portlm.runtimes.ort import OrtEngine
from portlm.runtimes.ort_cache import LEAST_ROOM, Bound
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

BYTES = byte_tokenizer(eos="<|endoftext|>")
V = 257
PROMPTS = ["The ", "", "a much longer prompt than the others", "12"]
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2**64 - 1},
    "lengths": {"temperature": 1.0, "max_new_tokens": [1, 2, 9, 5]},
}


def opened(compiled, family, profile="fused"):
    folder = compiled[family]
    return OrtEngine.open(OpenRequest(folder, read_manifest(folder), "cpu", profile))


@pytest.fixture(scope="module")
def engine(compiled):
    return opened(compiled, "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_many_tokens_at_once_are_those_that_come_one_by_one(family, compiled, monkeypatch):
    made, advance = [], OrtEngine.advance

    def counted(self, state, asked):
        found = advance(self, state, asked)
        made.append(0 if found is None else len(found[0]))
        return found

    monkeypatch.setattr(OrtEngine, "advance", counted)
    session = Session(opened(compiled, family), BYTES)
    answers = {}
    for name, options in OPTIONS.items():
        answers[name] = session.generate(PROMPTS, **{"max_new_tokens": 9, **options})
    assert max(made) > 1, "the loop ran"
    monkeypatch.setattr(Rows, "advance", lambda *arguments: None)
    for name, options in OPTIONS.items():
        slow = session.generate(PROMPTS, **{"max_new_tokens": 9, **options})
        assert [r.token_ids for r in answers[name]] == [r.token_ids for r in slow], name


def started(engine, texts):
    """A state that has read all but the last token of some texts, and what goes on from there."""
    rows = Rows(engine, len(texts))
    rows.read_texts([text[:-1] for text in texts])
    return rows, [text[-1] for text in texts], [RowChoice(0.0, 0, 1.0, 0.0, 0, 0, 0)] * len(texts)


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


def test_the_loop_ends_at_an_end_and_with_the_context(engine):
    rows, last, choices = started(engine, [[1, 2, 3]])
    free = rows.advance(last, choices, V, frozenset(), 12, 60.0)[:, 0].tolist()
    rows, last, choices = started(engine, [[1, 2, 3]])
    ended = rows.advance(last, choices, V, frozenset({free[4]}), 12, 60.0)[:, 0].tolist()
    assert ended == free[: free.index(free[4]) + 1]
    rows, last, choices = started(engine, [[1] * (engine.context_length - 2)])
    assert len(rows.advance(last, choices, V, frozenset(), 20, 60.0)) == 3
    assert rows.advance([1], choices, V, frozenset(), 20, 60.0) is None


def test_a_token_that_stands_for_nothing_is_never_drawn(engine):
    rows, last, choices = started(engine, [[1, 2, 3]])
    best = int(rows.advance(last, choices, V, frozenset(), 1, 60.0)[0, 0])
    rows, last, choices = started(engine, [[1, 2, 3]])
    assert rows.advance(last, choices, best, frozenset(), 20, 60.0).max() < best


def test_a_copied_state_goes_on_as_if_the_other_had_not(engine):
    rows, last, choices = started(engine, [[1, 2, 3]])
    twin = rows.copy()
    first = rows.advance(last, choices, V, frozenset(), 9, 60.0)
    np.testing.assert_array_equal(twin.advance(last, choices, V, frozenset(), 9, 60.0), first)


def test_a_call_that_cannot_work_is_refused_and_the_state_stays(engine):
    rows, last, choices = started(engine, [[1, 2, 3]])
    with pytest.raises(UsageError, match="top_k"):
        rows.advance(last, [choices[0]._replace(temperature=1.0, top_k=V + 1)], V, frozenset(), 5, 1.0)
    with pytest.raises(UsageError, match="tokens"):
        rows.advance([V], choices, V, frozenset(), 5, 1.0)
    assert len(rows.advance(last, choices, V, frozenset(), 5, 60.0)) == 5


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
