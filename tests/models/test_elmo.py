"""elmo: what the formulas and torch.nn say, in both directions, with padding, and on every engine."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from engine_cases import TARGETS
from torch import nn

from portlm.character_ids import CHARACTERS as CHARACTER_COUNT
from portlm.character_ids import character_ids
from portlm.errors import ConfigError, ContextLengthError, EngineUnavailableError, FormatError, UsageError
from portlm.hub import export_hf
from portlm.models import FAMILIES, build, config_from_hf, load_model, preset, save_model
from portlm.models.elmo import LayerMix
from portlm.models.elmo_config import ElmoConfig
from portlm.models.projected_lstm import ProjectedLSTM
from portlm.text_tokenizer import words_at_spaces
from portlm.tokenizer import byte_tokenizer

TINY = ElmoConfig.tiny()
CONFIGS = {
    "bounds": TINY,
    "no bounds": dataclasses.replace(TINY, cell_clip=0.0, projection_clip=0.0),
    "mixed": dataclasses.replace(TINY, mix=(0.5, -1.0, 2.0), gamma=1.5),
    "one layer": dataclasses.replace(TINY, n_layer=1),
    "three layers": dataclasses.replace(TINY, n_layer=3, cells=9, width=17),
}
CHARACTERS = ElmoConfig(
    input="characters", context_length=32, cells=10, width=7, word_length=6, character_width=5,
    filters=((1, 4), (2, 3), (5, 6)), n_highway=2, dropout=0.0, output=False,
)  # fmt: skip
every_config = pytest.mark.parametrize("name", CONFIGS)


def random_model(config):
    """A model whose every parameter, biases included, matters to the result."""
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(config, *shape, seed=1):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def clip(x, bound):
    return x.clamp(-bound, bound) if bound else x


def their_direction(direction, x):
    """The layers of one direction by the papers' formulas, token by token, for a text (T, C)."""
    config, found = direction.config, [x]
    for number, layer in enumerate(direction.layers):
        h, c = x.new_zeros(config.width), x.new_zeros(config.cells)
        y = [None] * len(x)
        for t in reversed(range(len(x))) if direction.reverse else range(len(x)):
            gates = layer.input.weight @ x[t] + layer.input.bias + layer.recurrent.weight @ h
            i, f, g, o = gates.view(4, config.cells)
            c = clip(f.sigmoid() * c + i.sigmoid() * g.tanh(), config.cell_clip)
            h = clip(layer.projection.weight @ (o.sigmoid() * c.tanh()), config.projection_clip)
            y[t] = h
        x = torch.stack(y) + (x if number else 0)
        found.append(x)
    return found


def their_layers(model, text):
    x = model.tokens.weight[text]
    return [their_direction(direction, x) for direction in (model.forward_lm, model.backward_lm)]


def their_losses(model, texts):
    """The negative log-likelihood of each direction over all texts, per token that it predicts."""
    totals, count = [0.0, 0.0], 0
    for text in texts:
        ahead, behind = (
            states[-1] @ model.head.weight.T + model.head.bias for states in their_layers(model, text)
        )
        totals[0] = totals[0] + nn.functional.cross_entropy(ahead[:-1], text[1:], reduction="sum")
        totals[1] = totals[1] + nn.functional.cross_entropy(behind[1:], text[:-1], reduction="sum")
        count += len(text) - 1
    return [total / count for total in totals]


# ---- the formulas ------------------------------------------------------------------------------------------------


@every_config
def test_float64_vectors_loss_and_gradients_are_those_of_the_formulas(name):
    """The same sums in another order: 1e-9 leaves a margin of 1e5."""
    model = random_model(CONFIGS[name]).double()
    ids = tokens(model.config, 3, 8)
    weights = torch.softmax(torch.tensor(model.config.mix or [0.0] * (model.config.n_layer + 1)).double(), 0)
    expected = [
        model.config.gamma
        * sum(w * torch.cat(pair, -1) for w, *pair in zip(weights, *their_layers(model, row), strict=True))
        for row in ids
    ]
    torch.testing.assert_close(model.encode(ids), torch.stack(expected), atol=1e-9, rtol=1e-9)
    loss, other = model(ids, ids), sum(their_losses(model, ids))
    torch.testing.assert_close(loss, other, atol=1e-9, rtol=1e-9)
    parameters = list(model.parameters())
    ours, gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(other, parameters)
    for (parameter, _), a, b in zip(model.named_parameters(), ours, gradients, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().item(), parameter


@pytest.mark.runs_kernel("embedding_fwd", "embedding_bwd", "gemm", "linear_bwd", "linear_cross_entropy")
def test_float32_vectors_and_loss_are_near_those_of_float64():
    """Order-one numbers through eleven tokens; each rounding is 6e-8 of them."""
    model = random_model(TINY)
    ids = tokens(model.config, 3, 11)
    loss, vectors = model(ids, ids), model.encode(ids)
    loss.backward()
    exact = random_model(TINY).double()
    other = exact(ids, ids)
    other.backward()
    torch.testing.assert_close(vectors.double(), exact.encode(ids), atol=1e-5, rtol=1e-5)
    assert abs(loss.item() - other.item()) <= 1e-5 * other.item()
    for (parameter, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max().item(), parameter


@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_without_bounds_is_the_lstm_of_torch_with_a_projection(reverse):
    """Forward and every gradient in float64: the same sums in another order."""
    torch.manual_seed(3)
    layer = ProjectedLSTM(6, 11, 5, cell_clip=0.0, projection_clip=0.0).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0.0, 0.4)
    theirs = nn.LSTM(6, 11, proj_size=5, batch_first=True).double()
    given = {
        "weight_ih_l0": layer.input.weight,
        "weight_hh_l0": layer.recurrent.weight,
        "bias_ih_l0": layer.input.bias,
        "bias_hh_l0": torch.zeros_like(layer.input.bias),
        "weight_hr_l0": layer.projection.weight,
    }
    x, h, c = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 7, 6), (3, 5), (3, 11))
    )
    y, (last, cells) = layer(x, (h, c), None, reverse=reverse)
    wanted = x.flip(1) if reverse else x
    other, (their_last, their_cells) = torch.func.functional_call(theirs, given, (wanted, (h[None], c[None])))
    other = other.flip(1) if reverse else other
    pairs = [(y, other), (last, their_last[0]), (cells, their_cells[0])]
    weights = [torch.randn_like(a) for a, _ in pairs]
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    inputs = [x, h, c, *layer.parameters()]
    sums = [sum((w * pair[k]).sum() for w, pair in zip(weights, pairs, strict=True)) for k in (0, 1)]
    for a, b in zip(*(torch.autograd.grad(total, inputs) for total in sums), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_bounds_hold_for_cells_and_states_and_let_no_gradient_through():
    torch.manual_seed(0)
    layer = ProjectedLSTM(4, 9, 6, cell_clip=0.2, projection_clip=0.1)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0.0, 2.0)
    x = torch.randn(2, 12, 4, requires_grad=True)
    y, (h, c) = layer(x, (torch.zeros(2, 6), torch.zeros(2, 9)), None, reverse=False)
    assert y.abs().max().item() == pytest.approx(0.1)
    assert c.abs().max().item() == pytest.approx(0.2)
    assert h.abs().max().item() <= 0.1 + 1e-7
    at_bound = (y[0, -1].abs() >= 0.1).nonzero()[0].item()
    (gradient,) = torch.autograd.grad(y[0, -1, at_bound], x)
    assert bool((gradient == 0).all())


# ---- what a direction sees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", range(6))
@every_config
def test_no_forward_prediction_sees_its_own_token_or_later_ones_and_no_backward_one_earlier_ones(name, t):
    """The gradient is exactly 0 where nothing leads, and is none where something does."""
    model = random_model(CONFIGS[name])
    vectors = model.tokens(tokens(model.config, 1, 6)).detach().requires_grad_()
    model.tokens.forward = lambda ids: vectors
    logits = model(torch.zeros(1, 6, dtype=torch.int64))  # (1, T, 2, V)
    if t:  # token t is predicted forward from t - 1, the tokens before it
        (gradient,) = torch.autograd.grad(logits[0, t - 1, 0].square().sum(), vectors, retain_graph=True)
        assert bool((gradient[0, t:] == 0).all())
        assert bool((gradient[0, :t] != 0).any(-1).all())
    if t < 5:  # and backward from t + 1, those behind it
        (gradient,) = torch.autograd.grad(logits[0, t + 1, 1].square().sum(), vectors)
        assert bool((gradient[0, : t + 1] == 0).all())
        assert bool((gradient[0, t + 1 :] != 0).any(-1).all())


@pytest.mark.parametrize("side", ["left", "right"])
@every_config
def test_padding_changes_neither_vectors_nor_losses_nor_gradients(name, side):
    """In float64, where a padded batch is the same sums as its rows alone."""
    model = random_model(CONFIGS[name]).double()
    rows = [tokens(model.config, n, seed=n) for n in (3, 9, 1, 6)]
    pads = [(9 - len(row), 0) if side == "left" else (0, 9 - len(row)) for row in rows]
    ids = torch.stack([nn.functional.pad(row, n, value=7) for row, n in zip(rows, pads, strict=True)])
    mask = torch.stack(
        [nn.functional.pad(torch.ones_like(row), n) for row, n in zip(rows, pads, strict=True)]
    )
    targets = ids.masked_fill(mask == 0, -100)
    vectors = model.encode(ids, mask)
    for b, row in enumerate(rows):
        torch.testing.assert_close(
            vectors[b, mask[b] == 1], model.encode(row[None])[0], atol=1e-12, rtol=1e-12
        )
    losses, expected = (
        model.losses(ids, targets, mask),
        their_losses(model, [row for row in rows if len(row) > 1]),
    )
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), atol=1e-12, rtol=1e-12)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(model(ids, targets, mask), parameters)
    for a, b in zip(ours, torch.autograd.grad(sum(expected), parameters), strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().item()


def test_dropout_is_of_training_alone():
    model = random_model(dataclasses.replace(TINY, dropout=0.5))
    ids = tokens(TINY, 2, 6)
    assert not torch.equal(model.train()(ids, ids), model(ids, ids))
    assert torch.equal(model.eval()(ids, ids), model(ids, ids))


def test_a_task_learns_a_mix_of_its_own_and_leaves_it_in_a_configuration():
    model = random_model(TINY).requires_grad_(False)
    mix = LayerMix(TINY)
    ids = tokens(TINY, 2, 6)
    ahead, behind = model.layers(ids)
    torch.testing.assert_close(torch.cat([mix(ahead), mix(behind)], -1), model.encode(ids))
    optimizer = torch.optim.SGD(mix.parameters(), lr=0.5)
    loss = (mix(ahead) - ahead[2]).square().mean()
    loss.backward()
    optimizer.step()
    learned = mix.learned()
    assert learned.mix[2] > max(learned.mix[:2])
    model.config = learned
    torch.testing.assert_close(torch.cat([mix(ahead), mix(behind)], -1), model.encode(ids))
    assert config_from_hf(json.loads(json.dumps(learned.to_hf()))) == learned


# ---- characters --------------------------------------------------------------------------------------------------


def their_word(cnn, ids):
    """The vector of a word (W,) by the papers' formulas: every window of every filter by itself."""
    x = cnn.characters.weight[ids]  # (W, D)
    found = []
    for convolution in cnn.convolutions:
        weight = convolution.weight.unflatten(1, (-1, x.shape[1])).transpose(1, 2)  # (filters, D, size)
        size = weight.shape[2]
        windows = [(x[t : t + size].T * weight).sum((1, 2)) for t in range(len(x) - size + 1)]
        found.append((torch.stack(windows).max(0).values + convolution.bias).clamp(min=0))
    y = torch.cat(found)
    for highway in cnn.highways:
        kept = (highway.gate.weight @ y + highway.gate.bias).sigmoid()
        y = kept * y + (1 - kept) * (highway.map.weight @ y + highway.map.bias).clamp(min=0)
    return cnn.projection.weight @ y + cnn.projection.bias


def test_words_from_characters_are_those_of_the_formulas():
    """In float64: the same sums in another order. Gradients reach every parameter of the network."""
    model = random_model(CHARACTERS).double()
    ids = tokens(CHARACTERS, 2, 3, 6)
    words = model.tokens(ids)
    expected = torch.stack([torch.stack([their_word(model.tokens, word) for word in row]) for row in ids])
    torch.testing.assert_close(words, expected, atol=1e-12, rtol=1e-12)
    parameters = list(model.tokens.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (words, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
        assert bool((b != 0).any())
    vectors = model.encode(ids)
    assert vectors.shape == (2, 3, 14)
    their = [their_direction(d, expected[0]) for d in (model.forward_lm, model.backward_lm)]
    torch.testing.assert_close(vectors[0], sum(torch.cat(pair, -1) for pair in zip(*their, strict=True)) / 3)


def test_a_model_of_characters_says_that_it_predicts_nothing_and_what_it_reads():
    model = build(CHARACTERS)
    with pytest.raises(UsageError, match="this elmo has no output layer"):
        model(tokens(CHARACTERS, 1, 3, 6))
    with pytest.raises(UsageError, match=r"elmo of characters are \(B, T, 6\), got \(1, 3\)"):
        model.encode(tokens(CHARACTERS, 1, 3))


# ---- configurations and folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES["elmo"].presets())
def test_presets_have_the_published_parameter_counts(name):
    assert build(preset(name), device="meta").num_parameters() == FAMILIES["elmo"].parameters()[name]
    assert config_from_hf(json.loads(json.dumps(preset(name).to_hf()))) == preset(name)


@pytest.mark.parametrize("config", [*CONFIGS.values(), CHARACTERS])
def test_a_saved_model_comes_back_equal(config, tmp_path):
    model = random_model(config).eval()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    ids = tokens(config, 2, 5, *((6,) if config.input == "characters" else ()))
    assert torch.equal(loaded.encode(ids), model.encode(ids))


def test_the_settings_of_training_make_a_small_model_and_are_checked_by_the_family():
    small = ElmoConfig.from_settings(vocab_size=300, eos_token_ids=(299,), **ElmoConfig.SETTINGS)
    assert (small.vocab_size, small.input) == (300, "tokens")
    assert build(small).num_parameters() < 2_000_000
    for name, default in ElmoConfig.SETTINGS.items():
        if type(default) is int:
            with pytest.raises(ConfigError, match=name):
                ElmoConfig.from_settings(
                    vocab_size=300, eos_token_ids=(), **{**ElmoConfig.SETTINGS, name: -1}
                )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input", "words", "input must be one of tokens, characters; portlm does not compute 'words'"),
        (
            "mix",
            [1.0],
            "mix must be a number from -1e\\+06 to 1e\\+06 for the token layer and for each of 2 layers",
        ),
        ("mix", [1.0, None, 2], "mix must be a list of numbers"),
        ("mix", [1.0, 10**400, 2], "mix must be a list of numbers"),
        ("filters", [[60, 3]], r"filters must be from 1 to word_length = 50 characters wide.*got \[60, 3\]"),
        ("filters", [], "filters must be"),
        ("filters", [[1]], "filters must be a list of"),
        ("cell_clip", -1, "cell_clip must be a number from 0"),
        ("bidirectional", True, "'bidirectional' is a key portlm does not know"),
    ],
)
def test_a_config_that_says_another_model_is_refused_by_the_name_of_the_key(key, value, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**TINY.to_hf(), key: value})


def test_texts_longer_than_the_context_and_empty_ones_are_refused():
    model = build(TINY)
    with pytest.raises(ContextLengthError, match="33 tokens, but the model's context holds 32"):
        model.encode(tokens(TINY, 1, 33))
    with pytest.raises(UsageError, match=r"input_ids of an elmo of tokens are \(B, T\), got \(1, 0\)"):
        model.encode(tokens(TINY, 1, 0))


def test_export_to_hugging_face_is_refused_because_nothing_there_would_open_it(tmp_path):
    save_model(tmp_path / "model", build(TINY))
    with pytest.raises(FormatError, match="transformers has no models of the family elmo"):
        export_hf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- graphs and engines ------------------------------------------------------------------------------------------

TEXTS = ["hello there", "a", "some other text", "of", "a text that is longer than all"]
PLACES = [t for t in TARGETS if t[0] != "packed" and t[1] == "cpu"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The folder of an exported model with a mix of its own, made once."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    folder = tmp_path_factory.mktemp("elmo")
    save_model(folder / "checkpoint", random_model(CONFIGS["mixed"]), byte_tokenizer())
    return export(folder / "checkpoint", folder / "artifact")


def load(folder, engine, device, profile):
    """What opens an artifact there, or a skip that says what is missing."""
    from portlm.flows.load import load

    try:
        return load(folder, engine, device, profile)
    except EngineUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("place", PLACES, ids=":".join)
def test_every_engine_embeds_a_ragged_batch_as_the_model_reads_each_text_alone(artifact, place):
    """float32 engines add in different orders: 1e-5 of vectors of order one."""
    model = random_model(CONFIGS["mixed"]).eval()
    with load(artifact, *place) as session:
        for batch_size in (2, 32):
            found = session.embed(TEXTS, normalize=False, batch_size=batch_size)
            first = session.embed(TEXTS, normalize=False, pooling="cls", batch_size=batch_size)
            for text, mean, cls in zip(TEXTS, found, first, strict=True):
                vectors = model.encode(torch.tensor([session.tokenizer.encode(text)]))[0].detach().numpy()
                np.testing.assert_allclose(mean, vectors.mean(0), rtol=0, atol=1e-5)
                np.testing.assert_allclose(cls, vectors[0], rtol=0, atol=1e-5)
        assert set(session.engine.placement().nodes) == {"cpu"}


def test_verify_passes_on_every_engine_of_the_cpu(artifact):
    from portlm.flows.targets import Target
    from portlm.flows.verify import verify_artifact

    for place in PLACES:
        load(artifact, *place).close()  # or the test is skipped
    # To look into a graph, TVM compiles it anew with every value kept, which tests/compile/test_parity.py does.
    for engines, search in (({"torch", "ort"}, True), ({"tvm"}, False)):
        targets = [Target(*place) for place in PLACES if place[0] in engines]
        results = verify_artifact(artifact, targets, search=search)
        assert [(result.target, result.problem) for result in results] == [
            (target, None) for target in targets
        ]
        assert all(result.row.max_logit_error <= 1e-4 for result in results)


def test_verbs_that_the_model_cannot_do_say_what_it_has(artifact):
    with load(artifact, *PLACES[0]) as session:
        for verb in (session.generate, session.score):
            with pytest.raises(
                UsageError, match="no role 'decoder', only encoder, so it cannot continue a text"
            ):
                verb("a text")
        with pytest.raises(UsageError, match="cannot classify texts: that takes a model with head:classify"):
            session.classify("a text")
        with pytest.raises(UsageError, match="cannot fill in masks"):
            session.fill("a [MASK]")
        with pytest.raises(UsageError, match="translates nothing"):
            session.translate("a text")
        with pytest.raises(UsageError, match="the text is empty, so there is nothing to read"):
            session.embed("")
        with pytest.raises(
            ContextLengthError, match="the text has 40 tokens, but the model's context holds 32"
        ):
            session.embed("x" * 40)
        cut = session.embed("x" * 40, truncate=True)
        np.testing.assert_allclose(cut, session.embed("x" * 32), atol=1e-6)


# ---- characters on engines ----------------------------------------------------------------------------------------

WORDS = ["[UNK]", "the", "cat", "sat"]
SPELLED = dataclasses.replace(CHARACTERS, vocab_size=len(WORDS), width=8, output=True)


@pytest.fixture(scope="module")
def spelled_artifact(tmp_path_factory):
    """The folder of an exported model that reads characters, with a tokenizer of three words."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    folder = tmp_path_factory.mktemp("spelled")
    save_model(folder / "checkpoint", random_model(SPELLED), words_at_spaces(WORDS))
    return export(folder / "checkpoint", folder / "artifact")


@pytest.mark.parametrize("place", PLACES, ids=":".join)
def test_every_engine_reads_the_characters_of_words_known_or_not(spelled_artifact, place):
    """float32 engines add in different orders: 1e-5 of vectors of order one."""
    texts = ["the cat sat", "a zebra", "the zebu sat on cat"]
    model = random_model(SPELLED).eval()
    with load(spelled_artifact, *place) as session:
        found = session.embed(texts, normalize=False)
        for text, vector in zip(texts, found, strict=True):
            ids = torch.from_numpy(character_ids(text.split(), SPELLED.word_length))[None]
            np.testing.assert_allclose(vector, model.encode(ids)[0].mean(0).detach(), rtol=0, atol=1e-5)
        unknown = session.embed(["a zebra", "a horse"], normalize=False)  # [UNK] [UNK] to the tokenizer
        assert np.abs(unknown[0] - unknown[1]).max() > 1e-3
        assert set(session.engine.placement().nodes) == {"cpu"}


def test_verify_passes_for_characters(spelled_artifact):
    from portlm.flows.verify import verify_artifact

    for place in PLACES:
        load(spelled_artifact, *place).close()  # which compiles what is missing
    measured = {str(result.target): result for result in verify_artifact(spelled_artifact)}
    assert [result.problem for result in measured.values()] == [None] * len(measured)
    assert {"torch:cpu:native", "ort:cpu:portable"} <= measured.keys()


def test_characters_are_not_made_of_token_ids_without_a_tokenizer(tmp_path):
    save_model(tmp_path / "model", random_model(SPELLED))
    with (
        load(tmp_path / "model", "torch", "cpu", "native") as session,
        pytest.raises(UsageError, match="reads the characters of words, which token ids do not say"),
    ):
        session.embed([[1, 2]])


def test_an_output_layer_is_part_of_the_configuration():
    assert config_from_hf(json.loads(json.dumps(SPELLED.to_hf()))) == SPELLED
    old = {key: value for key, value in CHARACTERS.to_hf().items() if key != "output_layer"}
    assert config_from_hf(old) == CHARACTERS  # as the published ones are
    assert build(SPELLED).head.weight.shape == (len(WORDS), 8)
    model = random_model(SPELLED).double()
    ids = tokens(SPELLED, 2, 5)
    spelling = torch.randint(CHARACTER_COUNT, (len(WORDS), 6), generator=torch.Generator().manual_seed(2))
    loss = model(spelling[ids], ids)
    x = model.tokens(spelling[ids])
    ahead, behind = [direction(x, None, None)[0][-1] for direction in (model.forward_lm, model.backward_lm)]
    pairs = (ahead[:, :-1], ids[:, 1:]), (behind[:, 1:], ids[:, :-1])
    parts = [
        nn.functional.cross_entropy(model.head(y).flatten(0, 1), wanted.flatten()) for y, wanted in pairs
    ]
    torch.testing.assert_close(loss, sum(parts), atol=1e-12, rtol=1e-12)
