"""Whole modules in plain PyTorch become graphs of portlm's ops that compute the same."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from canonical_cases import CONTEXT, Attention, assert_equal, big, canonical_of, counts, sdpa  # noqa: E402

from portlm.errors import ParityError  # noqa: E402


@pytest.mark.parametrize(
    "settings", [{}, {"tie": True}, {"bias": False}], ids=["plain", "tied", "without biases"]
)
def test_tutorial_gpt(foreign, settings):
    model = foreign.tutorial_gpt(**settings)
    canonical = canonical_of(model)
    assert_equal(canonical, model, vocab=65, shapes=((1, 1), (2, 9), (1, 32)))
    assert canonical.context_length == 32
    assert canonical.vocab_size == 65
    found, L = counts(canonical), 3
    assert found["portlm.attention"] == found["portlm.gelu_mlp_value"] == L
    assert found["portlm.layer_norm"] + found["portlm.add_layer_norm"] == 2 * L + 1
    assert found["portlm.linear"] == 2 * L + 1  # qkv and out of each layer, and the head
    assert found["aten.permute"] == 0
    assert ("head.weight" in canonical.weights) == ("tie" not in settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_gpt2(foreign, attention):
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    model = foreign.transformers_gpt2(attention)
    canonical = canonical_of(model)
    assert_equal(canonical, model, vocab=61, shapes=((1, 1), (2, 9), (1, 40)))
    assert counts(canonical) == {
        "portlm.embedding": 2, "aten.add.Tensor": 1, "portlm.layer_norm": 1, "portlm.add_layer_norm": 4,
        "portlm.attention": 2, "portlm.gelu_mlp_value": 2, "portlm.linear": 5,
        "aten.split_with_sizes": 2, "aten.reshape": 8, "aten.sym_size.int": 2,
    }  # fmt: skip
    assert "transformer.h.1.attn.c_attn.weight" in canonical.weights


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_llama(foreign, attention):
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    model = foreign.transformers_llama(attention)
    canonical = canonical_of(model, context_length=40)
    assert_equal(canonical, model, vocab=61, shapes=((1, 1), (2, 9), (1, 40)))
    assert counts(canonical) == {
        "portlm.embedding": 3, "portlm.rms_norm": 1, "portlm.add_rms_norm": 4, "portlm.rotary": 4,
        "portlm.attention": 2, "portlm.swiglu": 2, "portlm.linear": 15,
        "aten.reshape": 8, "aten.sym_size.int": 2,
    }  # fmt: skip


def test_a_graph_that_differs_from_its_module_is_never_returned(foreign, monkeypatch):
    """The comparison catches a pass that is wrong: here one that drops every permute."""
    from portlm.compile import canonical

    def scale_lost(work):
        for node in work.graph.nodes:
            if str(node.target) == "portlm.attention.default":
                node.args = (*node.args[:4], 0.1)

    monkeypatch.setattr(canonical, "PASSES", (*canonical.PASSES, scale_lost))
    with pytest.raises(ParityError, match="differs from the module"):
        canonical_of(big(Attention(sdpa), foreign), context_length=CONTEXT)


def test_the_same_module_gives_the_same_graph(foreign):
    one, two = (canonical_of(foreign.tutorial_gpt()) for _ in range(2))
    assert one.module.code == two.module.code
    assert list(one.weights) == list(two.weights)
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
