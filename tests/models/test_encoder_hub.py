"""Folders of encoders: in from Hugging Face without loss, back as the class with the same heads."""

import dataclasses
import json

import pytest
import torch
from encoders import ENCODERS, answers, batch, every_family, labelled, random_model

from portlm.errors import FormatError
from portlm.hub import export_hf, import_hf
from portlm.models import load_config, load_model, save_model
from portlm.weights import load_torch, save_tensors

CLASSES = [
    (family, heads)
    for family, entry in ENCODERS.items()
    for heads in entry.config_class().ARCHITECTURES.values()
]
every_class = pytest.mark.parametrize(("family", "heads"), CLASSES, ids=str)


def model_of(family, heads):
    return random_model(labelled(ENCODERS[family].config_class().tiny(), heads)).eval()


def rewrite(folder, change):
    """Save the folder's tensors again after ``change`` made others of them."""
    tensors = change(load_torch(folder / "model.safetensors"))
    save_tensors(
        folder / "model.safetensors",
        {k: v.contiguous() for k, v in tensors.items()},
        metadata={"format": "pt"},
    )


def assert_same(one, other):
    given = batch(one.config)
    expected = answers(one, *given)
    for name, value in answers(other, *given).items():
        assert torch.equal(value, expected[name])


@every_class
def test_what_transformers_saved_comes_back_and_it_opens_what_is_written(
    transformers, family, heads, tmp_path
):
    model = model_of(family, heads)
    save_model(tmp_path / "ours", model)
    kind = getattr(transformers, model.config.architecture)
    opened = kind.from_pretrained(tmp_path / "ours")
    opened.save_pretrained(tmp_path / "theirs")
    report = import_hf(tmp_path / "theirs", tmp_path / "checkpoint")
    assert report.parameters == model.num_parameters()
    assert_same(load_model(tmp_path / "checkpoint"), model)
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    again = kind.from_pretrained(tmp_path / "back", trust_remote_code=False)
    for (name, a), (_, b) in zip(opened.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@every_class
def test_a_folder_is_the_same_bytes_after_import_and_export(family, heads, tmp_path):
    save_model(tmp_path / "ours", model_of(family, heads))
    import_hf(tmp_path / "ours", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_names_of_old_files_are_understood(tmp_path):
    """As the first published files of BERT have them: gamma and beta, and positions among the weights."""
    model = model_of("bert", ("masked_lm",))
    save_model(tmp_path / "hf", model)
    rewrite(tmp_path / "hf", lambda tensors: {
        **{n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items()},
        "bert.embeddings.position_ids": torch.arange(32)[None],
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
    })  # fmt: skip
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), model)
    assert any("1 tensors that hold no parameters" in note for note in report.notes)
    assert any("cls.predictions.decoder.weight repeats bert.embeddings" in note for note in report.notes)


def test_a_head_that_is_stored_and_not_named_is_kept(tmp_path):
    """bert-base-uncased names BertForMaskedLM, and holds what BertForPreTraining has."""
    model = model_of("bert", ("masked_lm", "next_sentence"))
    save_model(tmp_path / "hf", model)
    path = tmp_path / "hf" / "config.json"
    path.write_text(path.read_text().replace("BertForPreTraining", "BertForMaskedLM"))
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), model)
    expected = "config.json names BertForMaskedLM, and the weights hold next_sentence as well, which was kept"
    assert report.notes[0] == expected


@every_family
def test_parts_of_other_classes_are_left_out_with_a_note(family, tmp_path):
    """As transformers does: an encoder is fine-tuned for another task than that of its file."""
    model = model_of(family, ("tag",))
    save_model(tmp_path / "hf", model)
    spare = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias", "distilbert": "vocab_projector.bias"}[
        family
    ]
    rewrite(tmp_path / "hf", lambda tensors: {**tensors, spare: torch.zeros(262)})
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), model)
    assert report.notes[0].startswith(
        f"'{spare}': left out, they belong to heads that {model.config.architecture}"
    )


def test_a_head_without_weights_is_missing_by_name(tmp_path):
    save_model(tmp_path / "hf", model_of("bert", ()))
    path = tmp_path / "hf" / "config.json"
    path.write_text(path.read_text().replace("BertModel", "BertForTokenClassification"))
    with pytest.raises(
        FormatError, match=r"tensor classifier.weight of shape \(2, 24\) is missing \(and 1 more\)"
    ):
        import_hf(tmp_path / "hf", tmp_path / "out")


def test_a_head_with_another_number_of_labels_is_refused(tmp_path):
    save_model(tmp_path / "hf", model_of("bert", ("classify",)))
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    data |= {"id2label": {str(i): f"L{i}" for i in range(5)}, "label2id": {}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(data))
    with pytest.raises(
        FormatError, match=r"tensor classifier.weight has shape \(3, 24\), but .* asks for \(5, 24\)"
    ):
        import_hf(tmp_path / "hf", tmp_path / "out")


def test_an_encoder_comes_from_the_cache_of_the_hub(tmp_path):
    """Where each file is a link to a blob."""
    model = model_of("bert", ())
    save_model(tmp_path / "hf", model)
    root = tmp_path / "models--someone--minilm"
    snapshot, blobs = root / "snapshots" / "0123abcd", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted((tmp_path / "hf").iterdir())):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    import_hf(snapshot, tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), model)


def test_labels_survive_the_way_there_and_back(transformers, tmp_path):
    model = model_of("distilbert", ("classify",))
    config = dataclasses.replace(model.config, labels=("gut", "schlecht", "weiß nicht"))
    model.config = config
    save_model(tmp_path / "ours", model)
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert opened.config.id2label == dict(enumerate(config.labels))
    opened.save_pretrained(tmp_path / "theirs")
    import_hf(tmp_path / "theirs", tmp_path / "out")
    assert load_config(tmp_path / "out").labels == config.labels
