"""Graphs from models that users write themselves: what is captured, and what is refused with one clear error."""

import collections
import re
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import portlm
from portlm.artifact import read_manifest
from portlm.compile.ort_lowering import compile_graph
from portlm.errors import FormatError, UsageError
from portlm.models.layers import Embedding, LayerNorm, Linear
from portlm.models.roles import Role, decoder
from portlm.ops.cached_attention import cached_attention
from portlm.ops.embedding import embedding
from portlm.ops.linear import linear
from portlm.roles import StateSpec, TensorSpec

V, C, H, D, CONTEXT = 19, 12, 3, 4, 16
TOLERANCE = 1e-5  # logits are about 1; float32 rounding over one layer


class Tiny(nn.Module):
    """One layer of attention with grouped heads, written by somebody who knows portlm.ops and nothing else."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(context_length=CONTEXT, vocab_size=V)
        self.tokens, self.places = Embedding(V, C), Embedding(CONTEXT, C)
        self.norm = LayerNorm(C, 1e-5)
        self.query, self.key = Linear(C, H * D, bias=True), Linear(C, D, bias=False)
        self.value, self.out = Linear(C, D, bias=False), Linear(H * D, C, bias=True)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.5, generator=generator)

    def roles(self):
        return {"decoder": decoder(self.step, vocab_size=V, caches=[(1, D)])}

    @torch.no_grad()
    def step(self, ids, positions, mask, past, keep):
        B, T = ids.shape
        h = self.embed(ids, positions)
        y, _ = self.norm(h, None)
        heads = self.query(y).view(B, T, H, D), self.key(y).view(B, T, 1, D), self.value(y).view(B, T, 1, D)
        attended, key, value = cached_attention(*heads, *past[0], mask)
        h = h + self.out(attended.reshape(B, T, H * D))
        return linear(self.last(h).index_select(1, keep), self.tokens.weight), [(key, value)]

    def embed(self, ids, positions):
        return self.tokens(ids) + self.places(positions)

    def last(self, h):
        return h


def with_last(function):
    """A model that does something more before its head."""
    model = Tiny()
    model.last = function
    return model


def run(folder, graph, feed):
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]"
    )
    session = onnxruntime.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def example(past=5):
    rng = np.random.default_rng(1)
    mask = np.ones((2, past + 3), np.int64)
    mask[1, : past // 2 + 1] = 0
    return {
        "input_ids": rng.integers(0, V, (2, 3)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
        "logits_to_keep": np.array([2, 1]),
        "past_key_values.0.key": rng.standard_normal((2, 1, past, D)).astype(np.float32),
        "past_key_values.0.value": rng.standard_normal((2, 1, past, D)).astype(np.float32),
    }


@pytest.mark.parametrize("past", [0, 5])
def test_a_module_with_a_step_gives_its_own_logits_in_every_graph(tmp_path, past):
    model, feed = Tiny(), example(past)
    folder = portlm.export(model, tmp_path / "out")
    expected = model.roles()["decoder"].function(*(torch.from_numpy(v) for v in feed.values()))
    lowered = compile_graph(folder, "cpu").entry.files[0]
    for graph in ("onnx/decoder.portable.onnx", lowered):
        for ours, theirs in zip(run(folder, graph, feed), expected, strict=True):
            assert np.abs(ours - theirs.detach().numpy()).max(initial=0.0) < TOLERANCE


def test_a_captured_graph_has_one_node_per_op_and_names_of_the_module(tmp_path):
    folder = portlm.export(Tiny(), tmp_path / "out")
    graph = onnx.load(folder / "onnx" / "decoder.fused.onnx", load_external_data=False).graph
    kinds = collections.Counter(node.op_type for node in graph.node)
    assert kinds == {"Embedding": 2, "Add": 2, "LayerNorm": 1, "Linear": 5, "CachedAttention": 1, "Gather": 1}
    names = {node.name for node in graph.node}
    assert {"tokens", "places", "norm", "query", "key", "value", "out", "logits"} <= names
    manifest = read_manifest(folder)
    assert (manifest.model.family, manifest.model.vocab_size, manifest.model.context_length) == (
        "module",
        V,
        CONTEXT,
    )
    assert manifest.model.parameters == sum(p.numel() for p in Tiny().parameters())


def test_export_leaves_the_module_as_it_was(tmp_path):
    model = Tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    portlm.export(model, tmp_path / "out")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_of_one_tensor_are_written_once(tmp_path):
    model = Tiny()
    model.value.weight = model.key.weight
    folder = portlm.export(model, tmp_path / "out")
    graph = onnx.load(folder / "onnx" / "decoder.fused.onnx", load_external_data=False).graph
    assert "value.weight" not in {tensor.name for tensor in graph.initializer}
    expected = model.roles()["decoder"].function(*(torch.from_numpy(v) for v in example().values()))
    logits = run(folder, "onnx/decoder.portable.onnx", example())[0]
    assert np.abs(logits - expected[0].detach().numpy()).max() < TOLERANCE


def test_a_matrix_that_lies_transposed_in_memory_is_exported_as_it_is(tmp_path):
    model = Tiny()
    model.out.weight = nn.Parameter(model.out.weight.detach().t().contiguous().t())
    folder = portlm.export(model, tmp_path / "out")
    expected = model.roles()["decoder"].function(*(torch.from_numpy(v) for v in example().values()))
    logits = run(folder, "onnx/decoder.portable.onnx", example())[0]
    assert np.abs(logits - expected[0].detach().numpy()).max() < TOLERANCE


def test_operators_between_the_ops_are_standard_ones(tmp_path):
    """Most rules of the small table, against PyTorch."""
    model = Tiny()
    model.register_buffer("ones", torch.ones(3))

    def last_of(h):
        first, _ = torch.relu(h).split((4, 8), dim=-1)
        parts = h.chunk(3, dim=2)
        gated = parts[0] * torch.sigmoid(parts[1]) - parts[2] / 2.0
        scores = torch.softmax(gated @ gated.transpose(1, 2), dim=-1)
        mixed = scores @ nn.functional.gelu(nn.functional.silu(gated))
        return h + ((mixed * first).unsqueeze(-1) * model.ones).flatten(2)

    model.last = last_of
    folder = portlm.export(model, tmp_path / "out")
    expected = model.roles()["decoder"].function(*(torch.from_numpy(v) for v in example().values()))
    logits = run(folder, "onnx/decoder.portable.onnx", example())[0]
    assert np.abs(logits - expected[0].detach().numpy()).max() < TOLERANCE


def test_bounds_leave_what_is_within_them_as_it_is_to_the_bit(tmp_path):
    """Outside, x - relu(x - high) + relu(low - x) is the bound up to roundings of differences of numbers below 8."""
    from onnx.reference import ReferenceEvaluator

    model = Tiny()
    model.last = lambda h: h.clamp(-0.75, 0.5)
    folder = portlm.export(model, tmp_path / "out")
    graph = onnx.load(folder / "onnx" / "decoder.portable.onnx")
    nodes = [node for node in graph.graph.node if "clamp" in node.name]
    assert [node.op_type for node in nodes] == ["Sub", "Relu", "Sub", "Relu", "Sub", "Add"]
    ends = nodes[0].input[0], nodes[-1].output[0]
    for name in ends:
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    before, after = ReferenceEvaluator(graph).run(list(ends), example())
    within = (before >= -0.75) & (before <= 0.5)
    assert 0 < within.sum() < within.size
    assert np.abs(before).max() < 8
    assert (after[within] == before[within]).all()
    assert np.abs(after - before.clip(-0.75, 0.5)).max() <= 1e-6


@pytest.mark.parametrize("bounds", [{"min": 0.0}, {"max": 1.0}, {"min": 1.0, "max": 0.0}])
def test_a_clamp_without_two_bounds_in_order_is_refused(tmp_path, bounds):
    model = Tiny()
    model.last = lambda h: h.clamp(**bounds)
    with pytest.raises(FormatError, match=r"aten::clamp.*without two constant bounds, the lower one first"):
        portlm.export(model, tmp_path / "out")


@pytest.mark.parametrize("spelling", [lambda table: table[2:], lambda table: table.narrow(0, 2, CONTEXT)])
def test_a_table_may_be_read_from_a_later_row_on(tmp_path, spelling):
    """The graph has the rows that are read, and no others."""
    model = Tiny()
    model.places = Embedding(CONTEXT + 2, C)
    nn.init.normal_(model.places.weight, generator=torch.Generator().manual_seed(4))
    model.embed = lambda ids, positions: (
        model.tokens(ids) + embedding(positions, spelling(model.places.weight))
    )
    model.last = lambda h: torch.tanh(h + h.select(1, 0).unsqueeze(1) * h.select(-1, 2).unsqueeze(-1))
    folder = portlm.export(model, tmp_path / "out")
    expected = model.roles()["decoder"].function(*(torch.from_numpy(v) for v in example().values()))
    for graph in ("onnx/decoder.portable.onnx", compile_graph(folder, "cpu").entry.files[0]):
        found = run(folder, graph, example())[0]
        assert np.abs(found - expected[0].detach().numpy()).max() < TOLERANCE
    assert read_manifest(folder).roles["decoder"].inputs[2].below == CONTEXT
    graph = onnx.load(folder / "onnx" / "decoder.fused.onnx", load_external_data=False).graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert sizes["places.weight.rows2"] == [CONTEXT, C]
    assert "places.weight" not in sizes


def branches(h):
    return h * 2 if h.sum() > 0 else h


def looks_up_unsupported(h):
    return torch.cumprod(h, dim=-1)


def is_complex(h):
    return torch.view_as_real(torch.view_as_complex(h.reshape(*h.shape[:2], C // 2, 2)) * 1j).flatten(2)


def computes_on_integers(h):
    return h + (h.argmax(-1, keepdim=True) + 1)


def half_the_tokens(h):
    return h * h.shape[1] if h.shape[1] == 3 else h


def makes_a_tensor(h):
    return h + torch.tensor([0.5] * C)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            branches,
            r"the decoder branches on the values of tensors at .*test_capture\.py:\d+.*use torch\.where",
        ),
        (
            looks_up_unsupported,
            r"aten::cumprod in the model itself \(.*test_capture\.py:\d+: return torch\.cump",
        ),
        (is_complex, r"aten::view_as_complex .* it is complex: keep the real and imaginary part"),
        (computes_on_integers, r"aten::(argmax|add) .*test_capture\.py"),
        (makes_a_tensor, r"a tensor that the model makes .*torch\.tensor.*: register it as a buffer"),
        (lambda h: h[:, 1:], r"aten::slice .* it is no row of a parameter: .* of a table, whole rows"),
        (lambda h: h * h[:, -1:], r"aten::slice .* it is no row of a parameter"),
        (lambda h: h * h[:, -1].unsqueeze(1), r"aten::select .* it counts from the end: count from the beg"),
        (half_the_tokens, r"the decoder works for sequence = 3 of input_ids only"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_graph_cannot_say_is_one_error_that_names_the_place(tmp_path, last, message):
    with pytest.raises(FormatError, match=message) as error:
        portlm.export(with_last(last), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_inside_a_module_is_named_with_its_path(tmp_path):
    class Odd(nn.Module):
        def forward(self, h):
            return torch.erfinv(h)

    model = Tiny()
    model.tail = nn.Sequential(nn.Identity(), Odd())
    model.last = lambda h: model.tail(h)
    with pytest.raises(FormatError, match=r"aten::erfinv in tail\.1 \(.*: return torch\.erfinv\(h\)\)"):
        portlm.export(model, tmp_path / "out")


def role_with(change):
    """A Tiny whose role was changed."""
    model = Tiny()
    role = model.roles()["decoder"]
    model.roles = lambda: {"decoder": change(role)}
    return model


def shorter(role):
    return Role(lambda *x: role.function(*x)[:2], role.inputs, role.outputs, role.state)


def swapped(role):
    def function(*tensors):
        logits, key, value = role.function(*tensors)
        return logits, key.transpose(2, 3), value

    return Role(function, role.inputs, role.outputs, role.state)


def wider(role):
    outputs = (TensorSpec("logits", "float32", ("batch", "kept", V + 1)),)
    return Role(role.function, role.inputs, outputs, role.state)


def replaced(role):
    state = tuple(StateSpec(s.name, s.output, s.dtype, s.shape, "empty", "replace") for s in role.state)
    return Role(role.function, role.inputs, role.outputs, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shorter,
            r"the decoder returns 2 tensors, its outputs and states are 3: logits, present\.0\.key, ",
        ),
        (
            swapped,
            r"returns present.0.key as float32 \(batch, 1, 4, past \+ sequence\), it declares float32 ",
        ),
        (wider, r"returns logits as float32 \(batch, kept, 19\), it declares float32 \(batch, kept, 20\)"),
        (
            replaced,
            r"returns present.0.key as float32 \(batch, 1, past \+ sequence, 4\), it declares .*past, 4\)",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_step_that_does_not_do_what_its_role_declares_is_refused(tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        portlm.export(role_with(change), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_overlap_without_being_equal_are_refused(tmp_path):
    model = Tiny()
    model.value.weight = nn.Parameter(model.query.weight.detach()[:D])
    with pytest.raises(FormatError, match=r"query\.weight and value.weight share a part of their memory"):
        portlm.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_another_dtype_are_refused(tmp_path, dtype):
    model = Tiny()
    model.norm.weight.data = model.norm.weight.data.to(dtype)
    message = rf"norm.weight has dtype {str(dtype).removeprefix('torch.')}, export needs float32"
    with pytest.raises(FormatError, match=message):
        portlm.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_integer_weights_are_refused(tmp_path):
    model = Tiny()
    model.query.weight = nn.Parameter(torch.ones(H * D, C, dtype=torch.int8), requires_grad=False)
    with pytest.raises(FormatError, match=r"query\.weight has dtype int8, export needs float32"):
        portlm.export(model, tmp_path / "out")


def test_a_buffer_that_changes_while_the_model_runs_is_refused(tmp_path):
    model = Tiny()
    model.register_buffer("count", torch.zeros(1))

    def counts(h):
        model.count.add_(1)
        return h

    model.last = counts
    with pytest.raises(
        FormatError,
        match=r"changes count while it runs \(.*test_capture\.py:\d+: model\.count\.add_\(1\)\): carry it as a state",
    ):
        portlm.export(model, tmp_path / "out")


def test_an_operator_that_writes_to_its_operand_is_refused(tmp_path):
    with pytest.raises(
        FormatError, match=r"aten::mul_ .*writes to its operand.*: use mul, which returns a new"
    ):
        portlm.export(with_last(lambda h: h.relu().mul_(2.0)), tmp_path / "out")


def test_a_folder_that_is_no_artifact_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and not an artifact"):
        portlm.export(Tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_export_keeps_the_artifact_that_was_there(tmp_path):
    folder = portlm.export(Tiny(), tmp_path / "out")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(FormatError, match=re.escape("aten::cumprod")):
        portlm.export(with_last(looks_up_unsupported), folder)
    assert (folder / "manifest.json").read_bytes() == before


class _Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((C, C), 0.1))

    def forward(self, x):
        return torch.sigmoid(x) @ self.weight


class Named(Tiny):
    def __init__(self):
        super().__init__()
        self.logits = _Half()  # called like an output of the graph

    def last(self, h):
        return super().last(self.logits(h))


def test_a_part_of_the_module_may_be_called_like_an_output(tmp_path):
    folder = portlm.export(Named(), tmp_path / "model")
    with portlm.load(folder, engine="ort", profile="portable") as session:
        assert len(session.score([[1, 2, 3]])[0].logprobs) == 2


def test_every_part_of_the_module_has_its_mode_back(tmp_path):
    model = Tiny().train()
    model.norm.eval()
    portlm.export(model, tmp_path / "model")
    assert model.training
    assert not model.norm.training
