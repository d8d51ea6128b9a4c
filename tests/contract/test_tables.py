"""Values that no table has a row for are refused by every engine in the same way, before anything is computed."""

import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import onnx
import torch
from msgspec.structs import replace

import portlm
from portlm.artifact import read_manifest, write_manifest
from portlm.compile.export import export_module
from portlm.compile.tables import table_limits
from portlm.errors import EngineUnavailableError, FormatError, UsageError
from portlm.models.layers import Embedding, Linear
from portlm.models.roles import Role
from portlm.roles import StateSpec, TensorSpec

TARGETS = [
    ("torch", "cpu", "portable"), ("torch", "cpu", "fused"), ("ort", "cpu", "portable"), ("ort", "cpu", "fused"),
    ("ort", "vulkan", "portable"), ("tvm", "cpu", "portable"), ("tvm", "cpu", "fused"),
    ("tvm", "cuda", "portable"), ("tvm", "cuda", "fused"),
    ("tvm", "opencl", "portable"),
]  # fmt: skip
ROWS, PLACES, GROUPS = 61, 13, 5


class Tagger(torch.nn.Module):
    """Looks up what no name of transformers stands for, in another shape; and ids in fewer rows than there are ids."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 70, "context_length": 32})
        self.wte, self.kinds, self.groups = Embedding(ROWS, 8), Embedding(PLACES, 8), Embedding(GROUPS, 8)
        self.head = Linear(8, 4, bias=True)
        for weight in self.parameters():  # portlm's layers leave that to the model
            torch.nn.init.normal_(weight)

    def tag(self, ids, kinds, groups):
        """Of each token: ids (B, T), kinds (T, B), groups (B, T)."""
        kind = self.kinds(kinds.transpose(0, 1))
        return (self.head(self.wte(ids) + kind + self.groups(groups)),)

    def roles(self):
        """One role; the groups stay from call to call."""
        inputs = (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("kinds", "int64", ("sequence", "batch")),
        )
        outputs = (TensorSpec("tags", "float32", ("batch", "sequence", 4)),)
        groups = StateSpec("groups", "", "int64", ("batch", "sequence"), "given", "constant")
        return {"head:tags": Role(self.tag, inputs, outputs, (groups,))}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """The artifact."""
    torch.manual_seed(0)
    return export_module(Tagger().eval(), tmp_path_factory.mktemp("tagger") / "model")


@pytest.fixture(params=TARGETS, ids=":".join)
def open_on(request):
    """Function: artifact -> an engine, or a skip that says what is missing."""

    def open_one(folder):
        try:
            # The WebGPU provider has no integers to move.
            return portlm.load(folder, *request.param, allow_fallback=request.param[1] == "vulkan").engine
        except EngineUnavailableError as error:
            pytest.skip(str(error))

    return open_one


def call(engine, ids=0, kinds=0, groups=0):
    """One call of two tokens, the second of which is as said."""
    state = engine.start("head:tags", 1, {"groups": np.array([[0, groups]])})
    inputs = {"input_ids": np.array([[0, ids]]), "kinds": np.array([[0], [kinds]])}
    return engine.run("head:tags", inputs, state)[0]["tags"]


LIMITS = {"input_ids": ROWS, "kinds": PLACES, "groups": GROUPS}


def test_the_manifest_says_how_far_values_may_go(tagger):
    role = read_manifest(tagger).roles["head:tags"]
    assert {spec.name: spec.below for spec in (*role.inputs, *role.state)} == LIMITS


@pytest.mark.parametrize(("name", "limit"), [("ids", ROWS), ("kinds", PLACES), ("groups", GROUPS)])
def test_what_is_beyond_a_table_is_refused_by_every_engine_in_the_same_words(open_on, tagger, name, limit):
    with_name = "input_ids" if name == "ids" else name
    engine = open_on(tagger)
    assert np.isfinite(call(engine, **{name: limit - 1})).all()
    for value in (limit, -1, 2**40, -(2**63)):
        with pytest.raises(UsageError, match=rf"^{with_name} must be from 0 to {limit - 1}, got "):
            call(engine, **{name: value})
    assert np.isfinite(call(engine)).all()
    engine.close()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_tables_of_every_form_of_a_decoder_are_found(compiled, family):
    found = {}
    for path in sorted((compiled[family] / "onnx").glob("*.onnx")):
        found[path.name.split(".")[1]] = table_limits(onnx.load(path, load_external_data=False).graph)
    whole = {"input_ids": 257, "position_ids": 48, "attention_mask": 2}
    for form in ("fused", "ort-cpu-fused-even"):  # neither looks anything up by the mask
        assert found.pop(form) == {name: whole[name] for name in ("input_ids", "position_ids")}
    assert len(found) >= 2
    assert all(limits == whole for limits in found.values())


def with_below(manifest, name, below):
    """The manifest with another number for an input."""
    roles = {}
    for key, role in manifest.roles.items():
        inputs = tuple(replace(s, below=below) if s.name == name else s for s in role.inputs)
        roles[key] = replace(role, inputs=inputs)
    return replace(manifest, roles=roles)


def with_context(manifest, length):
    return replace(manifest, model=replace(manifest.model, context_length=length))


CHANGES = {
    "more positions": lambda m: with_context(with_below(m, "position_ids", None), 100),
    "a larger table": lambda m: with_below(m, "kinds", 1000),
    "no table": lambda m: with_below(m, "kinds", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_lets_more_through_than_the_tables_hold_is_refused(
    open_on, compiled, tagger, tmp_path, change
):
    """Whether the graph came from elsewhere or not, and whatever was compiled of it."""
    folder = shutil.copytree(compiled["gpt2"] if change == "more positions" else tagger, tmp_path / "model")
    write_manifest(folder, CHANGES[change](read_manifest(folder)))
    with pytest.raises(
        FormatError, match=r"\.onnx: the values of '(kinds|position_ids)' look up a table of \d+ rows"
    ):
        open_on(folder)


def test_a_longer_context_in_the_manifest_makes_no_table_longer(open_on, compiled, tmp_path):
    folder = shutil.copytree(compiled["gpt2"], tmp_path / "model")
    write_manifest(folder, with_context(read_manifest(folder), 100))
    engine = open_on(folder)
    inputs = {"input_ids": np.array([[3]]), "attention_mask": np.ones((1, 1), np.int64)}
    inputs |= {"position_ids": np.array([[48]]), "logits_to_keep": np.zeros(1, np.int64)}
    with pytest.raises(UsageError, match=r"^position_ids must be from 0 to 47, got 48 to 48"):
        engine.run("decoder", inputs, engine.start("decoder", 1))
    engine.close()
