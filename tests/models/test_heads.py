"""Decoders with heads: the classes of transformers, the last token of each row, files, and what is refused."""

import dataclasses
import json

import pytest
import torch
from mixture_tensors import as_in_memory

from portlm import hub
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.models import (
    DECODERS,
    build,
    config_from_hf,
    expected_shapes,
    load_config,
    load_model,
    save_model,
)
from portlm.models.heads import headed, with_labels
from portlm.models.mixture import Mixture
from portlm.models.t5 import T5Config

LABELS = ("good", "bad", "so so")
UNKNOWN = ("gpt3", "olmo2")  # transformers has no class for their labels
every_family = pytest.mark.parametrize("family", DECODERS)
every_double = pytest.mark.parametrize("family", ["gpt2", "openai-gpt"])


def labelled(family):
    """Return the tiny configuration of a family, with a head for three labels, whose padding is id 0."""
    config = dataclasses.replace(DECODERS[family].config_class().tiny(), pad_token_id=0)
    return with_labels(config, LABELS)


def choosing(family):
    """Return the tiny configuration of a family, with the language model and a number for each text."""
    plain = DECODERS[family].config_class()
    return headed(plain)(
        **{f.name: getattr(plain.tiny(), f.name) for f in dataclasses.fields(plain)}, heads=("choose",)
    )


def random_model(config, seed: int = 0):
    """Return a model whose every parameter, biases and gains included, matters to the result."""
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def rows(config):
    """Return three rows of 11, 7 and 1 tokens (3, 11), padded on their right with 0, and their mask."""
    ids = torch.randint(1, config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(11) < torch.tensor([[11], [7], [1]])).long()
    return ids * mask, mask


def in_files(model, values):
    """Return tensors of a model under transformers' names, in its orientation."""
    if isinstance(model, Mixture):
        return as_in_memory(model, values)
    found = {}
    for name, value in values.items():
        hf_name, transposed = model.hf_name(name)
        found[hf_name] = value.t() if transposed else value
    return found


def copied(other, model):
    """Give transformers' model our weights."""
    state = in_files(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) <= set(model.hf_tied(model.config))
    assert not unexpected
    other.tie_weights()
    return other


def gradients_agree(other, model):
    """Compare the gradient of every parameter with that of transformers'."""
    theirs = dict(other.named_parameters())
    ours = in_files(model, {name: p.grad for name, p in model.named_parameters()})
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name].grad, atol=1e-5, rtol=1e-4)


# ---- the same model as transformers' -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in DECODERS if family not in UNKNOWN])
def test_labels_and_their_gradients_are_those_of_transformers(transformers, family):
    # Two float32 computations of order-one logits; each is about 1e-6 away from the exact answer.
    config = labelled(family)
    model, (ids, mask) = random_model(config), rows(config)
    settings = transformers.AutoConfig.for_model(**config.to_hf())
    other = copied(transformers.AutoModelForSequenceClassification.from_config(settings), model)
    ours, theirs = model.answer("classify", ids, mask), other(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    wanted = torch.tensor([2, 0, 1])
    torch.nn.functional.cross_entropy(ours, wanted).backward()
    torch.nn.functional.cross_entropy(theirs, wanted).backward()
    gradients_agree(other, model)


@every_double
def test_both_heads_of_a_double_heads_model_are_those_of_transformers(transformers, family):
    config = choosing(family)
    assert config.architecture.endswith("DoubleHeadsModel")
    model = random_model(config).eval()
    kind = getattr(transformers, config.architecture)
    other = copied(kind(transformers.AutoConfig.for_model(**config.to_hf())), model).eval()
    ids, mask = rows(config)
    # Without a mask, which transformers' GPT-1 takes for one row alone: nobody sees padding behind it.
    found = other(ids[None], mc_token_ids=mask.sum(1)[None] - 1)
    real = mask == 1
    torch.testing.assert_close(model(ids)[real], found.logits[0][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model.answer("choose", ids, mask)[:, 0], found.mc_logits[0], atol=1e-5, rtol=1e-5
    )
    (found.logits[0][real].sin().sum() + found.mc_logits.sin().sum()).backward()
    (model(ids)[real].sin().sum() + model.answer("choose", ids, mask).sin().sum()).backward()
    gradients_agree(other, model)


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt", "llama"])
def test_a_folder_of_transformers_is_imported_and_opens_there_again(transformers, tmp_path, family):
    config = labelled(family)
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(**config.to_hf())
    theirs = transformers.AutoModelForSequenceClassification.from_config(settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    hub.import_hf(tmp_path / "theirs", tmp_path / "ours")
    model, (ids, mask) = load_model(tmp_path / "ours"), rows(config)
    expected = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(model.answer("classify", ids, mask), expected, atol=1e-5, rtol=1e-5)
    hub.export_hf(tmp_path / "ours", tmp_path / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(ids, attention_mask=mask).logits, expected)
    assert again.config.id2label == dict(enumerate(LABELS))


# ---- by itself ---------------------------------------------------------------------------------------------------


@every_family
def test_a_label_is_read_at_the_last_token_of_each_row(family):
    # The sums run over other lengths, hence in another order: a few units in the last place.
    model = random_model(labelled(family)).eval()
    ids, mask = rows(model.config)
    together = model.answer("classify", ids, mask)
    for b, length in enumerate(mask.sum(1).tolist()):
        alone = model.apply_head("classify", model.encode(ids[b : b + 1, :length]))[:, -1]
        torch.testing.assert_close(together[b : b + 1], alone, atol=2e-5, rtol=1e-5)
    changed = ids.clone()
    changed[1:, 9] = 5  # padding
    assert torch.equal(model.answer("classify", changed, mask), together)


@every_family
def test_a_model_with_labels_has_one_role_which_steps_as_it_reads(family):
    model = random_model(labelled(family)).eval()
    roles = model.roles()
    assert list(roles) == ["head:classify"]
    role = roles["head:classify"]
    assert role.outputs[0].shape == ("batch", "kept", len(LABELS))
    ids, _ = rows(model.config)
    caches = [torch.zeros(3, *(d for d in (s.shape[1], 0, s.shape[3]))) for s in role.state]
    with torch.no_grad():
        first, *caches = role.function(
            ids[:, :4], torch.ones(3, 4).long(), torch.arange(4).expand(3, 4), torch.tensor([3]), *caches
        )
        last, *_ = role.function(
            ids[:, 4:], torch.ones(3, 11).long(), torch.arange(4, 11).expand(3, 7), torch.tensor([6]), *caches
        )
    torch.testing.assert_close(first[:, 0], model.answer("classify", ids[:, :4]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last[:, 0], model.answer("classify", ids), atol=2e-5, rtol=1e-5)


@every_double
def test_a_double_heads_model_generates_and_chooses(family):
    assert list(random_model(choosing(family)).roles()) == ["decoder", "head:choose"]


@every_family
def test_a_saved_model_comes_back_equal(family, tmp_path):
    model = random_model(labelled(family)).eval()
    save_model(tmp_path, model)
    loaded, (ids, mask) = load_model(tmp_path), rows(model.config)
    assert loaded.config == model.config
    assert torch.equal(loaded.answer("classify", ids, mask), model.answer("classify", ids, mask))


@every_family
def test_the_configuration_of_a_head_is_the_familys_own_and_three_fields(family):
    config = labelled(family)
    data = json.loads(json.dumps(config.to_hf()))
    assert config_from_hf(data) == config
    plain = dataclasses.replace(DECODERS[family].config_class().tiny(), pad_token_id=0)
    assert data["architectures"][0].endswith("ForSequenceClassification")
    assert {**data, **plain.to_hf()}.keys() == data.keys()
    assert with_labels(config, LABELS) == config  # of one that has labels already
    assert type(with_labels(config, ("x", "y"))) is type(config)


def test_a_classifier_with_an_output_matrix_of_its_own_keeps_none():
    shapes = expected_shapes(labelled("llama"))
    assert "lm_head.weight" not in shapes
    assert shapes["score.weight"] == (3, DECODERS["llama"].config_class().tiny().width)
    with pytest.raises(
        UsageError, match="head for labels in the place of its output matrix, so it predicts no"
    ):
        build(labelled("llama"))(torch.zeros(1, 2, dtype=torch.int64))


# ---- refused -----------------------------------------------------------------------------------------------------


def test_a_head_that_a_model_lacks_is_named():
    model = build(DECODERS["gpt2"].config_class().tiny())
    with pytest.raises(UsageError, match="this gpt2 has no head classify, its heads are: none"):
        model.answer("classify", torch.zeros(1, 2, dtype=torch.int64))


def test_only_encoders_and_decoders_take_labels():
    with pytest.raises(ConfigError, match=r"a t5 has no head for labels: .* of kind encoder-decoder"):
        with_labels(T5Config.tiny(), LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ()}, "labels belong to the head classify"),
        ({"heads": ("choose",)}, "labels belong to the head classify"),
        ({"heads": ("tag",)}, "heads of gpt2 are one of classify, choose, got"),
        ({"heads": ("classify", "choose")}, "heads of gpt2 are one of classify, choose, got"),
        ({"problem": "guessing"}, "problem_type must be one of"),
        ({"labels": tuple(map(str, range(260)))}, "260 labels are more than the 259 ids of the model"),
    ],
    ids=str,
)
def test_heads_and_labels_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(labelled("gpt2"), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 2}, "num_labels is 2, but id2label names 3"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name 0, 1, ... without a gap"),
        ({"summary_type": "mean", "architectures": ["GPT2DoubleHeadsModel"]}, "summary_type = 'mean'"),
        (
            {"summary_activation": "tanh", "architectures": ["GPT2DoubleHeadsModel"]},
            "summary_activation = 'tanh'",
        ),
    ],
    ids=str,
)
def test_a_config_json_with_another_head_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(labelled("gpt2").to_hf() | change)


def test_a_file_without_the_head_that_config_json_names_is_refused(tmp_path):
    model = build(DECODERS["gpt2"].config_class().tiny())
    save_model(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(labelled("gpt2").to_hf()))
    assert load_config(tmp_path).heads == ("classify",)
    with pytest.raises(FormatError, match=r"tensor score.weight of shape \(3, 24\) is missing"):
        load_model(tmp_path)
