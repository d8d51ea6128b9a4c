"""Every family of decoders on every engine that this machine has, beside eager PyTorch.

What engines do alike with any of them is asked in test_contract.py and test_states.py, of one of each kind.
"""

import numpy as np
import pytest
from engine_cases import CUDA_TARGETS, TARGETS, open_or_skip
from whole_logits import CONTEXT, TOLERANCE, assert_close, feed, random_ids

from portlm.models import DECODERS
from portlm.rows import Rows
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

BYTES = byte_tokenizer(eos="<|endoftext|>")
TEXTS = [[5, 17, 200, 3, 77, 42, 9], [9, 8], [250, 1, 2, 3]]


@pytest.fixture(scope="module", params=DECODERS)
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


def test_every_node_is_where_it_was_asked_to_be(engine):
    placement = engine.placement()
    assert set(placement.nodes) == {engine.device}
    assert placement.nodes[engine.device] > 0
    assert placement.fallback == ()


def test_a_ragged_batch_in_steps_equals_eager_pytorch_on_each_row_alone(engine, eager):
    """Up to the end of the context; steps of nothing but padding for some rows, of several tokens, and of one."""
    lengths, cuts = [CONTEXT, 1, 7, 39], (3, 9, 10, 44)
    ids = random_ids(4, CONTEXT, seed=6)
    together = feed(engine, ids, cuts, lengths)
    assert np.isfinite(together).all()
    for b, length in enumerate(lengths):
        assert_close(together[b, -length:], feed(eager, ids[b : b + 1, -length:])[0])


def test_rows_that_were_repeated_taken_back_and_joined_go_on_as_eager_pytorch_does(engine, eager):
    rows, later = Rows(engine, 3), Rows(engine, 1)
    rows.read_texts(TEXTS)
    rows.keep([2, 0, 0])
    rows.read(np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), every=True)
    rows.crop([len(TEXTS[2]) + 1, len(TEXTS[0]), len(TEXTS[0]) + 3])
    later.read_texts([[7] * 20])
    rows.join([later])
    texts = [[*TEXTS[2], 1], TEXTS[0], [*TEXTS[0], 7, 8, 9], [7] * 20]
    expected = [Rows(eager, 1).read_texts([[*text, 11 + b]])[0] for b, text in enumerate(texts)]
    assert_close(rows.next([11, 12, 13, 14]), np.stack(expected))


def test_the_same_seed_gives_the_same_tokens_and_scores(engine, eager):
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    prompts = ["The ", "", "a much longer prompt than the others", "12"]
    ours, theirs = Session(engine, BYTES), Session(eager, BYTES)
    tokens = [[r.token_ids for r in session.generate(prompts, **options)] for session in (ours, theirs)]
    assert tokens[0] == tokens[1]
    texts = ["hello there", "x", "one two three four"]
    for score, expected in zip(ours.score(texts), theirs.score(texts), strict=True):
        assert score.logprobs == pytest.approx(expected.logprobs, abs=2 * TOLERANCE)
        assert score.greedy == expected.greedy
