"""Seq2seq and Bahdanau's model against rewrites with torch.nn's layers in float64; steps, padding, weights, files."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from portlm.errors import ConfigError, ContextLengthError
from portlm.models import FAMILIES, build, config_from_hf, load_model, preset, save_model

FAMILY = ("seq2seq", "bahdanau", "luong")
VARIANTS = {
    "seq2seq": (
        {},
        {"cell": "gru", "reverse_source": False},
        {"bias": False, "n_layer": 3},
        {"target_vocab_size": 257, "eos_token_ids": (256,), "decoder_start_token_id": 3, "n_layer": 1},
    ),
    "bahdanau": ({}, {"embed_width": 21, "alignment": 8, "maxout": 1}),
    "luong": (
        {"score": "dot"},
        {"score": "general", "cell": "gru", "reverse_source": False},
        {"score": "concat", "bias": False, "n_layer": 1},
        {"score": "dot", "input_feeding": False},
        {
            "score": "concat",
            "input_feeding": False,
            "target_vocab_size": 257,
            "eos_token_ids": (256,),
            "decoder_start_token_id": 3,
        },
    ),
}
CONFIGS = [
    pytest.param((family, change), id="-".join((family, *(f"{k}={v}" for k, v in change.items()))))
    for family, changes in VARIANTS.items()
    for change in changes
]
every_config = pytest.mark.parametrize("config", CONFIGS, indirect=True)
every_family = pytest.mark.parametrize("family", FAMILY)


@pytest.fixture
def config(request):
    family, change = request.param
    return dataclasses.replace(FAMILIES[family].config_class().tiny(), **change)


def random_model(config, seed=0):
    """A model whose every parameter, biases included, matters to the result."""
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    return model


def tokens(config, *shape, seed=1):
    most = getattr(config, "target_vocab", config.vocab_size)
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def ragged(rows=3, length=9):
    """A mask that hides the ends of two rows."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, 5:] = 0
    mask[-1, 2:] = 0
    return mask


def torch_layer(layer, bidirectional=False):
    """torch.nn's layer with the weights of ours, in float64; biases that ours does not have are zeros."""
    kind = nn.LSTM if layer.cell == "lstm" else nn.GRU
    theirs = kind(layer.input.weight.shape[1], layer.recurrent.weight.shape[1], batch_first=True).double()
    parts = {
        "weight_ih_l0": layer.input.weight,
        "weight_hh_l0": layer.recurrent.weight,
        "bias_ih_l0": layer.input.bias,
        "bias_hh_l0": layer.recurrent.bias,
    }
    return lambda x, state: torch.func.functional_call(
        theirs,
        {
            name: torch.zeros_like(p) if parts[name] is None else parts[name]
            for name, p in theirs.named_parameters()
        },
        (x, state),
    )


def first(state):
    """A state (B, C), or a pair, as torch.nn's layers take it."""
    state = tuple(part[None] for part in state)
    return state if len(state) == 2 else state[0]


def plain(state):
    return tuple(part[0] for part in state) if isinstance(state, tuple) else (state[0],)


def seq2seq_by_hand(model, source, target):
    """Logits (1, T, V) of one pair, by torch.nn's layers, each of which is told nothing but its input and state."""
    config = model.config
    x = F.embedding(source.flip(1) if config.reverse_source else source, model.encoder.embed.weight)
    zero = x.new_zeros(1, config.width)
    states = []
    for layer in model.encoder.layers:
        x, last = torch_layer(layer)(x, first((zero,) * (2 if config.cell == "lstm" else 1)))
        states.append(plain(last))
    y = F.embedding(target, model.decoder.embed.weight)
    for layer, state in zip(model.decoder.layers, states, strict=True):
        y, _ = torch_layer(layer)(y, first(state))
    return y @ model.lm_head.weight.T


def bahdanau_by_hand(model, source, target):
    """Logits (1, T, V) and weights (T, S) of one pair, by the equations of appendix A, key by key."""
    e, d, C = model.encoder, model.decoder, model.config.width
    x = F.embedding(source, e.embed.weight)
    zero = x.new_zeros(1, 1, C)
    there, _ = torch_layer(e.forwards)(x, zero)
    back, _ = torch_layer(e.backwards)(x.flip(1), zero)
    back = back.flip(1)
    h = torch.cat((there, back), -1)[0]  # (S, 2 C)
    U = torch.cat((e.forward_keys.weight, e.backward_keys.weight), 1)
    s = torch.tanh(e.first.weight @ back[0, 0])
    logits, alphas = [], []
    for token in target[0]:
        y = d.embed.weight[token]
        scores = torch.stack([d.score @ torch.tanh(d.query.weight @ s + U @ key) for key in h])
        alpha = torch.softmax(scores, 0)
        c = alpha @ h
        t = d.deep.weight @ torch.cat((s, y, c)) + d.deep.bias
        pairs = t.view(2, -1).T  # a maxout unit chooses between two
        logits.append(model.lm_head.weight @ pairs.max(1).values)
        alphas.append(alpha)
        _, last = torch_layer(d.cell)(torch.cat((y, c))[None, None], s[None, None])
        s = last[0, 0]
    return torch.stack(logits)[None], torch.stack(alphas)


def luong_by_hand(model, source, target):
    """Logits (1, T, V) and weights (T, S) of one pair, by section 3 of the paper, word by word and key by key."""
    config, a = model.config, model.attention
    x = F.embedding(source.flip(1) if config.reverse_source else source, model.encoder.embed.weight)
    zero = x.new_zeros(1, config.width)
    states = []
    for layer in model.encoder.layers:
        x, last = torch_layer(layer)(x, first((zero,) * (2 if config.cell == "lstm" else 1)))
        states.append(last)
    h_s = x[0].flip(0) if config.reverse_source else x[0]  # (S, C), in the order of the source
    scores = {
        "dot": lambda h: [h @ key for key in h_s],
        "general": lambda h: [h @ a.keys.weight @ key for key in h_s],
        "concat": lambda h: [
            a.score @ torch.tanh(torch.cat((a.query.weight, a.keys.weight), 1) @ torch.cat((h, key)))
            for key in h_s
        ],
    }
    fed, logits, alphas = zero, [], []
    for token in target[0]:
        y = model.decoder.embed.weight[token][None]
        y = (torch.cat((y, fed), 1) if config.input_feeding else y)[None]  # (1, 1, 2 C) or (1, 1, C)
        for i, layer in enumerate(model.decoder.layers):
            y, states[i] = torch_layer(layer)(y, states[i])
        alpha = torch.softmax(torch.stack(scores[config.score](y[0, 0])), 0)
        fed = torch.tanh(a.combine.weight @ torch.cat((alpha @ h_s, y[0, 0])))[None]
        logits.append(model.lm_head.weight @ fed[0])
        alphas.append(alpha)
    return torch.stack(logits)[None], torch.stack(alphas)


BY_HAND = {"seq2seq": seq2seq_by_hand, "bahdanau": bahdanau_by_hand, "luong": luong_by_hand}


def by_hand(model, source, target):
    logits = BY_HAND[model.config.family](model, source, target)
    return logits[0] if isinstance(logits, tuple) else logits


@every_config
def test_float64_logits_loss_and_gradients_are_those_of_torch_nn(config):
    # The same formulas in float64: only the order of summation may differ, so 1e-10 leaves a margin of 1e4.
    model = random_model(config).double()
    source, target, wanted = tokens(config, 1, 7), tokens(config, 1, 5, seed=2), tokens(config, 1, 5, seed=3)
    wanted[0, 1] = -100
    expected = by_hand(model, source, target)
    torch.testing.assert_close(model(source, target), expected, atol=1e-10, rtol=1e-10)
    loss = F.cross_entropy(expected[0], wanted[0])
    theirs = torch.autograd.grad(loss, list(model.parameters()))
    ours = model(source, target, wanted)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-12)
    for (name, _), a, b in zip(
        model.named_parameters(), torch.autograd.grad(ours, list(model.parameters())), theirs, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@every_config
def test_the_kernels_in_float32_give_the_gradients_of_float64(config):
    # Sums of some hundred terms of order one in float32: about 1e-5 of the largest gradient.
    model, source, target = random_model(config), tokens(config, 3, 9), tokens(config, 3, 6, seed=2)
    mask, wanted = ragged(), tokens(config, 3, 6, seed=3)
    exact = random_model(config).double()
    for m in (model, exact):
        m(source, target, wanted, mask).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 2e-5 * max(1.0, q.grad.abs().max().item()), name


@every_config
def test_a_weighted_sum_of_pairs_is_the_loss_of_a_padded_batch(config):
    """Padding on either side of a source or behind a target changes neither the loss nor a gradient."""
    model = random_model(config).double()
    lengths, targets = (7, 3, 5), (4, 6, 2)
    for left in (False, True):
        source, mask = torch.full((3, 7), 5), torch.zeros(3, 7, dtype=torch.int64)
        read, wanted = torch.full((3, 6), 5), torch.full((3, 6), -100)
        alone = []
        for row, (S, T) in enumerate(zip(lengths, targets, strict=True)):
            one = (
                tokens(config, 1, S, seed=row),
                tokens(config, 1, T, seed=row + 9),
                tokens(config, 1, T, seed=row + 20),
            )
            place = slice(7 - S, 7) if left else slice(0, S)
            source[row, place], mask[row, place] = one[0][0], 1
            read[row, :T], wanted[row, :T] = one[1][0], one[2][0]
            alone.append(model(*one) * T)
        together, apart = model(source, read, wanted, mask), sum(alone) / sum(targets)
        assert together.item() == pytest.approx(apart.item(), rel=1e-12)
        for a, b in zip(
            *(torch.autograd.grad(x, list(model.parameters())) for x in (together, apart)), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@every_config
@pytest.mark.parametrize("cuts", [[8], [1] * 8, [3, 1, 4]], ids=str)
def test_decoding_in_pieces_gives_the_logits_of_the_whole(config, cuts):
    # Cells for one token and layers for several sum in another order: a few units in the last place.
    model = random_model(config).eval()
    source, mask, target = tokens(config, 3, 9), ragged(), tokens(config, 3, 8, seed=2)
    memory, pieces = model.read(source, mask), []
    for part in target.split(cuts, dim=1):
        logits, memory = model.step(part, memory)
        pieces.append(logits)
    whole = model(source, target, None, mask)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=5e-5, rtol=1e-5)


@every_config
def test_a_masked_token_of_a_target_leaves_the_memory_as_it_was(config):
    model = random_model(config).eval()
    source, token = tokens(config, 2, 5), tokens(config, 2, 1)
    memory = model.read(source, None)
    _, after = model.step(token, memory, torch.tensor([[0], [1]]))
    assert torch.equal(after[0][0], memory[0][0])
    assert not torch.equal(after[0][1], memory[0][1])


@every_config
def test_the_roles_read_a_source_token_by_token_as_the_model_reads_it_whole(config):
    """Through portlm.memory, padded on the left; the model pads on the right."""
    from portlm.memory import DECODER, read_sources
    from portlm.runtimes.eager import TorchEngine

    model = random_model(config).eval()
    rows = [tokens(config, length, seed=length).tolist() for length in (4, 9, 6)]
    engine = TorchEngine.of(model, "cpu")
    state = engine.start(DECODER, 3, read_sources(engine, rows))
    target, found = tokens(config, 3, 4, seed=2), []
    for token in target.split(1, dim=1):
        inputs = {"input_ids": token.numpy(), "attention_mask": torch.ones_like(token).numpy()}
        outputs, state = engine.run(DECODER, inputs, state)
        found.append(torch.from_numpy(outputs["logits"].copy()))
    for row, source in enumerate(rows):
        alone = model(torch.tensor([source]), target[row : row + 1])[0]
        torch.testing.assert_close(torch.cat(found, 1)[row], alone, atol=5e-5, rtol=1e-5)


def test_a_reversed_source_is_a_source_written_backwards():
    """To the bit: nothing but the order of reading differs."""
    config = FAMILIES["seq2seq"].config_class().tiny()
    model = random_model(config).eval()
    other = build(dataclasses.replace(config, reverse_source=False)).eval()
    other.load_state_dict(model.state_dict())
    source, target = tokens(config, 2, 7), tokens(config, 2, 5, seed=2)
    assert torch.equal(model(source, target), other(source.flip(1), target))


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.values[0][0] != "seq2seq"], indirect=True)
def test_attention_says_what_it_looks_at_by_the_paper_s_equations(config):
    model = random_model(config).double()
    source, target = tokens(model.config, 1, 7), tokens(model.config, 1, 5, seed=2)
    _, alphas = BY_HAND[config.family](model, source, target)
    torch.testing.assert_close(model.align(source, target)[0], alphas, atol=1e-12, rtol=1e-10)
    padded = torch.cat((source, torch.full((1, 3), 9)), 1)
    mask = torch.tensor([[1] * 7 + [0] * 3])
    found = model.align(padded, target, mask)[0]
    torch.testing.assert_close(found[:, :7], alphas, atol=1e-12, rtol=1e-10)
    assert not found[:, 7:].any()


# ---- how weights begin, configurations, files ---------------------------------------------------------------------


def test_seq2seq_has_the_384_million_parameters_of_the_paper_64_million_of_them_in_its_layers():
    model = build(preset("seq2seq-wmt14"), device="meta")
    assert model.num_parameters() == 384_000_000
    layers = [*model.encoder.layers.parameters(), *model.decoder.layers.parameters()]
    assert sum(p.numel() for p in layers) == 64_000_000


def test_seq2seq_begins_uniform_between_minus_and_plus_008():
    model = build(FAMILIES["seq2seq"].config_class()(vocab_size=300, width=50))
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.08
    # A uniform distribution deviates by its half width over the square root of 3; of 10^5 values within 1 %.
    assert values.std().item() == pytest.approx(0.08 / 3**0.5, rel=0.01)


def test_bahdanau_begins_as_published_or_scaled():
    make = FAMILIES["bahdanau"].config_class()
    for scheme in ("published", "scaled"):
        model = build(make(vocab_size=500, embed_width=60, width=60, alignment=60, maxout=30, init=scheme))
        parts = dict(model.named_parameters())
        for name, p in parts.items():
            if name.endswith("recurrent.weight"):
                for gate in p.detach().chunk(3):
                    torch.testing.assert_close(gate @ gate.T, torch.eye(60), atol=1e-5, rtol=0)
            elif name.endswith("bias"):
                assert not p.any(), name
        # Of 3600 values and more, the deviation is known to some per cent.
        queries = 0.001 if scheme == "published" else 60**-0.5
        for name in ("decoder.query.weight", "encoder.forward_keys.weight", "encoder.backward_keys.weight"):
            assert parts[name].std().item() == pytest.approx(queries, rel=0.1)
        assert parts["decoder.score"].any().item() == (scheme == "scaled")
        assert parts["lm_head.weight"].std().item() == pytest.approx(
            0.01 if scheme == "published" else 30**-0.5, rel=0.1
        )


@every_config
def test_a_folder_holds_the_model_and_its_configuration(config, tmp_path):
    config = dataclasses.replace(config, bos_token_id=1)
    assert config_from_hf(config.to_hf()) == config
    model = random_model(config).eval()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    source, target = tokens(config, 2, 9), tokens(config, 2, 5)
    assert torch.equal(loaded(source, target), model(source, target))


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("seq2seq", {"cell": "rnn"}, "cell must be one of lstm, gru"),
        ("seq2seq", {"reverse_source": 1}, "reverse_source must be true or false"),
        ("seq2seq", {"n_layer": 0}, "n_layer must be an integer from 1"),
        ("seq2seq", {"target_vocab_size": 300}, "target_vocab_size 300 is more than vocab_size 259"),
        ("seq2seq", {"target_vocab_size": 100}, "token 258 begins or ends targets, whose ids are below 100"),
        ("bahdanau", {"dropout": 1.0}, "dropout must be a number from 0"),
        ("seq2seq", {"decoder_start_token_id": 259}, "decoder_start_token_id holds 259"),
        ("luong", {"score": "location"}, "score must be one of dot, general, concat, got 'location'"),
        ("luong", {"input_feeding": 1}, "input_feeding must be true or false, got 1"),
        ("luong", {"cell": "rnn"}, "cell must be one of lstm, gru"),
        ("bahdanau", {"maxout": 0}, "maxout must be an integer from 1"),
        ("bahdanau", {"init": "zeros"}, "init must be one of published, scaled"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(family, change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(FAMILIES[family].config_class().tiny(), **change)


@every_family
def test_more_tokens_than_the_context_are_refused(family):
    config = FAMILIES[family].config_class().tiny()
    model, ids, long = build(config), tokens(config, 1, 3), tokens(config, 1, config.context_length + 1)
    for pair in ((long, ids), (ids, long)):
        with pytest.raises(ContextLengthError, match="41 tokens"):
            model(*pair)
