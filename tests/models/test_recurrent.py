"""recurrent, awd_lstm, nplm, ngram: what torch.nn and the papers' formulas say, from training to every engine."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from engine_cases import TARGETS
from ngram_trees import random_ngrams, their_ngram
from torch import nn

from portlm.errors import ConfigError, ContextLengthError, EngineUnavailableError, FormatError
from portlm.hub import export_hf
from portlm.models import FAMILIES, build, config_from_hf, load_model, preset, save_model
from portlm.models.awd_lstm import AWDLSTMConfig
from portlm.models.ngram import NGramConfig
from portlm.models.nplm import NPLMConfig
from portlm.models.recurrent import RecurrentConfig
from portlm.rows import Rows, pad

CONFIGS = {
    **{
        cell: dataclasses.replace(RecurrentConfig.tiny(), cell=cell)
        for cell in ("rnn", "rnn_relu", "lstm", "gru")
    },
    "tied": dataclasses.replace(RecurrentConfig.tiny(), tie_embeddings=True, n_layer=1),
    "awd": AWDLSTMConfig.tiny(),
    "nplm": NPLMConfig.tiny(),
    "indirect": dataclasses.replace(NPLMConfig.tiny(), direct=False),
    "bigram": dataclasses.replace(NPLMConfig.tiny(), order=2),
    "ngram": NGramConfig.tiny(),
    "counts of single words": NGramConfig(vocab_size=259, context_length=32, order=1),
}
SEQUENCES = {
    "rnn": ("rnn_fwd", "rnn_bwd"), "rnn_relu": ("rnn_fwd", "rnn_bwd"), "lstm": ("lstm_fwd", "lstm_bwd"),
    "gru": ("gru_fwd", "gru_bwd"), "tied": ("lstm_fwd", "lstm_bwd"), "awd": ("lstm_fwd", "lstm_bwd"),
}  # fmt: skip
every_config = pytest.mark.parametrize("name", CONFIGS)
every_config_training = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.runs_kernel("gemm", "linear_cross_entropy", *SEQUENCES.get(n, ())))
        for n in CONFIGS
        if CONFIGS[n].family != "ngram"
    ],
)
OF_TEXTS = ("recurrent", "awd_lstm", "nplm")
# Each cell and each family. The others are the same nodes on engines: ReLU for tanh, which tests/ops/test_matrix.py
# takes through all of them, a head that is the embedding, fewer products.
ON_ENGINES = ("rnn", "lstm", "gru", "awd", "nplm", "ngram")
every_engine_config = pytest.mark.parametrize("name", ON_ENGINES)
every_preset = pytest.mark.parametrize(
    ("family", "name"), [(f, name) for f in OF_TEXTS for name in FAMILIES[f].presets()]
)


def random_model(config):
    """A model whose every parameter, biases included, matters to the result."""
    if config.family == "ngram":
        return random_ngrams(config)
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(config, *shape, seed=1):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class TheirRecurrent(nn.Module):
    """The same of torch.nn's modules, on the same parameters."""

    def __init__(self, model):
        super().__init__()
        cell = model.config.cell
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell, nn.RNN)
        options = {"nonlinearity": "relu" if cell == "rnn_relu" else "tanh"} if kind is nn.RNN else {}
        self.layers = nn.ModuleList(
            [kind(*widths, batch_first=True, **options) for widths in model.config.layers]
        ).to(model.head_bias.dtype)
        self.model = model

    def forward(self, ids):
        x = nn.functional.embedding(ids, self.model.embed.weight)
        for theirs, layer in zip(self.layers, self.model.layers, strict=True):
            bias = layer.recurrent.bias
            given = {
                "weight_ih_l0": layer.input.weight,
                "weight_hh_l0": layer.recurrent.weight,
                "bias_ih_l0": layer.input.bias,
                "bias_hh_l0": torch.zeros_like(layer.input.bias) if bias is None else bias,
            }
            x, _ = torch.func.functional_call(theirs, given, (x,))
        return nn.functional.linear(x, self.model.head_weight, self.model.head_bias)


def their_nplm(model, ids):
    """Bengio's formula, word by word: y = b + W x + U tanh(d + H x), x the vectors of the last words, latest first."""
    K, M = model.config.words, model.config.width
    rows = []
    for row in ids:
        logits = []
        for t in range(len(row)):
            vectors = [
                model.embed.weight[row[t - k]] if t >= k else row.new_zeros(M).to(model.flags.dtype)
                for k in range(K)
            ]
            x = torch.cat(vectors)
            y = model.output.bias + model.output.weight @ torch.tanh(
                model.hidden.bias + model.hidden.weight @ x
            )
            logits.append(y if model.direct is None else y + model.direct.weight @ x)
        rows.append(torch.stack(logits))
    return torch.stack(rows)


def theirs(model, ids):
    if model.config.family == "ngram":
        return their_ngram(model, ids)
    return their_nplm(model, ids) if model.config.family == "nplm" else TheirRecurrent(model)(ids)


def cross_entropy(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def check_formulas(name, dtype, bound):
    """Logits, loss and gradients beside those of torch.nn or of the paper, on the same parameters."""
    model = random_model(CONFIGS[name]).to(dtype)
    ids, targets = tokens(model.config, 3, 11), tokens(model.config, 3, 11, seed=2)
    targets[0, :5] = -100
    expected = theirs(model, ids)
    torch.testing.assert_close(model(ids), expected, atol=bound, rtol=bound)
    loss, other = model(ids, targets), cross_entropy(expected, targets)
    assert abs(loss.item() - other.item()) <= bound * other.item()
    parameters = list(model.parameters())
    ours, gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(other, parameters)
    for (parameter, _), a, b in zip(model.named_parameters(), ours, gradients, strict=True):
        # where a number moves all logits alike, its gradient is 0 but for rounding
        assert (a - b).abs().max() <= bound * b.abs().max().item() + 1e-16, parameter


@every_config
def test_float64_logits_loss_and_gradients_are_those_of_the_formulas(name):
    """The same sums in another order: 1e-9 leaves a margin of 1e5."""
    check_formulas(name, torch.float64, 1e-9)


@every_config_training
def test_float32_logits_loss_and_gradients_are_those_of_the_formulas(name):
    """Two float32 computations of order-one logits; each is about 1e-6 away from the exact answer."""
    check_formulas(name, torch.float32, 1e-5)


@every_config
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 6]], ids=str)
def test_reading_in_pieces_gives_the_logits_of_the_whole(name, cuts):
    model = random_model(CONFIGS[name]).eval()
    ids = tokens(model.config, 2, sum(cuts))
    past, pieces, done = None, [], 0
    for n in cuts:
        mask = torch.ones(2, done + n, dtype=torch.int64)
        logits, past = model.step(ids[:, done : done + n], ids[:, :n], mask, past)
        pieces.append(logits)
        done += n
    # one token's products are summed in another order than those of many: a few units in the last place
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=2e-5, rtol=1e-5)


@every_config
def test_rows_of_a_left_padded_batch_are_computed_as_if_alone(name):
    model = random_model(CONFIGS[name]).eval()
    rows = [tokens(model.config, 1, n, seed=n) for n in (3, 9, 6)]
    pad = [9 - row.shape[1] for row in rows]
    ids = torch.cat([nn.functional.pad(row, (n, 0), value=7) for n, row in zip(pad, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (9 - n) for n in pad])
    logits, past = model.step(ids, ids, mask)
    following = tokens(model.config, 3, 2, seed=5)
    more, _ = model.step(following, following, nn.functional.pad(mask, (0, 2), value=1), past)
    for b, row in enumerate(rows):
        alone = model(torch.cat((row, following[b : b + 1]), dim=1))[0]
        torch.testing.assert_close(torch.cat((logits[b, pad[b] :], more[b])), alone, atol=2e-5, rtol=1e-5)


@every_config
def test_step_gives_the_logits_of_the_tokens_that_are_asked_for(name):
    model = random_model(CONFIGS[name]).eval()
    ids = tokens(model.config, 2, 6)
    everything, _ = model.step(ids, ids, torch.ones_like(ids))
    some, _ = model.step(ids, ids, torch.ones_like(ids), logits_to_keep=torch.tensor([5, 0]))
    torch.testing.assert_close(some, everything[:, [5, 0]], atol=1e-6, rtol=1e-6)


@every_config
def test_more_tokens_than_the_context_are_refused(name):
    model = build(CONFIGS[name])
    ids = tokens(model.config, 1, 33)
    with pytest.raises(ContextLengthError, match="33 tokens, but the model's context holds 32"):
        model(ids)
    with pytest.raises(ContextLengthError):
        model.step(ids[:, :1], ids[:, :1], torch.ones_like(ids))


def test_dropout_is_on_what_goes_up_and_never_on_what_goes_on_in_time():
    """With everything dropped that may be, the output is the head's bias and the states are those of silent inputs."""
    config = dataclasses.replace(CONFIGS["lstm"], dropout=0.99, n_layer=1)
    model = random_model(config).train()
    ids = tokens(config, 1, 8)
    torch.manual_seed(0)
    assert not torch.equal(model(ids), model(ids))
    y, [(h, _)] = model._read(ids, None, None)
    assert float((y == 0).float().mean()) > 0.9
    assert bool((h != 0).all())
    assert torch.equal(model.eval()(ids), model(ids))


def dropping(**rates):
    """An AWD-LSTM in training that drops what is named, and two texts of it."""
    config = dataclasses.replace(CONFIGS["awd"], **rates)
    model = random_model(config).train()
    torch.manual_seed(0)
    return model, tokens(config, 2, 9)


@pytest.mark.parametrize("place", ["input_dropout", "layer_dropout", "dropout"])
def test_variational_dropout_drops_the_same_units_at_every_token_of_a_row_and_others_in_other_rows(place):
    """A unit that is kept is scaled by 1 / (1 - 0.5), so what goes up has the mean that it has in evaluation."""
    model, ids = dropping(**{place: 0.5})
    seen = []
    inner = type(model)._locked
    model._locked = lambda x, rate: seen.append((x, inner(model, x, rate), rate)) or seen[-1][1]
    model(ids)
    dropped = [(x, y) for x, y, rate in seen if rate]
    assert len(dropped) == (2 if place == "layer_dropout" else 1)
    for x, y in dropped:
        kept = (y != 0) | (x == 0)
        assert bool((kept == kept[:, :1]).all())
        assert not torch.equal(kept[0, 0], kept[1, 0])
        assert 0.2 < float(kept.float().mean()) < 0.8
        assert torch.equal(y[kept], 2 * x[kept])


def test_embedding_dropout_takes_whole_words_for_the_whole_batch():
    model, _ = dropping(embedding_dropout=0.5)
    ids = torch.arange(40).repeat(2, 2)  # each word four times
    x = model.read(ids)
    silent = (x == 0).all(-1)
    assert torch.equal(silent[:, :40], silent[:, 40:])
    assert torch.equal(silent[0], silent[1])
    assert 8 < int(silent[0, :40].sum()) < 32
    assert torch.equal(x[~silent], 2 * model.embed(ids)[~silent])


def test_dropconnect_zeroes_recurrent_weights_and_nothing_else(monkeypatch):
    from portlm.models import recurrent_decoder

    model, ids = dropping(weight_dropout=0.5)
    seen = []

    def lstm(x, weight_ih, weight_hh, *rest):
        seen.append((weight_ih, weight_hh))
        return recurrent_decoder.lstm.__wrapped__(x, weight_ih, weight_hh, *rest)

    lstm.__wrapped__ = recurrent_decoder.lstm
    monkeypatch.setattr(recurrent_decoder, "lstm", lstm)
    model(ids, ids).backward()
    assert len(seen) == model.config.n_layer
    for layer, (weight_ih, weight_hh) in zip(model.layers, seen, strict=True):
        assert weight_ih is layer.input.weight
        kept = weight_hh != 0
        assert 0.4 < float(kept.float().mean()) < 0.6
        assert torch.equal(weight_hh[kept], 2 * layer.recurrent.weight[kept])
        assert bool((layer.recurrent.weight.grad[~kept] == 0).all())


def test_nothing_is_dropped_where_a_text_is_continued():
    model, ids = dropping(
        **dict.fromkeys(("dropout", "input_dropout", "layer_dropout", "weight_dropout"), 0.5)
    )
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_a_forget_bias_begins_where_it_is_asked_for():
    model = build(dataclasses.replace(CONFIGS["lstm"], forget_bias=1.0))
    i, f, g, o = model.layers[0].input.bias.chunk(4)
    assert bool((f >= 0.8).all() & (f <= 1.2).all())
    assert bool((torch.cat((i, g, o)).abs() <= 0.2).all())


# ---- configurations and folders ----------------------------------------------------------------------------------


@every_preset
def test_presets_have_the_published_parameter_counts(family, name):
    assert build(preset(name), device="meta").num_parameters() == FAMILIES[family].parameters()[name]
    assert config_from_hf(json.loads(json.dumps(preset(name).to_hf()))) == preset(name)


@pytest.mark.parametrize(("V", "n", "m", "h"), [(17, 3, 5, 7), (301, 6, 11, 4)])
def test_nplm_has_as_many_parameters_as_the_paper_counts(V, n, m, h):
    config = NPLMConfig(vocab_size=V, order=n, width=m, hidden=h, direct=True)
    assert build(config).num_parameters() == V * (1 + n * m + h) + h * (1 + (n - 1) * m)


@every_config
def test_a_saved_model_comes_back_equal(name, tmp_path):
    model = random_model(CONFIGS[name]).eval()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    ids = tokens(model.config, 2, 9)
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("family", [*OF_TEXTS, "ngram"])
def test_the_settings_of_training_make_a_small_model_and_are_checked_by_the_family(family):
    config = FAMILIES[family].config_class()
    small = config.from_settings(vocab_size=300, eos_token_ids=(299,), **config.SETTINGS)
    assert (small.vocab_size, small.eos_token_ids, small.family) == (300, (299,), family)
    assert build(small).num_parameters() < 2_000_000
    for name, default in config.SETTINGS.items():
        if type(default) is int:
            with pytest.raises(ConfigError, match=name):
                config.from_settings(vocab_size=300, eos_token_ids=(), **{**config.SETTINGS, name: -1})


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        (
            "recurrent",
            "cell",
            "lru",
            "cell must be one of rnn, rnn_relu, lstm, gru; portlm does not compute 'lru'",
        ),
        ("recurrent", "proj_size", 64, "'proj_size' is a key portlm does not know"),
        ("recurrent", "bidirectional", True, "'bidirectional' is a key portlm does not know"),
        ("recurrent", "hidden_size", 0, "width must be an integer from 1"),
        ("awd_lstm", "weight_dropout", 1.0, "weight_dropout must be a number from 0 to 0.99"),
        ("awd_lstm", "cell", "gru", "'cell' is a key portlm does not know"),
        ("awd_lstm", "tie_word_embeddings", False, "tie_word_embeddings = False is not supported"),
        ("nplm", "order", 1, "order must be an integer from 2"),
        ("nplm", "direct_connections", "yes", "direct_connections must be true or false"),
        ("nplm", "tie_word_embeddings", True, "tie_word_embeddings = True is not supported"),
        ("ngram", "order", 0, "order must be an integer from 1"),
        ("ngram", "histories", 259, "histories must be from 260 to places - 259, got 259 of 1703 places"),
        ("ngram", "places", 2**24 + 1, "places must be an integer from 0 to 1.67772e"),
        ("ngram", "places", 1300, "histories must be from 260 to places - 259, got 1201 of 1300 places"),
        ("ngram", "smoothing", "katz", "'smoothing' is a key portlm does not know"),
    ],
)
def test_a_config_that_says_another_model_is_refused_by_the_name_of_the_key(family, key, value, message):
    data = FAMILIES[family].config_class().tiny().to_hf()
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**data, key: value})


def test_transformers_says_that_it_does_not_know_them(transformers, tmp_path):
    for family in (*OF_TEXTS, "ngram"):
        save_model(tmp_path / family, build(FAMILIES[family].config_class().tiny()))
        with pytest.raises(ValueError, match=f"(?s){family}.*not recognize|{family}"):
            transformers.AutoConfig.from_pretrained(tmp_path / family)


@pytest.mark.parametrize("family", [*OF_TEXTS, "ngram"])
def test_export_to_hugging_face_is_refused_where_nothing_there_would_open_it(family, tmp_path):
    save_model(tmp_path / "model", build(FAMILIES[family].config_class().tiny()))
    with pytest.raises(FormatError, match=f"transformers has no models of the family {family}"):
        export_hf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_is_named(tmp_path):
    save_model(tmp_path, random_model(CONFIGS["gru"]))
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "num_hidden_layers": 3}))
    with pytest.raises(FormatError, match=r"tensor layers\.2\.input\.weight of shape \(81, 27\) is missing"):
        load_model(tmp_path)


# ---- graphs and engines ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """name -> the folder of an exported model, made once."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export

    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save_model(folder / "checkpoint", random_model(CONFIGS[name]))
            made[name] = export(folder / "checkpoint", folder / "artifact")
        return made[name]

    return make


def load(folder, engine, device, profile):
    """What opens an artifact there, or a skip that says what is missing."""
    from portlm.flows.load import load

    try:
        return load(folder, engine, device, profile)
    except EngineUnavailableError as error:
        pytest.skip(str(error))


TEXTS = [[5, 17, 20, 3, 7, 42, 9], [9, 8], [25, 1, 2, 3]]
PLACES = [t for t in TARGETS if t[0] != "packed" and t[1] == "cpu"]


@every_engine_config
@pytest.mark.parametrize("place", PLACES, ids=":".join)
def test_every_engine_reads_ragged_rows_as_the_model_reads_each_alone(artifact, name, place):
    """Outputs of fp32 over engines that add in different orders: 1e-4 of logits that reach 1 and more."""
    session = load(artifact(name), *place)
    model = random_model(CONFIGS[name]).eval()
    rows = Rows(session.engine, len(TEXTS))
    ids, real = pad(TEXTS)
    ids = np.where(real == 1, ids, 33)  # what stands in the padding must not matter
    whole = np.concatenate(
        [rows.read(ids[:, a:b], real[:, a:b], every=True) for a, b in ((0, 2), (2, 3), (3, 7))], 1
    )
    rows.keep([2, 0])
    last = rows.next([50, 51])
    for b, text in enumerate(TEXTS):
        expected = model(torch.tensor([text]))[0].detach().numpy()
        np.testing.assert_allclose(whole[b, 7 - len(text) :], expected, rtol=0, atol=1e-4)
    for row, text in zip(last, ([*TEXTS[2], 50], [*TEXTS[0], 51]), strict=True):
        np.testing.assert_allclose(
            row, model(torch.tensor([text]))[0, -1].detach().numpy(), rtol=0, atol=1e-4
        )
    assert set(session.engine.placement().nodes) == {"cpu"}


@pytest.mark.parametrize("name", ["lstm", "awd", "nplm", "ngram"])
@pytest.mark.parametrize("place", PLACES[1:], ids=":".join)
def test_a_session_writes_and_scores_on_every_engine_as_on_pytorch(artifact, name, place):
    session, expected = load(artifact(name), *place), load(artifact(name), *PLACES[0])
    for options in ({}, {"temperature": 1.0, "seed": 4}, {"num_beams": 3}):
        answers = [
            [a.token_ids for a in s.generate(TEXTS, max_new_tokens=12, batch_size=2, **options)]
            for s in (session, expected)
        ]
        assert answers[0] == answers[1]
    scores = zip(session.score(TEXTS), expected.score(TEXTS), strict=True)
    assert all(a.logprobs == pytest.approx(b.logprobs, abs=2e-4) for a, b in scores)


@pytest.mark.parametrize("name", ["gru", "nplm", "ngram"])
def test_verify_passes_on_every_engine_of_the_cpu(artifact, name):
    from portlm.flows.targets import Target
    from portlm.flows.verify import verify_artifact

    for place in PLACES:
        load(artifact(name), *place).close()  # or the test is skipped
    # To look into a graph, TVM compiles it anew with every value kept, which tests/compile/test_parity.py does.
    for engines, search in (({"torch", "ort"}, True), ({"tvm"}, False)):
        targets = [Target(*place) for place in PLACES if place[0] in engines]
        results = verify_artifact(artifact(name), targets, search=search)
        assert [(result.target, result.problem) for result in results] == [
            (target, None) for target in targets
        ]
        assert all(result.row.max_logit_error <= 1e-4 for result in results)


def test_the_packed_engine_says_that_it_keeps_no_such_state(artifact):
    from portlm.compile.build import build as compile_for

    with pytest.raises(
        EngineUnavailableError, match=r"past_hidden\.0 of decoder begins zeros and has the update replace"
    ):
        compile_for(artifact("lstm"), [("packed", "cpu", "fused")])
