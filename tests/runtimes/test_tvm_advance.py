"""TVM's engine goes on by itself, many tokens in one call: the same ones as when each is asked for."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest, RowChoice
from portlm.errors import UsageError
from portlm.models import FAMILIES
from portlm.rows import Rows
from portlm.runtimes.session import Session
from portlm.runtimes.tvm import TvmEngine
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
    return TvmEngine.open(OpenRequest(folder, read_manifest(folder), "cpu", profile))


@pytest.fixture(scope="module")
def engine(compiled):
    return opened(compiled, "llama")


@pytest.mark.parametrize(
    ("family", "profile"), [*((family, "fused") for family in FAMILIES), ("gpt2", "portable")]
)
def test_many_tokens_at_once_are_those_that_come_one_by_one(family, profile, compiled, monkeypatch):
    made, advance = [], TvmEngine.advance

    def counted(self, state, asked):
        found = advance(self, state, asked)
        made.append(0 if found is None else len(found[0]))
        return found

    monkeypatch.setattr(TvmEngine, "advance", counted)
    session = Session(opened(compiled, family, profile), BYTES)
    answers = {}
    for name, options in OPTIONS.items():
        answers[name] = session.generate(PROMPTS, **{"max_new_tokens": 9, **options})
    assert max(made) > 1, "the loop ran"
    monkeypatch.setattr(Rows, "advance", lambda *arguments: None)
    for name, options in OPTIONS.items():
        slow = session.generate(PROMPTS, **{"max_new_tokens": 9, **options})
        assert [r.token_ids for r in answers[name]] == [r.token_ids for r in slow], name


def started(engine, texts):
    """A state that has read all but the last token of some texts of one length, and what goes on from there."""
    rows = Rows(engine, len(texts))
    rows.read_texts([text[:-1] for text in texts])
    return rows, [text[-1] for text in texts], [RowChoice(0.0, 0, 1.0, 0.0, 0, 0, 0)] * len(texts)


def test_the_loop_comes_back_when_its_time_is_up_and_goes_on_from_there(engine):
    rows, last, choices = started(engine, [[1, 2, 3], [4, 5, 6]])
    whole = rows.advance(last, choices, V, frozenset(), 12, 60.0)
    rows, last, choices = started(engine, [[1, 2, 3], [4, 5, 6]])
    first = rows.advance(last, choices, V, frozenset(), 12, 0.0)
    assert len(first) == 1
    rest = rows.advance(first[-1].tolist(), choices, V, frozenset(), 11, 60.0)
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


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
    twin = engine.copy(rows._state)
    first = rows.advance(last, choices, V, frozenset(), 9, 60.0)
    rows._state, rows.lengths = twin, rows.lengths - 9
    np.testing.assert_array_equal(rows.advance(last, choices, V, frozenset(), 9, 60.0), first)


def test_a_call_that_cannot_work_is_refused_and_the_state_stays(engine):
    rows, last, choices = started(engine, [[1, 2, 3]])
    with pytest.raises(UsageError, match="top_k"):
        rows.advance(last, [choices[0]._replace(temperature=1.0, top_k=V + 1)], V, frozenset(), 5, 1.0)
    with pytest.raises(UsageError, match="tokens"):
        rows.advance([V], choices, V, frozenset(), 5, 1.0)
    assert len(rows.advance(last, choices, V, frozenset(), 5, 60.0)) == 5


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
