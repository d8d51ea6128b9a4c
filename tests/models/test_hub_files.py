"""The files of foreign folders: the hub's cache, links that lead elsewhere, names and formats of other programs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portlm.compile.export import export
from portlm.errors import FormatError
from portlm.hub import export_hf, import_hf
from portlm.hub_files import cards, check_folder, find
from portlm.models import load_model, save_model
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}


def folder_of(model, folder: Path) -> Path:
    """Write a Hugging Face folder with everything that portlm reads of one, the weights in one file."""
    save_model(folder, model, byte_tokenizer(END_OF_TEXT))
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("# A model\n")
    (folder / "LICENSE").write_text("Do as you like.\n")
    return folder


def shard(folder: Path) -> Path:
    """Replace the weights of a folder by two shards and their index."""
    tensors, weight_map = load_file(folder / WEIGHTS), {}
    (folder / WEIGHTS).unlink()
    for i in range(2):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[i::2])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def cached(folder: Path, root: Path, *, absolute: bool = False) -> Path:
    """Return a snapshot of the hub's cache at ``root``: its files are links to those of ``folder`` in blobs."""
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, root / "blobs" / f"{i:040x}")
        blobs = root / "blobs" if absolute else Path("../../blobs")
        (snapshot / file.name).symlink_to(blobs / f"{i:040x}")
    return snapshot


def rewrite(folder: Path, change) -> None:
    """Save the folder's tensors as ``change`` returns them."""
    tensors = {name: t.contiguous() for name, t in change(load_file(folder / WEIGHTS)).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def reconfigure(folder: Path, **change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def refusal(folder: Path, out: Path) -> str:
    """Return the message with which an import is refused; nothing may be left of it."""
    with pytest.raises(FormatError) as error:
        import_hf(folder, out)
    assert not out.exists()
    return str(error.value)


# ---- the hub's cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_snapshot_of_the_hubs_cache_is_read_as_the_folder_would_be(sample, tmp_path, sharded, absolute):
    hf = folder_of(sample, tmp_path / "hf")
    if sharded:
        shard(hf)
    snapshot = cached(hf, tmp_path / "hub" / "models--a--b", absolute=absolute)
    assert import_hf(snapshot, tmp_path / "out").notes == ()
    import_hf(hf, tmp_path / "plain")
    assert names(tmp_path / "out") == names(tmp_path / "plain")
    for file in (tmp_path / "out").iterdir():
        assert not file.is_symlink()
        assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes()


def test_a_cache_that_is_reached_through_a_link_is_read(gpt2, tmp_path):
    cached(shard(folder_of(gpt2, tmp_path / "hf")), tmp_path / "hub" / "models--a--b")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "hub" / "models--a--b" / "snapshots")
    import_hf(tmp_path / "elsewhere" / ("0" * 40), tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out"), gpt2)


def test_the_folder_above_the_snapshots_is_refused_with_the_right_one(gpt2, tmp_path):
    cached(folder_of(gpt2, tmp_path / "hf"), tmp_path / "hub")
    assert "give one of the folders in snapshots/" in refusal(tmp_path / "hub", tmp_path / "out")


# Every file whose name portlm or an index chooses, and every way in which it may not be what it seems.
FILES = (
    "config.json", "generation_config.json", WEIGHTS, INDEX, "model-00001-of-00002.safetensors", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE",
)  # fmt: skip
LINKS = {
    "absolute": "{outside}/secret",
    "relative": "../../../outside/secret",
    "beside": "kept",
    "parent": "../kept",
    "through blobs": "../../blobs/../../outside/secret",
    "blob that is a link": "../../blobs/leads-out",
    "blob below a folder": "../../blobs/folder/kept",
    "blob below a linked folder": "../../blobs/linked/secret",
    "blobs themselves": "../../blobs",
    "folder in blobs": "../../blobs/folder",
    "pipe": "../../blobs/pipe",
    "device": "/dev/zero",
    "nothing": "../../blobs/nothing",
    "case": "../../Blobs/kept",
    "sibling prefix": "../../blobs-evil/secret",
    "another model": "../../../other/blobs/secret",
    "another snapshot": "../other/kept",
}


@pytest.fixture
def traps(gpt2, tmp_path):
    """Return a snapshot of a cache with everything around it to which a link might lead."""
    hf = folder_of(gpt2, tmp_path / "hf")
    root = tmp_path / "hub"
    snapshot = cached(hf, root)
    for folder in (
        "outside",
        "other/blobs",
        "hub/blobs-evil",
        "hub/Blobs",
        "hub/blobs/folder",
        "hub/snapshots/other",
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("secret", "kept"):
            shutil.copy(hf / "README.md", tmp_path / folder / name)
    for place in (snapshot, root / "snapshots", root / "blobs"):
        shutil.copy(hf / "README.md", place / "kept")
    (root / "blobs" / "leads-out").symlink_to(tmp_path / "outside" / "secret")
    (root / "blobs" / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "blobs" / "pipe")
    return snapshot


@pytest.mark.parametrize("file", FILES)
def test_no_file_of_a_folder_may_be_a_link_except_to_a_blob_of_the_same_model(
    traps, tmp_path, monkeypatch, file
):
    opened, really = [], os.open

    def watched(path, *rest, **more):
        opened.append(os.path.realpath(path))
        return really(path, *rest, **more)

    monkeypatch.setattr(os, "open", watched)
    if file == INDEX or file.startswith("model-"):
        (traps / WEIGHTS).unlink()
        (traps / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    for target in LINKS.values():
        (traps / file).unlink(missing_ok=True)
        (traps / file).symlink_to(target.format(outside=tmp_path / "outside"))
        message = refusal(traps, tmp_path / "out")
        assert re.search("symbolic link|is not a|the hub's cache lacks", message), (target, message)
    assert not {Path(path).name for path in opened} & {"secret", "kept", "pipe", "zero"}


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_in_the_place_of_a_file_is_refused_unopened(gpt2, tmp_path, file):
    hf = folder_of(gpt2, tmp_path / "hf")
    if file == INDEX or file.startswith("model-"):
        shard(hf)
    (hf / file).unlink()
    os.mkfifo(hf / file)  # opening it would wait for ever
    assert "not a regular file" in refusal(hf, tmp_path / "out")


def test_blobs_that_lead_elsewhere_are_not_those_of_the_model(gpt2, tmp_path):
    snapshot = cached(shard(folder_of(gpt2, tmp_path / "hf")), tmp_path / "hub")
    (tmp_path / "hub" / "blobs").rename(tmp_path / "moved")
    (tmp_path / "hub" / "blobs").symlink_to(tmp_path / "moved")
    assert "symbolic link" in refusal(snapshot, tmp_path / "out")


def test_links_to_blobs_mean_nothing_outside_of_a_cache(gpt2, tmp_path):
    snapshot = cached(shard(folder_of(gpt2, tmp_path / "hf")), tmp_path / "hub")
    snapshot.parent.rename(tmp_path / "hub" / "revisions")
    assert "symbolic link" in refusal(tmp_path / "hub" / "revisions" / snapshot.name, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/etc/hostname", "../x", "a/../../x", "C:\\x", "\\\\?\\x", "a\0b", "x" * 4096]
)
def test_a_name_that_leaves_the_folder_is_refused_in_a_cache_too(traps, name):
    with pytest.raises(FormatError):
        find(traps, name)


def test_export_follows_the_same_links_and_no_others(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    artifact = export(cached(hf, tmp_path / "hub"), tmp_path / "artifact", profiles=("portable",))
    assert (artifact / "README.md").read_bytes() == (hf / "README.md").read_bytes()
    assert (artifact / WEIGHTS).read_bytes() == (hf / WEIGHTS).read_bytes()
    (tmp_path / "secret").write_text("not for others")
    (hf / "NOTICE").symlink_to(tmp_path / "secret")
    for way in (export, export_hf, import_hf):
        with pytest.raises(FormatError, match=r"'NOTICE' passes through a symbolic link"):
            way(hf, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- names and formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", "llama-tied", "gpt_neox-tied"], indirect=True)
def test_a_tied_model_may_be_stored_under_the_name_of_its_head_alone(transformers, model, tmp_path):
    hf = folder_of(model, tmp_path / "hf")
    embedding, head = HEAD[model.config.family]
    rewrite(hf, lambda tensors: {head if name == embedding else name: t for name, t in tensors.items()})
    report = import_hf(hf, tmp_path / "out")
    assert report.notes == (
        f"{head} was stored and stands for {embedding} as well: config.json says that they are one matrix",
    )
    assert same_weights(load_model(tmp_path / "out"), model)
    ids = torch.arange(20).reshape(2, 10)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf)(ids).logits
    assert (model(ids) - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_what_compiling_and_parallel_training_add_to_names_is_taken_off(sample, tmp_path, prefix):
    hf = folder_of(sample, tmp_path / "hf")
    rewrite(hf, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    report = import_hf(hf, tmp_path / "out")
    assert len(report.notes) == 1
    assert "names of tensors held what torch.compile or parallel training adds" in report.notes[0]
    assert same_weights(load_model(tmp_path / "out"), sample)


def test_wrappers_inside_a_name_are_taken_off(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    wrapped = "h.{}._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod."

    def compiled_by_layer(tensors):
        for name in list(tensors):
            if ".h.1." in name:
                tensors[name.replace("h.1.", wrapped.format(1))] = tensors.pop(name)
        return tensors

    rewrite(hf, compiled_by_layer)
    import_hf(hf, tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out"), gpt2)


def test_a_tensor_with_and_without_its_wrapper_is_refused(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    rewrite(hf, lambda t: t | {"_orig_mod.transformer.wpe.weight": t["transformer.wpe.weight"].clone()})
    assert "both stand for 'transformer.wpe.weight'" in refusal(hf, tmp_path / "out")


def test_float64_is_rounded_to_the_nearest_float32_and_noted(sample, tmp_path):
    hf = folder_of(sample, tmp_path / "hf")
    exact = {name: t.double() * (1 + 2.0**-40) for name, t in load_file(hf / WEIGHTS).items()}
    save_file(exact, hf / WEIGHTS, {"format": "pt"})
    report = import_hf(hf, tmp_path / "out")
    assert report.notes == ("weights were F64 and were rounded to float32, in which portlm computes",)
    imported = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(imported[name], t.float()) for name, t in exact.items())


def test_float64_beyond_float32_is_refused_and_infinities_stay(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    bias = "transformer.ln_f.bias"
    values = torch.zeros(gpt2.config.width, dtype=torch.float64)
    values[0], values[1] = torch.inf, -torch.inf
    rewrite(hf, lambda t: t | {bias: values})
    import_hf(hf, tmp_path / "infinite")
    assert torch.equal(load_file(tmp_path / "infinite" / WEIGHTS)[bias], values.float())
    values[2] = 1e300
    rewrite(hf, lambda t: t | {bias: values})
    assert "'transformer.ln_f.bias' holds a number that is too large for float32" in refusal(
        hf, tmp_path / "out"
    )


# ---- what is no whole language model -----------------------------------------------------------------------------


def test_quantized_weights_are_refused_as_such(llama, tmp_path):
    hf = folder_of(llama, tmp_path / "hf")
    reconfigure(hf, quantization_config={"quant_method": "gptq"})
    message = refusal(hf, tmp_path / "out")
    assert "its weights are quantized" in message
    assert "remove" not in message
    folder_of(llama, hf)
    rewrite(hf, lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.int8)})
    assert "is I8, but must be F32 or F16 or BF16 or F64: its weights are no plain numbers" in refusal(
        hf, tmp_path / "out"
    )


def test_an_adapter_alone_is_refused_with_the_way_to_merge_it(gpt2, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    message = refusal(tmp_path / "adapter", tmp_path / "out")
    assert "holds a PEFT adapter (adapter_config.json), which changes another model: merge it" in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.transformer.wpe.weight",
        "transformer.h.0.attn.c_attn.base_layer.weight",
        "transformer.h.0.attn.c_attn.lora_A.default.weight",
        "_orig_mod.base_model.model.transformer.wpe.weight",
    ],
)
def test_weights_with_an_adapter_in_them_are_refused_as_such(gpt2, tmp_path, name):
    hf = folder_of(gpt2, tmp_path / "hf")
    rewrite(hf, lambda t: t | {name: torch.ones(2, 2)})
    message = refusal(hf, tmp_path / "out")
    assert f"tensor '{name.removeprefix('_orig_mod.')}' belongs to a model with a PEFT adapter" in message
    assert "merge_and_unload" in message


def test_a_head_for_another_task_is_named(transformers, sample, tmp_path):
    """The advice leads to a folder that can be imported, where the head of the language model is there."""
    hf = folder_of(sample, tmp_path / "hf")
    rewrite(hf, lambda t: t | {"score.weight": torch.ones(2, sample.config.width)})
    message = refusal(hf, tmp_path / "out")
    assert "tensor 'score.weight' belongs to a head for another task" in message
    assert message.endswith("save_pretrained(new_folder) in transformers leaves the head out")
    transformers.AutoModelForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "new")
    import_hf(tmp_path / "new", tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out"), sample)


def test_a_classifier_without_the_head_of_a_language_model_cannot_become_one(llama, tmp_path):
    hf = folder_of(llama, tmp_path / "hf")

    def as_classifier(tensors):
        del tensors["lm_head.weight"]
        return tensors | {"score.weight": torch.ones(2, llama.config.width)}

    rewrite(hf, as_classifier)
    assert refusal(hf, tmp_path / "out").endswith("there is none in here, lm_head.weight is missing")


@pytest.mark.parametrize(("variant", "plain"), [
    ("model.fp16.safetensors", WEIGHTS), ("model.safetensors.index.fp16.json", INDEX),
])  # fmt: skip
def test_a_variant_alone_is_refused_and_its_advice_works(gpt2, tmp_path, variant, plain):
    hf = folder_of(gpt2, tmp_path / "hf")
    if plain == INDEX:
        shard(hf)
    (hf / plain).rename(hf / variant)
    message = refusal(hf, tmp_path / "out")
    assert f"only the variant '{variant}': rename that to {plain}" in message
    (hf / variant).rename(hf / plain)
    import_hf(hf, tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out"), gpt2)


def test_shards_without_their_index_are_refused_as_such(gpt2, tmp_path):
    hf = shard(folder_of(gpt2, tmp_path / "hf"))
    (hf / INDEX).unlink()
    assert f"holds parts of the weights, but not {INDEX}" in refusal(hf, tmp_path / "out")


# ---- tokenizers of two files -------------------------------------------------------------------------------------


def test_the_advice_for_vocab_json_and_merges_txt_gives_a_tokenizer(transformers, llama, tmp_path):
    hf = folder_of(llama, tmp_path / "hf")
    tokenizer = json.loads((hf / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (hf / name).unlink()
    (hf / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"] | {"Ġt": 257, END_OF_TEXT: 256}))
    (hf / "merges.txt").write_text("#version: 0.2\nĠ t\n")
    (note,) = import_hf(hf, tmp_path / "first").notes
    assert "takes token ids only: there is no tokenizer.json; GPT2Tokenizer.from_pretrained(folder)" in note
    transformers.GPT2Tokenizer.from_pretrained(hf).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "tokenizer.json", hf)
    assert import_hf(hf, tmp_path / "second").notes == ()
    assert Tokenizer.load(tmp_path / "second").encode("a to") == [*b"a", 257, *b"o"]


def test_a_sentencepiece_model_alone_is_said_to_be_unread(llama, tmp_path):
    hf = folder_of(llama, tmp_path / "hf")
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer.model").write_bytes(b"")
    (note,) = import_hf(hf, tmp_path / "out").notes
    assert "there is no tokenizer.json, and portlm does not read tokenizer.model" in note


# ---- what is kept ------------------------------------------------------------------------------------------------


def test_padding_card_and_licence_come_back(transformers, sample, tmp_path):
    hf = folder_of(sample, tmp_path / "hf")
    kept = ("README.md", "LICENSE", "LICENSE.txt", "LICENCE-CODE.md", "NOTICE", "COPYING", "USE_POLICY.md")
    for name in kept:
        (hf / name).write_text(f"{name}: é\n")
    for name in ("train.py", "README.py", "readme.html", "licenses.json"):
        (hf / name).write_text("raise SystemExit('code from a model folder ran')")
    reconfigure(hf, pad_token_id=7)
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "pad_token_id": 7}))
    assert import_hf(hf, tmp_path / "checkpoint").notes == ()
    artifact = export(tmp_path / "checkpoint", tmp_path / "artifact", profiles=("portable",))
    for source in (tmp_path / "checkpoint", artifact):
        back = tmp_path / f"back-{source.name}"
        export_hf(source, back)
        assert cards(back) == sorted(kept)
        for name in kept:
            assert (back / name).read_bytes() == (hf / name).read_bytes()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(back)
        assert (theirs.config.pad_token_id, theirs.generation_config.pad_token_id) == (7, 7)
        assert not list(back.glob("*.py"))


def test_a_card_that_is_too_large_is_left_out_and_noted(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    with (hf / "README.md").open("wb") as file:
        file.truncate((4 << 20) + 1)
    (note,) = import_hf(hf, tmp_path / "out").notes
    assert note.startswith("README.md was left out: ")
    assert cards(tmp_path / "out") == ["LICENSE"]


def test_a_folder_that_does_not_exist_is_an_error_of_ours(tmp_path):
    check_folder(tmp_path / "nothing")  # what is not there leads nowhere
    assert "there is no such folder" in refusal(tmp_path / "nothing", tmp_path / "out")
