"""What every engine must do alike with a state: start, reorder, crop, join, copy, and use it once."""

import numpy as np
import pytest
from engine_cases import CUDA_TARGETS, KINDS, TARGETS, open_or_skip

from portlm.engine import State
from portlm.errors import UsageError
from portlm.rows import Rows, pad
from portlm.runtimes.null import NullEngine

V = 257
TOLERANCE = 1e-4  # of fp32 logits of size 10, over batches whose sums are taken in different orders
ROUNDED = (
    0.1  # of the same with a cache of 8 bits: another order of sums may round a number to its other neighbour
)
BYTES = "cache of int8"
TEXTS = [[5, 17, 200, 3, 77, 42, 9], [9, 8], [250, 1, 2, 3]]
MORE = [11, 12, 13]


@pytest.fixture(
    scope="module",
    params=[(f, *t) for f in (*KINDS, BYTES) for t in (*TARGETS, *CUDA_TARGETS)],
    ids=":".join,
)
def engine(request):
    family, name, device, profile = request.param
    bytes_kept = family == BYTES
    folder = (
        request.getfixturevalue("byte_cache") if bytes_kept else request.getfixturevalue("compiled")[family]
    )
    engine = open_or_skip(folder, name, device, profile)
    yield engine
    engine.close()


def alone(engine, text):
    """Logits (V,) that follow a text by itself."""
    return Rows(engine, 1).read_texts([text])[0]


def assert_next(rows, engine, texts, tokens):
    """Reading one more token of each row answers as each row would by itself."""
    logits = rows.next(tokens)
    tolerance = TOLERANCE if engine.precision == "fp32" else ROUNDED
    for row, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        np.testing.assert_allclose(
            logits[row], alone(engine, [*text, token]), rtol=0, atol=tolerance, equal_nan=False
        )


def read(engine, texts):
    rows = Rows(engine, len(texts))
    rows.read_texts(texts)
    return rows


@pytest.mark.parametrize(
    "order", [[2, 0, 1], [1], [1, 2], [0, 0, 0, 2], [2, 1, 0, 1]], ids=lambda order: "-".join(map(str, order))
)
def test_rows_are_reordered_dropped_and_repeated(engine, order):
    rows = read(engine, TEXTS)
    rows.keep(order)
    texts = [TEXTS[i] for i in order]
    assert rows.lengths.tolist() == [len(text) for text in texts]
    assert_next(rows, engine, texts, MORE[:1] * len(order))


def test_leading_slots_that_no_row_uses_are_dropped(engine):
    ids, mask = pad(TEXTS)
    rows = Rows(engine, 3)
    rows.read(ids, mask)
    rows.keep([1])
    rows.next([11])
    (state,) = [value for name, value in vars(rows).items() if name == "_state"]
    assert state.past == len(TEXTS[1]) + 1


def test_repeated_rows_go_separate_ways(engine):
    """As in a beam search: each step some beams are continued twice and others not at all."""
    rows, texts = read(engine, TEXTS[:1]), TEXTS[:1]
    for order, tokens in (([0, 0, 0], [1, 2, 3]), ([2, 0, 2], [4, 5, 6]), ([1, 1, 0], [7, 8, 9])):
        rows.keep(order)
        texts = [texts[i] for i in order]
        assert_next(rows, engine, texts, tokens)
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]


@pytest.mark.parametrize("lengths", [[5, 1, 3], [7, 2, 4], [2, 2, 2], [1, 2, 1], [7, 1, 1]], ids=str)
def test_cropped_rows_are_as_if_they_had_never_read_more(engine, lengths):
    rows = read(engine, TEXTS)
    rows.crop(lengths)
    assert_next(rows, engine, [text[:n] for text, n in zip(TEXTS, lengths, strict=True)], MORE)


def test_tokens_that_were_tried_and_taken_back_leave_no_trace(engine):
    """As in lookup decoding: guess k tokens, keep those that were right, go on from there."""
    rows = read(engine, TEXTS)
    guesses = np.array([[1, 2, 3, 4]] * 3)
    rows.read(guesses, every=True)
    rows.crop([len(TEXTS[0]) + 2, len(TEXTS[1]), len(TEXTS[2]) + 4])
    texts = [TEXTS[0] + [1, 2], TEXTS[1], TEXTS[2] + [1, 2, 3, 4]]
    assert_next(rows, engine, texts, MORE)
    texts = [[*text, token] for text, token in zip(texts, MORE, strict=True)]
    assert_next(rows, engine, texts, MORE)


def test_states_of_different_lengths_join(engine):
    rows = read(engine, TEXTS[:1])
    rows.next([50])
    rows.join([read(engine, TEXTS[1:]), read(engine, [[7] * 20])])
    texts = [[*TEXTS[0], 50], *TEXTS[1:], [7] * 20]
    assert_next(rows, engine, texts, [*MORE, 14])
    rows.keep([0, 2])
    assert_next(rows, engine, [[*texts[0], MORE[0]], [*texts[2], MORE[2]]], [21, 22])


@pytest.mark.parametrize("first", [0, 1])
def test_a_copy_and_its_original_do_not_disturb_each_other(engine, first):
    """An engine may grow a state in place: both go on from the same past, one of them first."""
    rows = read(engine, TEXTS)
    twins = [rows, rows.copy()]
    tokens, texts = ([101, 102, 103], [201, 202, 203]), ([*TEXTS], [*TEXTS])
    for step in range(3):
        for which in (first, 1 - first):
            now = [token + step for token in tokens[which]]
            assert_next(twins[which], engine, texts[which], now)
            texts[which][:] = [[*text, token] for text, token in zip(texts[which], now, strict=True)]


@pytest.mark.parametrize("operation", ["keep", "crop", "join"])
def test_a_copy_outlives_what_is_done_to_its_original(engine, operation):
    rows = read(engine, TEXTS)
    twin = rows.copy()
    if operation == "keep":
        rows.keep([2, 1])
        rows.next([1, 2])
    elif operation == "crop":
        rows.crop([2, 1, 4])
        rows.next([1, 2, 3])
    else:
        rows.join([read(engine, TEXTS[:1])])
        rows.next([1, 2, 3, 4])
    assert_next(twin, engine, TEXTS, MORE)


def test_a_state_is_used_once(engine):
    for use in (
        lambda state: engine.reorder(state, [0]),
        lambda state: engine.crop(state, [0]),
        lambda state: engine.join([state, engine.start("decoder", 1)]),
    ):
        state = engine.start("decoder", 1)
        use(state)
        with pytest.raises(UsageError, match="was used before: copy it first"):
            engine.reorder(state, [0])
        with pytest.raises(UsageError, match="was used before"):
            engine.copy(state)


def test_inputs_that_are_refused_leave_the_state_as_it_was(engine):
    rows = read(engine, TEXTS)
    with pytest.raises(UsageError, match="one of tokens must be a whole number from 0 to 256, got 257"):
        rows.next([0, 1, 257])
    with pytest.raises(UsageError, match="input_ids must be from 0 to 256, got 0 to 257"):
        rows.read(np.array([[0], [1], [257]]))
    assert_next(rows, engine, TEXTS, MORE)


def test_a_state_of_another_engine_is_refused_and_stays_as_it_was(engine):
    """Another session of the same model has another engine; its states may be of another kind, or another model."""
    other = NullEngine(V, 48)
    foreign = other.start("decoder", 2)
    inputs = {
        "input_ids": np.zeros((2, 1), np.int64), "attention_mask": np.ones((2, 1), np.int64),
        "position_ids": np.zeros((2, 1), np.int64), "logits_to_keep": np.zeros(1, np.int64),
    }  # fmt: skip
    own = engine.start("decoder", 2)
    for use in (
        lambda: engine.run("decoder", inputs, foreign),
        lambda: engine.reorder(foreign, [0]),
        lambda: engine.crop(foreign, [0, 0]),
        lambda: engine.join([own, foreign]),
        lambda: engine.copy(foreign),
    ):
        with pytest.raises(UsageError, match="this state of decoder is of another engine or session"):
            use()
    other.run("decoder", inputs, foreign)
    engine.run("decoder", inputs, own)


def test_a_state_made_by_hand_is_refused(engine):
    """Its tensors could be of any number of rows, over which a graph would be broadcast without a word."""
    made = State("decoder", 3, 0, engine.start("decoder", 1).take())
    inputs = {
        "input_ids": np.zeros((3, 1), np.int64), "attention_mask": np.ones((3, 1), np.int64),
        "position_ids": np.zeros((3, 1), np.int64), "logits_to_keep": np.zeros(1, np.int64),
    }  # fmt: skip
    with pytest.raises(UsageError, match="another engine or session"):
        engine.run("decoder", inputs, made)
    own = engine.start("decoder", 1)
    for name in ("rows", "past", "role"):
        with pytest.raises(AttributeError):
            setattr(own, name, 3)
    with pytest.raises(UsageError, match=r"input_ids must be \(batch, sequence\) with a state of 1 rows"):
        engine.run("decoder", inputs, own)


ANYTHING = (
    None, True, 3, -1, 2.5, float("nan"), 10**400, 2**63, "decoder", b"01", (), [], [None], [0.5], ["0"], [[0]], {},
    {"a": 1}, {0}, object(), np.array(0), np.array([0.5]), np.zeros((1, 1)), np.zeros((1, 1), np.int64),
    range(10**9), range(2**99), iter([0]),
)  # fmt: skip


def hand_anything_to(calls, refused):
    """Call each function with every odd value: what is raised is a UsageError of one line, for at least this share."""
    messages = []
    for call in calls:
        for value in ANYTHING:
            try:
                call(value)
            except UsageError as error:
                messages.append(str(error))
    assert len(messages) > len(calls) * len(ANYTHING) * refused
    assert all("\n" not in message and len(message) < 400 for message in messages)


def test_whatever_is_handed_to_an_engine_the_answer_is_a_usage_error_or_right(engine):
    """Every argument of every operation on states, with values of every type in its place."""
    good = {
        "input_ids": np.zeros((2, 1), np.int64), "attention_mask": np.ones((2, 1), np.int64),
        "position_ids": np.zeros((2, 1), np.int64), "logits_to_keep": np.zeros(1, np.int64),
    }  # fmt: skip

    def state():
        return engine.start("decoder", 2)

    calls = [
        lambda x: engine.start(x, 1),
        lambda x: engine.start("decoder", x),
        lambda x: engine.start("decoder", 1, x),
        lambda x: engine.run(x, good, state()),
        lambda x: engine.run("decoder", x, state()),
        lambda x: engine.run("decoder", good, x),
        *(lambda x, name=name: engine.run("decoder", {**good, name: x}, state()) for name in good),
        lambda x: engine.run("decoder", {**good, x if isinstance(x, str | int) else "more": 0}, state()),
        lambda x: engine.reorder(x, [0]),
        lambda x: engine.reorder(state(), x),
        lambda x: engine.reorder(state(), [0, 1], x),
        lambda x: engine.crop(x, [0, 0]),
        lambda x: engine.crop(state(), x),
        lambda x: engine.join(x),
        lambda x: engine.join([state(), x]),
        lambda x: engine.copy(x),
    ]
    hand_anything_to(calls, refused=0.9)


def test_whatever_is_handed_to_rows_the_answer_is_a_usage_error_or_right():
    """As above, for what puts padding, masks and positions around a role."""
    engine = NullEngine(V, 48)
    calls = [
        lambda x: Rows(engine, x),
        lambda x: Rows(engine, 1, x),
        lambda x: Rows(engine, 1, given=x),
        lambda x: Rows(engine, 2).read(x),
        lambda x: Rows(engine, 2).read(np.ones((2, 1), np.int64), x),
        lambda x: Rows(engine, 2).next(x),
        lambda x: Rows(engine, 2).keep(x),
        lambda x: read(engine, TEXTS).crop(x),
        lambda x: read(engine, TEXTS).join(x),
    ]
    hand_anything_to(calls, refused=0.8)


def test_a_mask_over_an_array_hides_nothing_from_the_check():
    """numpy's masked arrays leave masked numbers out of max(), and hand them to whoever reads the memory."""
    engine = NullEngine(V, 48)
    ids = np.ma.MaskedArray(np.array([[V]]), mask=[[True]])
    inputs = {
        "input_ids": ids, "attention_mask": np.ones((1, 1), np.int64),
        "position_ids": np.zeros((1, 1), np.int64), "logits_to_keep": np.zeros(1, np.int64),
    }  # fmt: skip
    with pytest.raises(UsageError, match="input_ids must be from 0 to 256"):
        engine.run("decoder", inputs, engine.start("decoder", 1))


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda e: e.start("encoder", 1), "has no role 'encoder'"),
        (lambda e: e.start("decoder", 0), "batch must be a whole number from 1"),
        (lambda e: e.start("decoder", 1, {"memory": np.zeros(1)}), "takes no given state 'memory'"),
        (
            lambda e: e.reorder(e.start("decoder", 2), [2]),
            "one of rows must be a whole number from 0 to 1, got 2",
        ),
        (lambda e: e.reorder(e.start("decoder", 2), []), "at least one of the rows 0 to 1"),
        (lambda e: e.reorder(e.start("decoder", 2), [0], 1), "skip must be"),
        (
            lambda e: e.crop(e.start("decoder", 2), [0, 1]),
            "one of lengths must be a whole number from 0 to 0, got 1",
        ),
        (lambda e: e.crop(e.start("decoder", 2), [0]), "lengths must be 2 numbers"),
        (lambda e: e.join([]), "one or more"),
    ],
)
def test_what_cannot_be_done_with_a_state_is_an_error_that_says_so(use, words):
    with pytest.raises(UsageError, match=words):
        use(NullEngine(V, 48))
