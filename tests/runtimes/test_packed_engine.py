"""The packed engine beside the others: the same tokens whether it writes one at a time or many."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from engine_cases import OPTIONS, PROMPTS

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch
from packable import PACKED, PACKED_KINDS

from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.compile.build import build
from portlm.compile.export import export, export_module
from portlm.engine import Advance, OpenRequest, RowChoice
from portlm.errors import FormatError, PortlmError, UsageError
from portlm.flows.load import load
from portlm.flows.targets import Target
from portlm.flows.verify import verify_artifact
from portlm.models import load_model, save_model
from portlm.models.layers import Embedding, Linear
from portlm.models.roles import Role
from portlm.ops.linear import linear
from portlm.ops.relu_squared_mlp import relu_squared_mlp
from portlm.roles import TensorSpec
from portlm.rows import Rows
from portlm.runtimes.null import NullEngine
from portlm.runtimes.packed import FILE, PackedEngine
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

BYTES = byte_tokenizer(eos="<|endoftext|>")
V, EOS = 257, 256


@pytest.fixture(scope="module", params=PACKED_KINDS)
def session(request, packed):
    folder = packed[request.param]
    with Session(PackedEngine.open(OpenRequest(folder, read_manifest(folder), "cpu")), BYTES) as session:
        yield session


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Function: from now on rows are given each token by itself."""
    return lambda: monkeypatch.setattr(Rows, "advance", lambda *arguments: None)


@pytest.fixture
def calls(monkeypatch):
    """How many tokens each call of the loop in C++ made."""
    made, advance = [], PackedEngine.advance

    def counted(self, state, asked):
        found = advance(self, state, asked)
        made.append(0 if found is None else len(found[0]))
        return found

    monkeypatch.setattr(PackedEngine, "advance", counted)
    return made


@pytest.mark.runs_kernel("panel_linear", "cached_attention", "select_tokens")
@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_are_the_same_written_one_by_one_or_many_at_once(
    options, batch_size, session, one_at_a_time, calls
):
    options = {"max_new_tokens": 12, **OPTIONS[options], "batch_size": batch_size}
    many = session.generate(PROMPTS, **options)
    penalised = "repetition_penalty" in options
    assert (max(calls, default=0) > 1) != penalised
    one_at_a_time()
    single = session.generate(PROMPTS, **options)
    for a, b in zip(many, single, strict=True):
        assert (a.token_ids, a.text, a.finish_reason, a.stop) == (
            b.token_ids,
            b.text,
            b.finish_reason,
            b.stop,
        )
    assert many[0].stats.new_tokens == single[0].stats.new_tokens == sum(len(r.token_ids) for r in single)


def test_an_end_of_text_in_the_middle_ends_one_row_and_not_the_others(session, one_at_a_time):
    """The ids that end a text are chosen among those that the model writes anyway."""
    free = [r.token_ids for r in session.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)]
    ending = Session(session.engine, BYTES, eos_ids=[free[0][5], free[2][3]])
    many = ending.generate(PROMPTS, max_new_tokens=12)
    assert {r.finish_reason for r in many} == {"eos", "length"} or all(r.finish_reason == "eos" for r in many)
    assert many[0].finish_reason == many[2].finish_reason == "eos"
    one_at_a_time()
    assert [r.token_ids for r in many] == [r.token_ids for r in ending.generate(PROMPTS, max_new_tokens=12)]


@pytest.mark.parametrize("options", [{}, {"stop": ["e", "12"]}, {"temperature": 1.0, "seed": 2}], ids=str)
def test_a_stream_gives_the_text_and_the_ids_of_generate(options, session, one_at_a_time):
    expected = session.generate("The ", max_new_tokens=30, **options)
    stream = session.stream("The ", max_new_tokens=30, **options)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == expected.text
    assert stream.generation.token_ids == expected.token_ids
    ids = list(session.stream("The ", max_new_tokens=30, **options).ids())
    assert tuple(ids) == expected.token_ids
    one_at_a_time()
    slow = session.stream("The ", max_new_tokens=30, **options)
    assert "".join(slow) == expected.text


def test_a_stream_that_is_left_leaves_the_session_as_it_was(session):
    expected = session.generate("12", max_new_tokens=20)
    stream = session.stream("12", max_new_tokens=20)
    next(stream.ids())
    stream.close()
    assert session.generate("12", max_new_tokens=20).token_ids == expected.token_ids


def started(engine, texts):
    """A state that has read all but the last token of some texts of one length, and what goes on from there."""
    rows = Rows(engine, len(texts))
    rows.read_texts([text[:-1] for text in texts])
    choices = [RowChoice(0.0, 0, 1.0, 0.0, 0, 0, 0)] * len(texts)
    return rows, [text[-1] for text in texts], choices


def test_the_loop_comes_back_when_its_time_is_up(session):
    rows, last, choices = started(session.engine, [[1, 2, 3], [4, 5, 6]])
    assert len(rows.advance(last, choices, V, frozenset(), 20, 0.0)) == 1
    rows, last, choices = started(session.engine, [[1, 2, 3], [4, 5, 6]])
    assert len(rows.advance(last, choices, V, frozenset(), 20, 60.0)) == 20


def test_the_loop_ends_with_the_context_and_the_next_token_is_an_error(session):
    length = session.engine.context_length
    rows, last, choices = started(session.engine, [[1] * (length - 2)])
    drawn = rows.advance(last, choices, V, frozenset(), 20, 60.0)
    assert len(drawn) == 3
    assert rows.advance([1], choices, V, frozenset(), 20, 60.0) is None
    with pytest.raises(UsageError, match="position_ids must be from 0 to 47"):
        rows.next([1])


def test_a_token_that_the_tokenizer_does_not_have_is_never_drawn(session):
    rows, last, choices = started(session.engine, [[1, 2, 3]])
    best = int(rows.advance(last, choices, V, frozenset(), 1, 60.0)[0, 0])
    rows, last, choices = started(session.engine, [[1, 2, 3]])
    drawn = rows.advance(last, choices, best, frozenset(), 20, 60.0)
    assert drawn.max() < best


def test_a_call_that_cannot_work_is_refused_and_the_state_stays(session):
    engine = session.engine
    rows, last, choices = started(engine, [[1, 2, 3]])
    with pytest.raises(UsageError, match="top_k"):
        rows.advance(last, [choices[0]._replace(temperature=1.0, top_k=V + 1)], V, frozenset(), 5, 1.0)
    foreign = NullEngine(V, 48).start("decoder", 1)
    with pytest.raises(UsageError, match="another engine"):
        engine.advance(foreign, Advance(rows.lengths, np.array(last), choices, V, frozenset(), 5, 1.0))
    assert len(rows.advance(last, choices, V, frozenset(), 5, 60.0)) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_the_same_error_after_the_same_text(
    temperature, checkpoints, tmp_path, one_at_a_time
):
    """What follows position 7 has no norm."""
    model = load_model(checkpoints["gpt2"])
    with torch.no_grad():
        model.wpe.weight[7] = 3e38  # finite, and its norm is not
    save_model(tmp_path / "checkpoint", model, BYTES)
    folder = export(tmp_path / "checkpoint", tmp_path / "artifact")
    build(folder, [("packed", "cpu", "fused")])
    found = []
    with load(folder, "packed") as broken:
        for _ in range(2):
            stream, ids = broken.stream([1, 2, 3], max_new_tokens=12, temperature=temperature).ids(), []
            with pytest.raises(
                PortlmError, match=r"packed:cpu: new token 5: .*row 0: the logit of token"
            ) as error:
                ids += stream
            found.append(str(error.value))
            one_at_a_time()
    assert found[0] == found[1]


@pytest.mark.parametrize("family", PACKED)
def test_the_certificate_holds_against_eager_pytorch(family, packed, tmp_path):
    folder = shutil.copytree(packed[family], tmp_path / family)
    (result,) = verify_artifact(folder, [Target.parse("packed:cpu:fused")])
    assert result.problem is None
    assert result.row.max_logit_error < 1e-4
    assert (result.row.top1, result.row.fallback) == (1.0, ())
    assert result.row.greedy_match == result.row.greedy_total


@pytest.mark.runs_kernel("panel_linear", "cached_attention")
@pytest.mark.parametrize("family", PACKED)
def test_logits_are_as_near_to_float64_as_eager_pytorchs(family, packed, checkpoints):
    ids = np.random.default_rng(5).integers(0, V, (3, 24))
    model = load_model(checkpoints[family])
    with torch.no_grad():
        single = model(torch.from_numpy(ids)).numpy()
        exact = model.double()(torch.from_numpy(ids)).numpy()
    with load(packed[family], "packed") as session:
        found = Rows(session.engine, 3).read(ids, every=True)
    ours, theirs = (np.abs(logits - exact).max() for logits in (found, single))
    assert ours <= 2 * theirs


@pytest.mark.runs_kernel("packed_linear", "packed_rows")
@pytest.mark.parametrize(
    ("family", "numbers"), [("gpt2", "int8"), ("llama", "int4"), ("gpt_neox", "int4 asymmetric")]
)
def test_quantized_weights_give_the_answer_of_eager_pytorch_on_what_they_mean(
    family, numbers, quantized, tmp_path, one_at_a_time
):
    folder = shutil.copytree(quantized(family, numbers[:4], "asymmetric" in numbers), tmp_path / family)
    build(folder, [("packed", "cpu", "fused")])
    (result,) = verify_artifact(folder, [Target.parse("packed:cpu:fused")])
    assert result.problem is None
    assert (result.row.precision, result.row.top1) == ("a15", 1.0)
    with load(folder, "packed") as session:
        options = {"max_new_tokens": 12, "temperature": 1.0}
        many = [r.token_ids for r in session.generate(PROMPTS, **options)]
        one_at_a_time()
        assert many == [r.token_ids for r in session.generate(PROMPTS, **options)]


class Squared(torch.nn.Module):
    """No layer of a family: squared ReLU, tokens in two halves that change places, and no state."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=61, context_length=32)
        self.wte, self.up, self.down = Embedding(61, 24), Linear(24, 70, bias=True), Linear(70, 24, bias=True)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))

    def step(self, ids, kept):
        x = self.wte(ids)
        y = relu_squared_mlp(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        first, last = y.chunk(2, -1)
        x = x + torch.cat((last, first), -1)
        return (linear(x.index_select(1, kept), self.wte.weight),)

    def roles(self):
        """One role, which answers each token for itself."""
        inputs = (
            TensorSpec("input_ids", "int64", ("batch", "sequence")), TensorSpec("logits_to_keep", "int64", ("kept",))
        )  # fmt: skip
        return {"decoder": Role(self.step, inputs, (TensorSpec("logits", "float32", ("batch", "kept", 61)),))}


@pytest.mark.runs_kernel("panel_linear", "panel_rows")
def test_a_module_without_a_state_runs_and_writes_token_by_token(tmp_path):
    model = Squared()
    folder = export_module(model, tmp_path / "model")
    build(folder, [("packed", "cpu", "fused")])
    ids = np.array([[3, 60, 0, 7], [1, 2, 3, 4]])
    with torch.no_grad():
        expected = model.step(torch.from_numpy(ids), torch.arange(4))[0].numpy()
    with load(folder, "packed") as session:
        found = Rows(session.engine, 2).read(ids, every=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, equal_nan=False)
        assert session.generate([[3], [1, 2]], max_new_tokens=1)[0].token_ids == (
            int(expected[0, 0].argmax()),
        )


def test_it_is_found_by_load_verify_and_the_lists_of_targets(packed):
    from portlm.flows.targets import default_targets

    folder = packed["llama"]
    assert Target("packed", "cpu", "fused") in default_targets(folder)
    with load(folder, "packed") as session:
        assert repr(session) == "<portlm.Session packed:cpu fused fp32>"
        assert session.placement().nodes["cpu"] > 20
    with pytest.raises(UsageError, match="packed has no profile portable"):
        PackedEngine.open(OpenRequest(folder, read_manifest(folder), "cpu", "portable"))


def test_a_file_of_another_model_is_refused(packed, tmp_path):
    folder = shutil.copytree(packed["llama"], tmp_path / "model")
    shutil.copyfile(packed["gpt_neox"] / FILE, folder / FILE)
    with pytest.raises(FormatError, match="restore the file"):
        load(folder, "packed")
    write_manifest(folder, refresh_files(folder, read_manifest(folder), [FILE]))
    with pytest.raises(FormatError, match=r"packed\.portlm: of another model, .*run portlm compile"):
        load(folder, "packed")


def test_a_damaged_file_that_the_manifest_vouches_for_is_refused_by_its_reader(packed, tmp_path):
    folder = shutil.copytree(packed["llama"], tmp_path / "model")
    raw = bytearray((folder / FILE).read_bytes())
    raw[12] = 9
    (folder / FILE).write_bytes(raw)
    write_manifest(folder, refresh_files(folder, read_manifest(folder), [FILE]))
    with pytest.raises(
        FormatError, match=r"packed\.portlm: it is of version 9, this portlm reads 2; compile again"
    ):
        load(folder, "packed")


def test_it_is_compiled_at_first_use(artifacts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))  # nothing was compiled here before
    folder = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    with load(folder, "packed") as session:
        first = session.generate("The ", max_new_tokens=5).token_ids
    assert "compiling" in capsys.readouterr().err
    assert not (folder / FILE).exists()
    with load(folder, "packed") as session:
        assert session.generate("The ", max_new_tokens=5).token_ids == first
    assert capsys.readouterr().err == ""
