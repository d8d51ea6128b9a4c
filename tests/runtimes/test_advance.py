"""Engines whose loop is not portlm's own go on by themselves, many tokens in one call: as when each is asked for."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from advance_cases import started
from engine_cases import KINDS, OPTIONS, PROMPTS

import portlm
from portlm.errors import UsageError
from portlm.rows import Rows

V = 257
WAYS = OPTIONS | {"the largest seed": {"temperature": 0.8, "top_k": 20, "seed": 2**64 - 1}}
PACKAGES = {"ort": "onnxruntime", "tvm": "tvm"}
CASES = [*((name, family, "fused") for name in PACKAGES for family in KINDS), ("tvm", "gpt2", "portable")]


@pytest.fixture(scope="module", params=PACKAGES)
def engine(request, compiled):
    pytest.importorskip(PACKAGES[request.param])
    with portlm.load(compiled["llama"], request.param, "cpu", "fused") as session:
        yield session.engine


@pytest.mark.parametrize(("name", "family", "profile"), CASES)
def test_many_tokens_at_once_are_those_that_come_one_by_one(name, family, profile, compiled, monkeypatch):
    pytest.importorskip(PACKAGES[name])
    with portlm.load(compiled[family], name, "cpu", profile) as session:
        made, kind = [], type(session.engine)
        advance = kind.advance

        def counted(self, state, asked):
            found = advance(self, state, asked)
            made.append(0 if found is None else len(found[0]))
            return found

        monkeypatch.setattr(kind, "advance", counted)
        answers = {}
        for option, options in WAYS.items():
            answers[option] = session.generate(PROMPTS, **{"max_new_tokens": 9, **options})
        assert max(made) > 1, "the loop ran"
        monkeypatch.setattr(Rows, "advance", lambda *arguments: None)
        for option, options in WAYS.items():
            slow = session.generate(PROMPTS, **{"max_new_tokens": 9, **options})
            assert [r.token_ids for r in answers[option]] == [r.token_ids for r in slow], option


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
