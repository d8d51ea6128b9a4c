"""What every engine must do alike, asked of each that this machine has."""

import numpy as np
import pytest
from engine_cases import CUDA_TARGETS, KINDS, TARGETS, open_or_skip
from whole_logits import CONTEXT, V, assert_close, call, feed, random_ids

from portlm.errors import PortlmError
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

BYTES = byte_tokenizer(eos="<|endoftext|>")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, compiled):
    return compiled[request.param]


@pytest.fixture(scope="module")
def eager(folder):
    engine = open_or_skip(folder, "torch", "cpu", "native")
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=(*TARGETS, *CUDA_TARGETS), ids=":".join)
def engine(request, folder):
    engine = open_or_skip(folder, *request.param)
    yield engine
    engine.close()


def test_it_says_what_it_is(engine, request):
    name, device, profile = request.node.callspec.params["engine"]
    assert (engine.name, engine.device, engine.profile, engine.precision) == (name, device, profile, "fp32")
    assert (engine.vocab_size, engine.context_length) == (V, CONTEXT)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 17), (3, 5), (1, CONTEXT), (2, CONTEXT)])
def test_logits_equal_eager_pytorch(engine, eager, B, T):
    ids = random_ids(B, T)
    assert_close(feed(engine, ids), feed(eager, ids))


@pytest.mark.parametrize("cuts", [range(1, 12), (5,), (1, 7, 8)], ids=["singly", "in two", "unevenly"])
def test_tokens_at_once_equal_tokens_in_steps(engine, cuts):
    ids = random_ids(2, 12, seed=1)
    assert_close(feed(engine, ids, cuts), feed(engine, ids))


@pytest.mark.parametrize(
    "cuts", [(), (9,), (3, 9, 10)], ids=["at once", "in two", "a step of nothing but padding"]
)
def test_a_ragged_batch_equals_its_rows_alone(engine, cuts):
    ids, lengths = random_ids(4, 12, seed=2), [12, 1, 7, 3]
    together = feed(engine, ids, cuts, lengths)
    for b, length in enumerate(lengths):
        assert_close(together[b, -length:], feed(engine, ids[b : b + 1, -length:])[0])


def test_padding_is_never_nan(engine):
    assert np.isfinite(feed(engine, random_ids(2, 10), (4,), [10, 2])).all()


def test_a_finished_row_that_is_masked_out_disturbs_no_other(engine):
    ids = random_ids(2, 8, seed=3)
    mask = np.ones((2, 8), np.int64)
    _, state = call(
        engine, ids[:, :5], np.tile(np.arange(5), (2, 1)), mask[:, :5], engine.start("decoder", 2)
    )
    mask[1, 5:] = 0
    answers = []
    for t in range(5, 8):
        places = np.array([[t], [4]])
        logits, state = call(engine, ids[:, t : t + 1] * [[1], [0]], places, mask[:, : t + 1], state)
        answers.append(np.array(logits))
    assert np.isfinite(answers).all()
    assert_close(np.concatenate(answers, axis=1)[0], feed(engine, ids[:1])[0, 5:])


def test_two_generations_at_once_do_not_meet(engine):
    one, two = random_ids(1, 8, seed=4), random_ids(3, 8, seed=5)
    expected = feed(engine, one)[:, -1], feed(engine, two)[:, -1]
    states = [engine.start("decoder", 1), engine.start("decoder", 3)]
    engine.start("decoder", 3)  # asking again is harmless
    for t in range(8):
        for i, ids in enumerate((one, two)):
            B = len(ids)
            places, mask = np.full((B, 1), t), np.ones((B, t + 1), np.int64)
            logits, states[i] = call(engine, ids[:, t : t + 1], places, mask, states[i])
            if t == 7:
                assert_close(logits[:, -1], expected[i])


@pytest.mark.parametrize(
    ("token", "position", "mask"), [(V, 0, 1), (-1, 0, 1), (0, CONTEXT, 1), (0, -1, 1), (0, 0, 2)]
)
def test_an_index_outside_the_models_tables_is_an_error_not_a_crash(engine, token, position, mask):
    with pytest.raises(PortlmError):
        call(
            engine,
            np.array([[token]]),
            np.array([[position]]),
            np.array([[mask]]),
            engine.start("decoder", 1),
        )


@pytest.mark.parametrize(
    "shapes", [((1, 2), (1, 1), (1, 2)), ((2, 1), (2, 1), (1, 1)), ((1, 2), (1, 2), (1, 1))]
)
def test_shapes_that_do_not_belong_together_are_an_error_not_a_crash(engine, shapes):
    with pytest.raises(PortlmError):
        call(engine, *(np.zeros(shape, np.int64) for shape in shapes), engine.start("decoder", 1))


def test_more_tokens_than_the_context_are_an_error_not_a_crash(engine):
    ids = random_ids(1, CONTEXT)
    state = engine.start("decoder", 1)
    _, state = call(engine, ids, np.arange(CONTEXT)[None], np.ones((1, CONTEXT), np.int64), state)
    mask = np.ones((1, CONTEXT + 1), np.int64)
    with pytest.raises(PortlmError):
        call(engine, ids[:, :1], np.array([[CONTEXT]]), mask, state)


PROMPTS = ["The ", "", "a much longer prompt than the others", "12"]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_the_same_seed_gives_the_same_tokens_on_every_engine(engine, options, eager_tokens):
    session = Session(engine, BYTES)
    together = session.generate(PROMPTS, max_new_tokens=12, **options)
    assert [r.token_ids for r in together] == eager_tokens(options)
    alone = session.generate(PROMPTS[2:3], max_new_tokens=12, **{**options, "seed": [0]})
    batch = session.generate(PROMPTS[2:] * 2, max_new_tokens=12, **{**options, "seed": [0] * 4})
    assert alone[0].token_ids == batch[0].token_ids == batch[2].token_ids


@pytest.fixture(scope="module")
def eager_tokens(eager):
    return lambda options: [
        r.token_ids for r in Session(eager, BYTES).generate(PROMPTS, max_new_tokens=12, **options)
    ]


@pytest.mark.parametrize("target", [*TARGETS, *CUDA_TARGETS], ids=":".join)
def test_closing_twice_is_harmless_and_a_closed_engine_says_so(folder, target):
    engine = open_or_skip(folder, *target)
    state = engine.start("decoder", 1)
    engine.close()
    engine.close()
    with pytest.raises(PortlmError, match="closed"):
        call(engine, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64), state)
