"""What every encoder promises: each of its classes is transformers', padding changes nothing, it is checked."""

import dataclasses
import json

import pytest
import torch
from encoders import ENCODERS, answers, batch, every_family, labelled, random_model

from portlm.errors import ConfigError, ContextLengthError, UsageError
from portlm.models import build, config_from_hf, load_model, preset, save_model

KERNELS = ("embedding_fwd", "embedding_bwd", "layer_norm_fwd", "layer_norm_bwd", "gemm", "linear_bwd", "gelu_mlp_fwd",
           "gelu_mlp_bwd")  # fmt: skip
# Changes of the tiny configuration that make another computation.
VARIANTS = {
    "bert": ({"gelu": "tanh"}, {"segments": 1}, {"segments": 3}),
    "roberta": ({"segments": 2}, {"pad_token_id": 5}),
}


def configs():
    """Return every class of every family, and the variants of the one with a head for hidden tokens."""
    found = []
    for family, entry in ENCODERS.items():
        kind = entry.config_class()
        found += [
            pytest.param(labelled(kind.tiny(), heads), id=f"{name}")
            for name, heads in kind.ARCHITECTURES.items()
        ]
        found += [
            pytest.param(dataclasses.replace(kind.tiny(), **change), id=f"{family}-{change}")
            for change in VARIANTS.get(family, ())
        ]
    return found


every_config = pytest.mark.parametrize("config", configs())


def theirs(transformers, model):
    """Return transformers' model of the class that config.json names, with a copy of our weights."""
    data = model.config.to_hf()
    kind = getattr(transformers, data["architectures"][0])
    other = kind(transformers.AutoConfig.for_model(**data))
    inside = (
        "" if any(name.startswith(model.PREFIX) for name, _ in other.named_parameters()) else model.PREFIX
    )
    state = {
        model.hf_name(name)[0].removeprefix(inside): p.detach().clone()
        for name, p in model.named_parameters()
    }
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) <= set(model.hf_tied(model.config))
    assert not unexpected
    other.tie_weights()
    return other.to(next(model.parameters()).dtype), inside


def their_answers(other, ids, mask, kinds):
    given = {} if kinds is None else {"token_type_ids": kinds}
    found = dict(other(input_ids=ids, attention_mask=mask, **given))
    if "start_logits" in found:
        found = {"logits": torch.stack((found["start_logits"], found["end_logits"]), dim=-1)}
    per_token = {name: value.dim() == 3 for name, value in found.items()}
    return {name: value[mask == 1] if per_token[name] else value for name, value in found.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- the same model as transformers' -----------------------------------------------------------------------------


@every_config
def test_float64_answers_and_gradients_are_those_of_transformers(transformers, config):
    # The same formulas in float64: only the order of summation may differ, so 1e-9 leaves a margin of 1e5.
    model = random_model(config).double()
    other, inside = theirs(transformers, model)
    given = batch(config)
    ours, expected = answers(model, *given), their_answers(other, *given)
    assert ours.keys() == expected.keys()
    g = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(value.shape, generator=g).double() for name, value in ours.items()}
    for name, value in ours.items():
        assert relative(value, expected[name]) <= 1e-9, name
    for found in (ours, expected):
        sum((value * weights[name]).sum() for name, value in found.items()).backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        gradient = gradients[model.hf_name(name)[0].removeprefix(inside)].grad
        if gradient is not None and p.grad is not None:
            # The gradient of a bias of keys is zero but for rounding: a softmax does not see what it adds to all.
            assert (p.grad - gradient).abs().max() <= 1e-9 * gradient.abs().max().clamp(min=1), name
        else:  # a pooler that no answer reads
            assert p.grad is None or not p.grad.any(), name
            assert gradient is None or not gradient.any(), name


@pytest.mark.runs_kernel(*KERNELS)
@every_family
def test_float32_loss_and_gradients_are_those_of_transformers(transformers, family):
    # Two float32 computations of order-one logits; each is about 1e-6 away from the exact answer.
    model = random_model(ENCODERS[family].config_class().tiny())
    other, _ = theirs(transformers, model)
    ids = torch.randint(6, 262, (2, 32), generator=torch.Generator().manual_seed(1))
    targets = torch.full_like(ids, -100)
    targets[:, ::5] = ids[:, ::5]
    loss, expected = model(ids, targets), other(input_ids=ids, labels=targets).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids), other(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = dict(other.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[model.hf_name(name)[0]].grad, atol=1e-5, rtol=1e-4)


# ---- by itself ---------------------------------------------------------------------------------------------------


@every_family
def test_every_position_sees_every_other_and_none_sees_padding(family):
    model = random_model(ENCODERS[family].config_class().tiny()).eval()
    ids, mask, kinds = batch(model.config)
    whole = answers(model, ids, mask, kinds)["logits"]
    first = answers(model, ids[1:2, :9], mask[1:2, :9], None if kinds is None else kinds[1:2, :9])["logits"]
    torch.testing.assert_close(whole[17:26], first, atol=2e-5, rtol=1e-5)  # the sums run over other lengths
    changed = ids.clone()
    changed[0, 16], changed[1, 12] = 7, 9  # a real token, and one of padding
    other = answers(model, changed, mask, kinds)["logits"]
    assert (other[0] - whole[0]).abs().max() > 1e-4
    assert torch.equal(other[17:26], whole[17:26])


@every_family
def test_positions_may_be_said_and_rows_padded_on_the_left(family):
    model = random_model(ENCODERS[family].config_class().tiny()).eval()
    ids = torch.randint(6, 262, (1, 9), generator=torch.Generator().manual_seed(2))
    alone, _ = model.encode(ids)
    padded = torch.nn.functional.pad(ids, (4, 0), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    kinds = torch.zeros_like(padded) if model.config.segments else None
    together, _ = model.encode(padded, mask, kinds, (mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(together[:, 4:], alone, atol=2e-5, rtol=1e-5)


@every_family
def test_only_hidden_tokens_count_in_the_loss(family):
    model = random_model(ENCODERS[family].config_class().tiny()).double()
    ids = torch.randint(6, 262, (2, 12), generator=torch.Generator().manual_seed(2))
    targets = torch.full_like(ids, -100)
    targets[0, 3], targets[1, 7] = 50, 60
    expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    assert model(ids, targets).item() == pytest.approx(expected.item(), rel=1e-12)


@every_family
def test_dropout_acts_in_training_alone(family):
    model = random_model(dataclasses.replace(ENCODERS[family].config_class().tiny(), dropout=0.5))
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids), model(ids))
    plain = random_model(dataclasses.replace(model.config, dropout=0.0))
    assert torch.equal(model.eval()(ids), plain.eval()(ids))


@every_family
def test_what_a_model_has_no_head_for_is_refused(family):
    config = labelled(ENCODERS[family].config_class().tiny(), ("tag",))
    with pytest.raises(UsageError, match=f"this {family} has no head masked_lm, its heads are: tag"):
        build(config)(torch.arange(3)[None])


@every_family
def test_more_tokens_than_the_context_are_refused(family):
    config = ENCODERS[family].config_class().tiny()
    with pytest.raises(ContextLengthError, match="33 tokens, but the model's context holds 32"):
        build(config)(torch.arange(33)[None])


@every_family
def test_weights_begin_as_published(family):
    config = dataclasses.replace(
        ENCODERS[family].config_class().tiny(), vocab_size=2000, width=128, hidden=256, pad_token_id=1
    )
    torch.manual_seed(0)
    model = build(config)
    table = model.tokens.weight.detach()
    # 256,000 numbers: the deviation is known to 0.2 %. A normal cut off at two deviations has 0.88 of them.
    wanted = 0.02 * (0.8796 if family == "bert" else 1.0)
    assert table.std().item() == pytest.approx(wanted, rel=0.02)
    assert (table.abs().max() <= 0.04) == (family == "bert")
    assert torch.equal(table[1] == 0, torch.full((128,), family == "roberta"))
    norms = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    assert len(norms) == 1 + 2 * 2 + 1
    assert all((p == 1).all() for p in norms)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))


# ---- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, entry in ENCODERS.items() for name in entry.presets()]
)
def test_presets_have_the_published_parameter_counts(family, name):
    assert build(preset(name), device="meta").num_parameters() == ENCODERS[family].parameters()[name]


@pytest.mark.parametrize(
    ("name", "heads", "count"),
    [
        ("bert-base-uncased", ("masked_lm", "next_sentence"), 110_106_428),
        ("bert-base-uncased", ("masked_lm",), 109_514_298),
        ("roberta-base", ("masked_lm",), 124_697_433),
        ("distilbert-base-uncased", ("masked_lm",), 66_985_530),
    ],
)
def test_models_with_heads_have_the_published_parameter_counts(name, heads, count):
    config = dataclasses.replace(preset(name), heads=heads)
    assert build(config, device="meta").num_parameters() == count


@every_config
def test_config_json_holds_the_whole_configuration_and_transformers_keeps_it(transformers, config):
    config = dataclasses.replace(config, bos_token_id=1, eos_token_ids=(2, 3))
    assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config
    written = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    assert config_from_hf(written) == config


@every_config
def test_a_saved_model_comes_back_equal(config, tmp_path):
    model = random_model(config).eval()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    given = batch(config)
    expected = answers(model, *given)
    for name, value in answers(loaded, *given).items():
        assert torch.equal(value, expected[name])


@every_family
def test_the_settings_of_training_make_a_small_model_with_a_head_for_hidden_tokens(family):
    kind = ENCODERS[family].config_class()
    small = kind.from_settings(vocab_size=300, eos_token_ids=(299,), **kind.SETTINGS)
    assert (small.vocab_size, small.eos_token_ids, small.heads) == (300, (299,), ("masked_lm",))
    assert build(small).num_parameters() < 2_000_000
    for name, default in kind.SETTINGS.items():
        if type(default) is int:
            with pytest.raises(ConfigError, match=name):
                kind.from_settings(vocab_size=300, eos_token_ids=(), **{**kind.SETTINGS, name: -1})


CLASSIFIER = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification",
              "distilbert": "DistilBertForSequenceClassification"}  # fmt: skip


@every_family
@pytest.mark.parametrize(
    ("change", "labels", "problem"),
    [
        ({}, ("LABEL_0", "LABEL_1"), None),
        ({"num_labels": 1}, ("LABEL_0",), None),
        ({"id2label": {"1": "b", "0": "a", "2": "c"}, "num_labels": 3}, ("a", "b", "c"), None),
        ({"id2label": {"0": "x"}, "problem_type": "regression"}, ("x",), "regression"),
    ],
)
def test_labels_are_those_of_config_json(family, change, labels, problem):
    config = config_from_hf({"model_type": family, "architectures": [CLASSIFIER[family]], **change})
    assert (config.labels, config.problem) == (labels, problem)


@every_family
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertLMHeadModel"]}, "architectures = .* is not supported: portlm computes "),
        ({"architectures": []}, "architectures = "),
        ({"architectures": "BertModel"}, r"architectures = 'BertModel' is not supported"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name 0, 1, ... without a gap"),
        ({"id2label": ["a"]}, "id2label must name"),
        ({"id2label": {"0": 5}}, "id2label must name"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, "num_labels is 3, but id2label names 1"),
        ({"num_labels": 0}, "num_labels must be an integer from 1"),
        ({"problem_type": "ranking"}, "problem_type must be one of"),
        ({"hidden_size": 30, "dim": 30}, "width 30 must be a multiple of n_head 12|dim|hidden_size"),
        ({"new_key": 1}, "'new_key' is a key portlm does not know"),
    ],
    ids=str,
)
def test_what_portlm_does_not_compute_is_refused_by_name(family, change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf({"model_type": family, "architectures": [CLASSIFIER[family]], **change})


def test_a_head_for_spans_has_two_numbers():
    data = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "num_labels": 3}
    with pytest.raises(ConfigError, match=r"a head for spans has a start and an end, and .* says 3"):
        config_from_hf(data)


def test_positions_of_a_roberta_begin_behind_those_for_padding():
    data = {"model_type": "roberta", "max_position_embeddings": 514, "vocab_size": 50265}
    assert config_from_hf(data).context_length == 512
    with pytest.raises(ConfigError, match="max_position_embeddings = 2 leaves no position"):
        config_from_hf({**data, "max_position_embeddings": 2})
