"""A foreign module's graph goes step by step with a cache where it can, and says why where it cannot."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from torch import nn  # noqa: E402

from portlm.compile.canonical_decoder import decoder_of  # noqa: E402
from portlm.errors import ParityError, UsageError  # noqa: E402

EQUAL = 1e-5  # of the largest logit: a hundred roundings of float32
LENGTHS = (11, 7, 3)  # left-padded to the first


def logits_of(module, ids):
    with torch.no_grad():
        result = module(ids)
    result = getattr(result, "logits", result)
    return result[0] if isinstance(result, tuple) else result


MODELS = ("tutorial_gpt", "transformers_gpt2", "transformers_llama")


@pytest.fixture(scope="module", params=MODELS)
def pair(request, foreign):
    """A foreign model, and its decoder."""
    if request.param != "tutorial_gpt":
        pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    model = getattr(foreign, request.param)()
    return model, decoder_of(model)


def test_steps_over_a_cache_equal_the_module_on_ragged_rows(pair):
    """The module sees each row alone; the decoder all of them, padded on the left, in a prefill and single tokens."""
    model, decoder = pair
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 61, (n,), generator=generator) for n in LENGTHS]
    total = LENGTHS[0]
    ids = torch.stack([nn.functional.pad(row, (total - len(row), 0)) for row in rows])
    mask = torch.stack([torch.cat((torch.zeros(total - n), torch.ones(n))) for n in LENGTHS]).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    past = [(torch.zeros(3, K, 0, D), torch.zeros(3, K, 0, D)) for K, D in decoder.caches]
    begin, parts = 0, []
    for end in (5, 9, 10, 11):
        keep = torch.arange(end - begin)
        new = (ids[:, begin:end], places[:, begin:end], mask[:, :end], past, keep)
        logits, past = decoder.step(*new)
        parts.append(logits)
        begin = end
    found = torch.cat(parts, 1)
    for b, row in enumerate(rows):
        expected = logits_of(model, row[None])[0]
        assert (found[b, total - len(row) :] - expected).abs().max() <= EQUAL * expected.abs().max()


def test_only_the_tokens_to_keep_reach_the_head(pair):
    _, decoder = pair
    ids, places = torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6)
    past = [(torch.zeros(2, K, 0, D), torch.zeros(2, K, 0, D)) for K, D in decoder.caches]
    logits, _ = decoder.step(ids, places, torch.ones(2, 6, dtype=torch.int64), past, torch.tensor([5, 2]))
    assert torch.allclose(logits, decoder(ids)[:, [5, 2]], rtol=0, atol=EQUAL * float(logits.abs().max()))
    head = [n for n in decoder._graph.nodes if str(n.target) == "portlm.linear.default"][-1]
    assert head.args[0].target is torch.ops.aten.index_select.default


def test_weights_keep_their_names(pair):
    model, decoder = pair
    ours, theirs = dict(decoder.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    own = {name for name in ours if name not in theirs}
    assert {name.split(".")[0] for name in own} <= {"rotary"}
    assert sum(p.numel() for p in ours.values()) >= sum(p.numel() for p in model.parameters())


def test_the_graph_is_that_of_a_model_of_our_own(pair, tmp_path):
    """One node per op, named after the foreign module's parts; both profiles pass the check of graphs."""
    onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export_module

    model, decoder = pair
    out = export_module(decoder, tmp_path / "artifact")
    nodes = onnx.load(out / "onnx" / "decoder.fused.onnx", load_external_data=False).graph.node
    L = len(decoder.caches)
    kinds = [n.op_type for n in nodes]
    assert kinds.count("CachedAttention") == L
    assert kinds.count("AddLayerNorm") + kinds.count("AddRmsNorm") == 2 * L
    assert kinds.count("Rotary") in (0, 2 * L)
    assert len(nodes) <= 15 * L
    modules = {name for name, _ in model.named_modules()}
    assert sum(n.name in modules for n in nodes) >= len(nodes) // 2


@pytest.mark.parametrize("profile", ["portable"])
def test_the_exported_graph_gives_the_module_s_logits(pair, tmp_path, ort_step, profile):
    np = pytest.importorskip("numpy")
    from portlm.compile.export import export_module

    model, decoder = pair
    out = export_module(decoder, tmp_path / "artifact")
    step = ort_step(out / "onnx" / f"decoder.{profile}.onnx")
    ids = np.random.default_rng(0).integers(0, 61, (2, 7))
    inputs = {
        "input_ids": ids, "attention_mask": np.ones((2, 7), np.int64),
        "position_ids": np.tile(np.arange(7), (2, 1)), "logits_to_keep": np.arange(7),
    }  # fmt: skip
    for layer, (K, D) in enumerate(decoder.caches):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{layer}.{kind}"] = np.zeros((2, K, 0, D), np.float32)
    expected = logits_of(model, torch.from_numpy(ids)).numpy()
    assert abs(step(inputs)["logits"] - expected).max() <= EQUAL * abs(expected).max()


class Mixer(nn.Module):
    """A block in which `mix` lets tokens meet beside causal attention."""

    def __init__(self, mix):
        super().__init__()
        self.tokens, self.places = nn.Embedding(37, 16), nn.Embedding(20, 16)
        self.qkv, self.head, self.mix = nn.Linear(16, 48), nn.Linear(16, 37), mix

    def forward(self, ids):
        B, T = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(T))
        q, k, v = self.qkv(x).view(B, T, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.mix(x + y.transpose(1, 2).reshape(B, T, 16)))


def full_attention(x):
    return x + (x @ x.transpose(1, 2)).softmax(-1) @ x


def sums_over_time(x):
    return x + x @ (x.transpose(1, 2) @ x)


def weakly_hidden(x):
    ahead = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    return x + (x @ x.transpose(1, 2)).masked_fill(ahead, -3.0).softmax(-1) @ x


def first_row_sees_all(x):
    """The mask hides the token itself too, so that the first sees nothing, which is everything to softmax."""
    unseen = torch.ones(x.shape[1], x.shape[1]).triu(0).bool()
    return x + (x @ x.transpose(1, 2)).masked_fill(unseen, -1e9).softmax(-1) @ x


def window(x):
    places = torch.arange(x.shape[1])
    far = places[:, None] - places
    return x + (x @ x.transpose(1, 2)).masked_fill((far < 0) | (far > 2), -torch.inf).softmax(-1) @ x


def decay(x):
    places = torch.arange(x.shape[1])
    far = places[:, None] - places
    return x + (x @ x.transpose(1, 2) * torch.where(far >= 0, 0.9**far, 0.0)) @ x


@pytest.mark.parametrize(
    "mix", [full_attention, sums_over_time, weakly_hidden, first_row_sees_all], ids=lambda f: f.__name__
)
def test_a_token_that_sees_those_after_it_is_refused(foreign, mix):
    """Rows of a batch are padded behind their end: such a module would answer by the padding."""
    with pytest.raises(UsageError, match=r"when others follow.*test_canonical_decoder.py line"):
        decoder_of(foreign.randomised(Mixer(mix)))


@pytest.mark.parametrize("mix", [window, decay], ids=lambda f: f.__name__)
def test_what_sees_tokens_otherwise_has_no_cache_and_says_where(foreign, mix):
    model = foreign.randomised(Mixer(mix))
    decoder = decoder_of(model)
    assert "tokens see each other" in decoder.why_not
    assert "test_canonical_decoder.py line" in decoder.why_not
    assert decoder.caches == []
    (role,) = decoder.roles().values()
    assert role.state == ()
    assert [i.name for i in role.inputs] == ["input_ids", "position_ids", "positions"]
    ids = torch.arange(8).view(2, 4)
    places = torch.arange(4)
    with torch.no_grad():
        (logits,) = role.function(ids, places.expand(2, 4), places)
    assert torch.allclose(logits, logits_of(model, ids), rtol=0, atol=EQUAL * float(logits.abs().max()))
    assert not any(
        "portlm.attention" in str(n.target) for n in decoder._plain.nodes
    )  # it has no form without a cache
    with pytest.warns(UserWarning, match=r"without a cache.*step\(\)"):
        decoder.warn("Mixer")


def test_what_stays_in_its_token_has_a_cache(foreign):
    decoder = decoder_of(foreign.randomised(Mixer(lambda x: x * x.mean(-1, keepdim=True).sigmoid())))
    assert decoder.why_not == ""
    assert decoder.caches == [(2, 8)]


def test_steps_that_differ_from_the_sequence_are_never_exported(foreign, monkeypatch):
    """If `mixing` missed something, the numbers would show it."""
    from portlm.compile import canonical_decoder

    monkeypatch.setattr(canonical_decoder, "mixing", lambda canonical: "")
    with pytest.raises(ParityError, match="differ from the whole sequence"):
        decoder_of(foreign.randomised(Mixer(full_attention)))


@pytest.mark.parametrize("name", ["step", "roles", "caches"])
def test_a_part_with_a_name_that_the_decoder_has_is_named(foreign, name):
    model = Mixer(lambda x: x)
    model.add_module(name, nn.Linear(16, 16))
    model.mix = lambda x: model._modules[name](x)
    with pytest.raises(UsageError, match=f"called '{name}'.*rename it"):
        decoder_of(foreign.randomised(model))
