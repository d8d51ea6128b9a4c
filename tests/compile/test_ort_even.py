"""The graph for calls in which nothing is masked gives what the graph for every call gives, and runs where it may."""

import shutil
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")

import portlm
from portlm.artifact import read_manifest, replace, write_manifest
from portlm.compile.build import build
from portlm.compile.check import CONTRIB, check_model
from portlm.compile.export import export
from portlm.errors import FormatError
from portlm.models import build as build_model
from portlm.models import save_model
from portlm.models.gpt2 import GPT2Config
from portlm.models.llama import LlamaConfig
from portlm.ort_support import EVEN, UNREAD
from portlm.quantization import BYTES, FLOATS, at_activations
from portlm.rows import Rows

TOLERANCE = 4e-5  # of logits, as in test_export.py
LAYERS = 2
LLAMA = LlamaConfig(
    vocab_size=61, context_length=48, n_layer=LAYERS, n_head=4, n_kv_head=2, width=64, hidden=96,
    rms_norm_eps=1e-5,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=61, context_length=48, n_layer=LAYERS, n_head=4, width=64)
CASES = {  # configuration, bits, activations, products of a layer in the graph for every call and in the other
    "llama": (LLAMA, None, FLOATS, 7, 5),
    "llama-int4": (LLAMA, "int4", FLOATS, 7, 5),
    "llama-int4-rounded": (LLAMA, "int4", BYTES, 7, 5),
    "llama-int8": (LLAMA, "int8", FLOATS, 7, 7),
    "llama-int8-rounded": (LLAMA, "int8", BYTES, 7, 5),
    "gpt2": (GPT2, None, FLOATS, 4, 4),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Function: name of a case -> artifact compiled for ONNX Runtime on the CPU."""
    root, made = tmp_path_factory.mktemp("even"), {}

    def of(name):
        if name not in made:
            config, bits, kind, *_ = CASES[name]
            import torch

            torch.manual_seed(5)
            model = build_model(config)
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(0.2 * torch.randn_like(p) if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
            save_model(root / f"{name}-checkpoint", model)
            options = {"quantize": bits, "group": 32} if bits else {}
            made[name] = export(root / f"{name}-checkpoint", root / name, **options)
            with at_activations(kind):
                build(made[name], [("ort", "cpu", "fused")])
        return made[name]

    return of


def opened(folder):
    return portlm.load(folder, engine="ort", device="cpu", profile="fused").engine


def every(folder):
    """An engine that has the graph for every call alone."""
    engine = opened(folder)
    engine._session("decoder", lambda: False)
    assert engine._serving == {"decoder"}
    return engine


def tokens(batch, count, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (batch, count))


@pytest.mark.parametrize("name", CASES)
def test_nodes_of_the_mask_and_of_rotary_embeddings_are_gone_and_products_are_one(name, compiled):
    general, even = (check_model(compiled(name) / file).graph for file in files(compiled(name)))
    *_, products, fewer = CASES[name]
    for graph, count in ((general, products), (even, fewer)):
        kinds = Counter(node.op_type for node in graph.node)
        found = sum(kinds[kind] for kind in ("MatMul", "FusedMatMul", "MatMulNBits"))
        assert kinds["GroupQueryAttention"] == LAYERS
        assert found == count * LAYERS + 1
        rotates = name.startswith("llama") and graph is general
        assert kinds["RotaryEmbedding"] == (2 * LAYERS if rotates else 0)
        values = {value for node in graph.node for value in node.output}
        assert ("mask.bias" in values) == (graph is general)
        assert {node.domain for node in graph.node} == {"", CONTRIB}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_reads_no_mask_and_says_so(name, compiled):
    models = [check_model(compiled(name) / file) for file in files(compiled(name))]
    reads = [any("attention_mask" in node.input for node in model.graph.node) for model in models]
    says = [{entry.key: entry.value for entry in model.metadata_props}.get(UNREAD) for model in models]
    assert (reads, says) == ([True, False], [None, "attention_mask"])


def test_a_mask_that_is_not_read_is_bound_once(compiled, monkeypatch):
    import onnxruntime

    bound, bind = Counter(), onnxruntime.IOBinding.bind_input

    def counted(self, name, *place):
        bound[name] += 1
        bind(self, name, *place)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", counted)
    found = []
    for engine in (opened(compiled("llama")), every(compiled("llama"))):
        rows = Rows(engine, 1)
        rows.read(tokens(1, 4))
        bound.clear()
        for seed in range(3):
            rows.read(tokens(1, 1, seed))
        found.append(bound["attention_mask"])
    assert found == [0, 3]


def files(folder):
    (entry,) = read_manifest(folder).compiled
    return entry.files


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_both_graphs_give_the_same_logits(name, batch, compiled):
    """A prompt, several tokens behind it, steps, and rows left out, on one cache; level 4 rounds what differs by a bit.

    Its activations have 8 bits: a number on the edge between two of them moves a logit by 1e-2 of the largest.
    """
    even, general = opened(compiled(name)), every(compiled(name))
    pair = [Rows(engine, batch) for engine in (even, general)]
    plan = [tokens(batch, 5), tokens(batch, 3, 1), *(tokens(batch, 1, seed) for seed in range(2, 6))]
    for ids in plan:
        first, second = (rows.read(ids, every=True) for rows in pair)
        limit = 0.03 * np.abs(second).max() if name.endswith("rounded") else TOLERANCE * np.abs(second).max()
        assert np.abs(first - second).max() < limit
    assert not even._serving, "the graph under test ran"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_even_calls_agree_with_the_model_in_pytorch(name, compiled):
    engine = opened(compiled(name))
    slow = portlm.load(compiled(name), engine="torch", device="cpu").engine
    pair = [Rows(engine, 2), Rows(slow, 2)]
    for ids in (tokens(2, 7), tokens(2, 1, 1), tokens(2, 2, 2)):
        first, second = (rows.read(ids, every=True) for rows in pair)
        assert np.abs(first - second).max() < TOLERANCE * max(1.0, np.abs(second).max())
    assert not engine._serving


def test_a_call_with_padding_takes_the_other_graph_and_the_cache_goes_on(compiled):
    engine, general = opened(compiled("llama")), every(compiled("llama"))
    for batch in (Rows(engine, 1), Rows(general, 1)):
        batch.read(tokens(1, 4))
    assert not engine._serving
    pair = [Rows(engine, 2), Rows(general, 2)]
    real = np.ones((2, 6), np.int64)
    real[1, :3] = 0
    for rows in pair:
        rows.keep([0, 1])
    first, second = (rows.read(tokens(2, 6), real, every=True) for rows in pair)
    assert engine._serving == {"decoder"}
    assert np.array_equal(first[real == 1], second[real == 1])
    alone = Rows(engine, 1)
    alone.read(tokens(1, 4))
    assert engine._serving == {"decoder"}, "one of the two is open"


def test_a_cache_filled_by_one_graph_is_read_by_the_other(compiled):
    engine, general = opened(compiled("llama")), every(compiled("llama"))
    pair = [Rows(engine, 1), Rows(general, 1)]
    for rows in pair:
        rows.read(tokens(1, 9))
    assert not engine._serving
    engine._session("decoder", lambda: False)
    for seed in range(3):
        first, second = (rows.read(tokens(1, 1, seed)) for rows in pair)
        assert np.abs(first - second).max() < TOLERANCE * np.abs(second).max()


def test_positions_that_are_not_the_slots_are_not_even(compiled):
    engine = opened(compiled("llama"))
    state = engine.start("decoder", 1)
    inputs = {
        "input_ids": tokens(1, 3),
        "attention_mask": np.ones((1, 3), np.int64),
        "position_ids": np.array([[0, 1, 3]]),
        "logits_to_keep": np.arange(3),
    }
    engine.run("decoder", inputs, state)
    assert engine._serving == {"decoder"}


def test_an_artifact_compiled_without_the_second_graph_runs(compiled, tmp_path):
    folder = shutil.copytree(compiled("llama"), tmp_path / "artifact")
    manifest = read_manifest(folder)
    (entry,) = manifest.compiled
    (even,) = (name for name in entry.files if name.endswith(EVEN))
    for kept in (tuple(name for name in entry.files if name != even), (even,)):
        write_manifest(folder, replace(manifest, compiled=(replace(entry, files=kept),)))
        if kept == (even,):
            with pytest.raises(FormatError, match="must have one graph"):
                opened(folder)
        else:
            rows = Rows(opened(folder), 1)
            expected = Rows(every(compiled("llama")), 1)
            assert np.array_equal(rows.read(tokens(1, 3)), expected.read(tokens(1, 3)))
