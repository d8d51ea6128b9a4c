"""The packed engine's head: scores and greedy tokens without logits, beside what logits say."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch
from packable import PACKED

from portlm.compile.build import build
from portlm.compile.export import export
from portlm.engine import RowChoice
from portlm.errors import PortlmError, UsageError
from portlm.flows.load import load
from portlm.models import build as make_model
from portlm.models import load_model, save_model
from portlm.models.gpt2 import GPT2Config
from portlm.ops.compiled import kernels
from portlm.ops.token_scores import token_scores_reference
from portlm.rows import Rows
from portlm.runtimes.packed import PackedEngine

V = 5003  # no multiple of a panel's rows, nor of a tile's, and several parts
CONTEXT = 700
FORMS = {
    "float32": {},
    "float16": {"weights": "float16"},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"quantize": "int8", "group": 32},
    "int4": {"quantize": "int4", "group": 64, "asymmetric": True},
}
KERNELS = {"float32": "panel_linear", "float16": "half_linear", "bfloat16": "half_linear"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose vocabulary is most of it, and whose tokens are not all alike."""
    torch.manual_seed(11)
    model = make_model(GPT2Config(vocab_size=V, context_length=CONTEXT, n_layer=1, n_head=2, width=64))
    with torch.no_grad():
        model.wte.weight.normal_(0, 0.4)
    folder = tmp_path_factory.mktemp("scores") / "checkpoint"
    save_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def forms(checkpoint, tmp_path_factory):
    """Function: the artifact of a form, made once."""
    made = {}

    def form(name):
        if name not in made:
            made[name] = export(checkpoint, tmp_path_factory.mktemp("forms") / name, **FORMS[name])
            build(made[name], [("packed", "cpu", "fused")])
        return made[name]

    return form


@pytest.fixture
def no_logits(monkeypatch):
    """From now on, whoever asks the engine for logits gets an error."""

    def refused(*arguments):
        raise AssertionError("logits were asked for")

    return lambda: monkeypatch.setattr(PackedEngine, "_call", refused)


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).tolist() for n in lengths]


def calls(name):
    return sum(kernels.kernel_calls()[name].values())


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_what_the_logits_say_and_no_logits_are_made(form, forms, no_logits):
    (text,) = texts(650)
    with load(forms(form), "packed") as session:
        logits = Rows(session.engine, 1).read(np.array([text[:-1]]), every=True)[0]
        no_logits()
        before = calls(KERNELS.get(form, "packed_linear"))
        score = session.score(text)
        assert calls(KERNELS.get(form, "packed_linear")) - before > 8  # parts of the head, beside the layers
        floats = session.engine._programs["decoder"].head_scratch
    expected, best = token_scores_reference(logits, np.array(text[1:]))
    # The logits are the same, bit for bit; sums of float64 in another order, and their logarithm, are not.
    assert np.abs(score.logprobs - expected).max() <= 1e-13
    assert score.greedy == tuple((best == text[1:]).tolist())
    assert 0 < floats < logits.size / 10


@pytest.mark.parametrize("family", PACKED)
def test_log_probabilities_are_as_near_to_float64_as_eager_pytorchs(family, packed, checkpoints):
    (text,) = ([token % 257 for token in text] for text in texts(40))
    model, ids = load_model(checkpoints[family]), torch.tensor([text[:-1]])

    def logprobs(model):
        with torch.no_grad():
            every = model(ids)[0].log_softmax(-1)
        return every[torch.arange(len(text) - 1), torch.tensor(text[1:])].double().numpy()

    single, exact = logprobs(model), logprobs(model.double())
    with load(packed[family], "packed") as session:
        assert Rows(session.engine, 1).scores
        ours = np.array(session.score(text).logprobs)
    assert np.abs(ours - exact).max() <= 2 * np.abs(single - exact).max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_text_scores_the_same_in_any_batch_and_on_any_number_of_threads(form, threads, forms):
    several = texts(3, 40, 1, 17, 41, 2)
    with load(forms(form), "packed", threads=1) as session:
        alone = [session.score(text) for text in several]
    with load(forms(form), "packed", threads=threads) as session:
        assert session.score(several) == alone
        assert session.score(several, batch_size=4) == alone


def test_a_long_text_scores_in_few_calls_and_as_in_many(forms, monkeypatch):
    (text,) = texts(CONTEXT)
    made, score = [], PackedEngine.score
    monkeypatch.setattr(PackedEngine, "score", lambda *a: made.append(a) or score(*a))
    with load(forms("float32"), "packed") as session:
        whole = session.score(text)
        assert len(made) == 1
        monkeypatch.setattr("portlm.rows.TOKENS_PER_CALL", 100)
        parts = session.score(text)
        assert len(made) == 8
    assert (
        np.abs(np.subtract(whole.logprobs, parts.logprobs)).max() < 1e-4
    )  # attention adds up in another order


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_greedy_tokens_are_those_of_the_logits_and_none_are_made(form, threads, forms, monkeypatch):
    prompts = texts(3, 9, 9, 1)
    with load(forms(form), "packed", threads=threads) as session:
        rows = Rows(session.engine, 4)
        rows.read_texts([text[:-1] or [0] for text in prompts])
        before = calls("select_tokens"), calls("score_logits")
        many = session.generate(prompts, max_new_tokens=20)
        chosen, scored = calls("select_tokens") - before[0], calls("score_logits") - before[1]
        assert chosen <= len(prompts)  # the first tokens, after the prompts
        assert scored >= 19
        monkeypatch.setattr(Rows, "advance", lambda *arguments: None)
        single = session.generate(prompts, max_new_tokens=20)
    assert [r.token_ids for r in many] == [r.token_ids for r in single]


def test_of_equal_logits_the_lowest_id_wins_wherever_parts_begin(checkpoint, tmp_path, monkeypatch):
    model = load_model(checkpoint)
    with torch.no_grad():
        model.wte.weight[:] = model.wte.weight[0]
    save_model(tmp_path / "checkpoint", model)
    folder = export(tmp_path / "checkpoint", tmp_path / "equal")
    build(folder, [("packed", "cpu", "fused")])
    with load(folder, "packed") as session:
        assert session.generate([5, 6], max_new_tokens=4).token_ids == (0,) * 4
        score = session.score([7, 0, 8, V - 1])
    assert score.greedy == (True, False, False)
    assert score.logprobs == pytest.approx([-np.log(V)] * 3, abs=1e-13)


def test_logits_that_are_no_numbers_are_an_error_that_names_the_text(checkpoint, tmp_path):
    """What follows position 7 has no norm."""
    model = load_model(checkpoint)
    with torch.no_grad():
        model.wpe.weight[7] = 3e38
    save_model(tmp_path / "checkpoint", model)
    folder = export(tmp_path / "checkpoint", tmp_path / "broken")
    build(folder, [("packed", "cpu", "fused")])
    with load(folder, "packed") as session:
        assert len(session.score([1] * 8).logprobs) == 7
        with pytest.raises(PortlmError, match=r"packed:cpu: text 1: the logits are not numbers"):
            session.score([[1] * 8, [1] * 9])


def test_one_number_that_is_none_spoils_its_row_wherever_it_is(checkpoint, tmp_path):
    """The last logit, in the last part, overflows, although the weights that it is made of are finite."""
    model = load_model(checkpoint)
    with torch.no_grad():
        model.wte.weight[V - 1] = 3e38
    save_model(tmp_path / "checkpoint", model)
    folder = export(tmp_path / "checkpoint", tmp_path / "broken")
    build(folder, [("packed", "cpu", "fused")])
    with load(folder, "packed") as session:
        with pytest.raises(PortlmError, match="not numbers"):
            session.score([1, 2, 3])
        with pytest.raises(PortlmError, match=f"the logit of token {V - 1} is inf"):
            session.generate([1, 2, 3], max_new_tokens=3)
        rows = Rows(session.engine, 1)
        rows.read_texts([[1, 2]])
        greedy = [RowChoice(0.0, 0, 1.0, 0.0, 0, 0, 0)]
        with pytest.raises(PortlmError, match=f"new token 0: .*row 0: the logit of token {V - 1} is inf"):
            rows.advance([3], greedy, V, frozenset(), 3, 60.0)
        rows = Rows(session.engine, 1)
        rows.read_texts([[1, 2]])
        assert len(rows.advance([3], greedy, V - 1, frozenset(), 3, 60.0)) == 3  # never looked at


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (np.zeros((2, 3), np.int64), r"targets must be int64 \(2, 4\)"),
        (np.zeros((2, 4), np.int32), r"targets must be int64 \(2, 4\)"),
        (np.full((2, 4), V), f"targets must be from 0 to {V - 1}"),
        (None, r"targets must be int64 \(2, 4\)"),
    ],
    ids=str,
)
def test_targets_that_do_not_fit_are_refused_and_the_state_stays(targets, said, forms):
    with load(forms("float32"), "packed") as session:
        engine = session.engine
        state = engine.start("decoder", 2)
        ids = np.arange(8).reshape(2, 4)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((2, 4), np.int64),
            "position_ids": np.tile(np.arange(4), (2, 1)),
            "logits_to_keep": np.arange(4),
        }
        inputs = {item.name: inputs[item.name] for item in engine.roles["decoder"].inputs}
        with pytest.raises(UsageError, match=said):
            engine.score("decoder", inputs, state, targets)
        logprobs, best, state = engine.score("decoder", inputs, state, ids)
        assert logprobs.shape == best.shape == (2, 4)
        assert state.past == 4
        with pytest.raises(UsageError, match="no role"):
            engine.score("encoder", inputs, state, ids)


EVERY_FORM = """
import json
import sys
from portlm.flows.load import load
from portlm.ops.compiled import kernels
texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    with load(folder, "packed") as session:
        scores = session.score(texts)
        tokens = [r.token_ids for r in session.generate(texts, max_new_tokens=10)]
        print(json.dumps([[s.logprobs for s in scores], [s.greedy for s in scores], tokens]))
assert kernels.kernel_calls()["score_logits"][kernels.isa()] > 0
"""


@pytest.mark.no_kernel("each instruction set runs in a process of its own, which counts the calls")
def test_every_instruction_set_gives_the_same_answers(forms):
    """Where 1e-4 beside the scores' size of 10 is what float32 and rounded activations lose in a model of one layer."""
    folders = [str(forms(form)) for form in FORMS]
    said = {}
    for isa in kernels.usable_isas():
        command = [sys.executable, "-c", EVERY_FORM, json.dumps(texts(5, 33, 12)), *folders]
        answer = subprocess.run(
            command, env={**os.environ, "PORTLM_ISA": isa}, check=True, timeout=600, capture_output=True, text=True
        )  # fmt: skip
        said[isa] = [json.loads(line) for line in answer.stdout.splitlines()]
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-3, equal_nan=False)
    for other in said.values():
        for a, b in zip(said["scalar"], other, strict=True):
            for one, two in zip(a[0], b[0], strict=True):
                close(one, two)
            assert a[1:] == b[1:]
