"""What every encoder-decoder promises: it is transformers' model, it decodes as it reads, it is saved and checked."""

import dataclasses
import json
from typing import NamedTuple

import pytest
import torch

from portlm.errors import ConfigError, ContextLengthError
from portlm.hub import export_hf, import_hf
from portlm.models import FAMILIES, build, config_from_hf, load_model, preset, save_model

FAMILY = {name: family for name, family in FAMILIES.items() if family.kind == "encoder-decoder"}


class Entry(NamedTuple):
    """What a family's tests cannot find out for themselves.

    Attributes:
        theirs: Transformers' class.
        variants: Changes of its tiny() configuration that make another computation.
        frozen: Ends of the names of tables of theirs that follow from the configuration.
    """

    theirs: str
    variants: tuple[dict[str, object], ...] = ()
    frozen: tuple[str, ...] = ()


ENTRIES = {
    "marian": Entry(
        "MarianMTModel",
        (
            {"activation": "silu", "output_bias": True, "n_layer": 1, "n_decoder_layer": 3},
            {"activation": "gelu_new", "scale_embedding": False},
        ),
        frozen=("embed_positions.weight",),
    ),
    "bart": Entry(
        "BartForConditionalGeneration",
        ({"activation": "relu", "output_bias": True, "scale_embedding": True, "n_layer": 1},),
    ),
    "encoder-decoder": Entry(
        "EncoderDecoderModel",
        ({"gelu": "tanh", "segments": 1, "n_layer": 1, "n_decoder_layer": 3, "layer_norm_eps": 1e-5},),
    ),
    "t5": Entry(
        "T5ForConditionalGeneration",
        (
            {"activation": "gated-gelu", "tie_embeddings": False, "scale_output": False},
            {"n_layer": 1, "n_decoder_layer": 3, "buckets": 32, "max_distance": 128},
        ),
    ),
}
CONFIGS = [
    pytest.param(
        (family, change), id="-".join((family, *(f"{key}={value}" for key, value in change.items())))
    )
    for family, entry in ENTRIES.items()
    for change in ({}, *entry.variants)
]
every_config = pytest.mark.parametrize("config", CONFIGS, indirect=True)
every_family = pytest.mark.parametrize("family", FAMILY)
every_preset = pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, entry in FAMILY.items() for name in entry.presets()]
)


@pytest.fixture
def config(request):
    """A small configuration."""
    family, change = request.param
    return dataclasses.replace(FAMILY[family].config_class().tiny(), **change)


def random_model(config, seed: int = 0):
    """Return a model whose every parameter, biases and gains included, matters to the result."""
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def theirs(transformers, model):
    """Return transformers' model with a copy of our weights; what ours does not tie is a matrix of its own there."""
    entry, data = ENTRIES[model.config.family], model.config.to_hf()
    other = getattr(transformers, entry.theirs)(transformers.AutoConfig.for_model(**data))
    state = {}
    for name, p in model.named_parameters():
        hf_name, transposed = model.hf_name(name)
        state[hf_name] = (p.t() if transposed else p).detach().clone()
    if "lm_head.weight" in state:
        other.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
    missing, unexpected = other.load_state_dict(state, strict=False)
    tied = set(model.hf_tied(model.config))
    if not getattr(model.config, "output_bias", True):
        tied.add("final_logits_bias")  # zeros of theirs
    assert {name for name in missing if not name.endswith(entry.frozen or ("?",))} <= tied
    assert not unexpected
    return other.to(next(model.parameters()).dtype).eval()


def tokens(config, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def exact_rms_norm(self, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the precision of its input."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def exact(transformers, monkeypatch):
    """Transformers, whose T5 then normalises in the precision of its input and not in float32."""
    module = transformers.models.t5.modeling_t5
    monkeypatch.setattr(module.T5LayerNorm, "forward", exact_rms_norm)
    return transformers


def source(config, rows: int = 3, length: int = 11):
    """Source ids and a mask that hides the ends of two rows."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, 7:] = 0
    mask[-1, 4:] = 0
    return tokens(config, rows, length, seed=7), mask


def test_every_encoder_decoder_that_transformers_has_has_an_entry_here():
    """Others are in test_recurrent_encoder_decoders.py."""
    assert ENTRIES.keys() == {name for name, family in FAMILY.items() if family.foreign}


# ---- the same model as transformers' -----------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:Version v4.12.0 introduces:FutureWarning"
)  # of a loss computed otherwise before
@every_config
@pytest.mark.parametrize("masked", [False, True])
def test_float64_logits_loss_and_gradients_are_those_of_transformers(exact, config, masked):
    # The same formulas in float64: only the order of summation may differ, so 1e-9 leaves a margin of 1e5.
    model = random_model(config).double()
    other = theirs(exact, model)
    ids, mask = source(config)
    mask = mask if masked else None
    target, wanted = tokens(config, 3, 17), tokens(config, 3, 17, seed=2)
    wanted[0, :5] = -100
    found = other(input_ids=ids, attention_mask=mask, decoder_input_ids=target, labels=wanted)
    assert relative(model(ids, target, None, mask), found.logits) <= 1e-9
    loss = model(ids, target, wanted, mask)
    assert abs(loss.item() - found.loss.item()) <= 1e-9 * found.loss.item()
    loss.backward()
    found.loss.backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if name == "final_logits_bias":  # which transformers does not train
            continue
        if name.startswith("encoder.pooler."):  # which nothing reads
            assert p.grad is None
            assert gradients[model.hf_name(name)[0]].grad is None
            continue
        if name.endswith(
            ("k_proj.bias", "key.bias")
        ):  # it shifts all scores of a query alike: both gradients are rounding
            assert max(p.grad.abs().max(), gradients[model.hf_name(name)[0]].grad.abs().max()) <= 1e-14
            continue
        assert relative(p.grad, gradients[model.hf_name(name)[0]].grad) <= 1e-9, name


@every_config
def test_float32_logits_are_those_of_transformers(transformers, config):
    # Two float32 computations of order-one logits; each is about 1e-6 away from the exact answer.
    model = random_model(config)
    other = theirs(transformers, model)
    (ids, mask), target = source(config), tokens(config, 3, 17)
    found = other(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    assert relative(model(ids, target, None, mask), found) <= 1e-5


@every_config
def test_smoothed_labels_are_those_of_pytorch(config):
    model = random_model(config).double()
    (ids, mask), target, wanted = source(config), tokens(config, 3, 9), tokens(config, 3, 9, seed=2)
    wanted[1, 3:] = -100
    logits = model(ids, target, None, mask).flatten(0, 1)
    for share in (0.0, 0.1):
        expected = torch.nn.functional.cross_entropy(logits, wanted.flatten(), label_smoothing=share)
        assert model(ids, target, wanted, mask, share).item() == pytest.approx(expected.item(), rel=1e-12)


def steps(model, ids, mask, rows_of_tokens, cuts, padding=None):
    """Logits of decoding in pieces, which read a left-padded target where `padding` says by how much."""
    config = model.config
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    memory = model.memory(model.encode(ids, mask, positions if model.has_positions else None))
    visible = torch.ones_like(rows_of_tokens)
    for row, count in enumerate(padding or ()):
        visible[row, :count] = 0
    places = (visible.cumsum(1) - 1).clamp(min=0)
    past, pieces, done = None, [], 0
    for n in cuts:
        new = slice(done, done + n)
        at = places[:, new] if model.has_positions else None
        logits, past = model.step(rows_of_tokens[:, new], at, visible[:, : done + n], memory, mask, past)
        pieces.append(logits)
        done += n
    assert past[0][0].shape[1 if not model.cache_heads_first else 2] == done
    assert len(past) == config.n_decoder_layer
    return torch.cat(pieces, dim=1)


@every_config
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 6]], ids=str)
def test_decoding_in_pieces_gives_the_logits_of_the_whole(config, cuts):
    # The sums run over other lengths, hence in another order: a few units in the last place.
    model = random_model(config).eval()
    (ids, mask), target = source(config), tokens(config, 3, 12)
    torch.testing.assert_close(
        steps(model, ids, mask, target, cuts), model(ids, target, None, mask), atol=5e-5, rtol=1e-5
    )


@every_config
def test_rows_that_are_padded_on_the_left_are_computed_as_if_alone(config):
    """Sources and targets both; of transformers' models, whose padding is on the right, the answers are the same."""
    model = random_model(config).eval()
    lengths, targets = (4, 9, 6), (3, 7, 5)
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    written, padding = torch.zeros(3, 7, dtype=torch.int64), []
    for row, (S, T) in enumerate(zip(lengths, targets, strict=True)):
        ids[row, 9 - S :], mask[row, 9 - S :] = tokens(config, S, seed=row), 1
        written[row, 7 - T :] = tokens(config, T, seed=10 + row)
        padding.append(7 - T)
    together = steps(model, ids, mask, written, [4, 3], padding)
    for row, (S, T) in enumerate(zip(lengths, targets, strict=True)):
        alone = model(ids[row : row + 1, 9 - S :], written[row : row + 1, 7 - T :])[0]
        torch.testing.assert_close(together[row, 7 - T :], alone, atol=5e-5, rtol=1e-5)


@every_config
def test_greedy_continuation_is_that_of_transformers(transformers, config):
    model = random_model(config).eval()
    other = theirs(transformers, model)
    ids, mask = source(config, rows=1)
    mask = torch.ones_like(mask)
    settings = transformers.GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id, pad_token_id=0, eos_token_id=None, do_sample=False,
        max_new_tokens=30, num_beams=1, use_cache=False,  # theirs is made for as many layers as the encoder has
    )  # fmt: skip
    expected = other.generate(ids, attention_mask=mask, generation_config=settings)
    written = torch.tensor([[config.decoder_start_token_id]])
    for _ in range(30):
        logits = steps(model, ids, mask, written, [written.shape[1]])
        written = torch.cat((written, logits[:, -1:].argmax(-1)), dim=1)
    assert written.tolist() == expected.tolist()


@every_config
def test_more_tokens_than_the_context_are_refused(config):
    model, longest = build(config), config.context_length
    ids, long = tokens(config, 1, 3), tokens(config, 1, longest + 1)
    for pair in ((long, ids), (ids, long)):
        with pytest.raises(ContextLengthError, match=f"{longest + 1} tokens"):
            model(*pair)


# ---- configurations and files ------------------------------------------------------------------------------------


@every_preset
def test_presets_have_the_published_parameter_counts(family, name):
    assert build(preset(name), device="meta").num_parameters() == FAMILY[family].parameters()[name]


@every_preset
def test_config_json_holds_the_whole_configuration_of_a_preset(family, name):
    config = preset(name)
    assert config.family == family
    assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config


@every_config
def test_config_json_holds_the_whole_configuration_and_transformers_keeps_it(transformers, config):
    config = dataclasses.replace(config, bos_token_id=1, eos_token_ids=(2, 3))
    assert config_from_hf(config.to_hf()) == config
    written = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    if not getattr(config, "tie_embeddings", True):  # transformers 5 writes true there whatever it was
        written["tie_word_embeddings"] = False
    assert config_from_hf(written) == config


@every_config
def test_a_folder_of_transformers_is_imported_and_written_back(transformers, config, tmp_path):
    model = random_model(config).eval()
    theirs(transformers, model).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    written = json.loads(path.read_text())
    if not getattr(config, "tie_embeddings", True):
        written["tie_word_embeddings"] = False
    written.pop("portlm_output_bias", None)  # no folder of theirs says so: their files have one, if of zeros
    path.write_text(json.dumps(written))
    import_hf(tmp_path / "theirs", tmp_path / "ours")
    (ids, mask), target = source(config), tokens(config, 3, 9)
    loaded = load_model(tmp_path / "ours")
    expected = model(ids, target, None, mask)
    torch.testing.assert_close(loaded(ids, target, None, mask), expected, atol=0, rtol=0)
    export_hf(tmp_path / "ours", tmp_path / "back")
    if getattr(config, "tie_embeddings", True):
        other = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").eval()
        found = other(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
        assert relative(found, expected) <= 1e-5


@every_config
def test_a_saved_model_comes_back_equal(config, tmp_path):
    model = random_model(config).eval()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    ids, target = tokens(config, 2, 9), tokens(config, 2, 5)
    assert torch.equal(loaded(ids, target), model(ids, target))


@every_family
def test_the_settings_of_training_make_a_small_model_and_are_checked_by_the_family(family):
    config = FAMILY[family].config_class()
    small = config.from_settings(vocab_size=300, eos_token_ids=(299,), **config.SETTINGS)
    assert (small.vocab_size, small.eos_token_ids, small.family) == (300, (299,), family)
    assert build(small).num_parameters() < 2_000_000
    for name, default in config.SETTINGS.items():
        if type(default) is int:
            with pytest.raises(ConfigError, match=name):
                config.from_settings(vocab_size=300, eos_token_ids=(), **{**config.SETTINGS, name: -1})


@every_family
def test_tiny_is_small_and_holds_every_byte(family):
    config = FAMILY[family].config_class().tiny()
    assert build(config).num_parameters() < 50_000
    assert config.vocab_size >= 259
    assert config.context_length >= 32


@every_family
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder"),
        ({"surprise": 1}, "surprise"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"d_model": "wide"}, "d_model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_json_that_asks_for_another_model_is_refused_by_name(family, change, words):
    data = FAMILY[family].config_class().tiny().to_hf()
    with pytest.raises(ConfigError, match=words):
        config_from_hf({**data, **change})


@pytest.mark.parametrize(
    ("side", "change", "words"),
    [
        ("decoder", {"add_cross_attention": False}, "decoder: add_cross_attention"),
        ("decoder", {"hidden_size": 48}, "the encoder's width is 24 and the decoder's 48"),
        ("encoder", {"is_decoder": True}, "encoder: is_decoder"),
        ("encoder", {"model_type": "roberta"}, "encoder: model_type"),
        ("encoder", {"surprise": 1}, "encoder: 'surprise'"),
    ],
)
def test_two_berts_that_are_not_what_is_computed_are_refused_by_name(side, change, words):
    data = FAMILY["encoder-decoder"].config_class().tiny().to_hf()
    data[side] |= change
    with pytest.raises(ConfigError, match=words):
        config_from_hf(data)


def test_both_sides_of_two_berts_begin_as_one(tmp_path):
    """What looks at the source is fresh, and all else is the checkpoint's."""
    from portlm.train.initial import begun_from

    bert = random_model(FAMILIES["bert"].config_class().tiny())
    save_model(tmp_path / "bert", bert)
    shape = FAMILY["encoder-decoder"].config_class()
    model, fresh = begun_from(
        tmp_path / "bert", lambda old: dataclasses.replace(shape.of(old), vocab_size=270)
    )
    known = dict(bert.named_parameters())
    for side in (model.encoder, model.decoder):
        for name, p in side.named_parameters():
            if ".source_" in name or "pooler" in name:
                continue
            assert torch.equal(p[: len(known[name])], known[name]), name
    assert {name for name in fresh if ".source_" not in name} == {
        "encoder.tokens.weight", "decoder.tokens.weight", "decoder.heads.masked_lm.bias",
        "encoder.pooler.weight", "encoder.pooler.bias",
    }  # fmt: skip
