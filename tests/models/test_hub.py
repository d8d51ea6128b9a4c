"""Hugging Face folders: in without loss, out without remote code, and nothing hostile gets further than an error."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import portlm
from portlm.errors import FormatError, PortlmError, UsageError
from portlm.hub import export_hf, import_hf
from portlm.models import build, load_model, save_model
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer
from portlm.weights import load_numpy, load_torch, save_tensors

INDEX = "model.safetensors.index.json"


def folder_of(model, folder: Path) -> Path:
    """Write a Hugging Face folder with a tokenizer, the way its Hub has them."""
    save_model(folder, model, byte_tokenizer(END_OF_TEXT))
    return folder


def shard(folder: Path, names: tuple[str, ...] = ("model-00001-of-00002", "model-00002-of-00002")) -> None:
    """Replace model.safetensors by two shards and their index."""
    tensors = load_torch(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i::2])
        save_tensors(folder / f"{name}.safetensors", part, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"{name}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def rewrite(folder: Path, change) -> None:
    """Save the folder's tensors again after ``change`` edited the dictionary."""
    tensors = load_torch(folder / "model.safetensors")
    change(tensors)
    save_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_transformers_saved_comes_back_byte_for_byte(transformers, model, tmp_path):
    save_model(tmp_path / "ours", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    byte_tokenizer(END_OF_TEXT).save(tmp_path / "theirs")
    report = import_hf(tmp_path / "theirs", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert report.notes == ()
    assert report.parameters == model.num_parameters()
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    assert same_weights(load_model(tmp_path / "checkpoint"), model)


def test_transformers_opens_an_export_without_remote_code(transformers, model, tmp_path):
    folder_of(model, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert [type(other).__name__] == model.config.to_hf()["architectures"]
    ids = tokenizer("the", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"the")]
    assert tokenizer.eos_token_id == 256
    torch.testing.assert_close(other(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


def test_a_prompt_begins_with_what_transformers_begins_it_with(transformers, gpt2, tmp_path):
    """A template as Llama 3 has it, through import, a session and the way back."""
    hf = folder_of(gpt2, tmp_path / "hf")
    document = json.loads((hf / "tokenizer.json").read_text())
    begin, text, other = (
        {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
        *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
    )
    document["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, begin, other],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [256], "tokens": [END_OF_TEXT]}},
    }  # fmt: skip
    (hf / "tokenizer.json").write_text(json.dumps(document))
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    for folder in (hf, tmp_path / "back"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with portlm.load(tmp_path / "checkpoint", "torch") as session:
            for prompt in ("the", ""):
                ids = theirs(prompt, return_tensors="pt")
                expected = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[
                    0
                ].tolist()
                found = session.generate(prompt, max_new_tokens=4, ignore_eos=True)
                assert (found.prompt_tokens, ids["input_ids"][0, 0]) == (len(prompt) + 1, 256)
                assert [*ids["input_ids"][0].tolist(), *found.token_ids][: len(expected)] == expected
            assert list(session.score("the").token_ids) == theirs("the")["input_ids"]


@pytest.mark.parametrize("config", [None, "{}"])
def test_the_class_that_no_tokenizer_config_names_comes_along(transformers, llama, tmp_path, config):
    """config.json may name it, which portlm writes anew. GPT2Tokenizer puts no space before a text here."""
    hf = folder_of(llama, tmp_path / "hf")
    document = json.loads((hf / "tokenizer.json").read_text())
    document["pre_tokenizer"]["add_prefix_space"] = True
    (hf / "tokenizer.json").write_text(json.dumps(document))
    (hf / "tokenizer_config.json").unlink() if config is None else (hf / "tokenizer_config.json").write_text(
        config
    )
    for kind, ids in (("GPT2Tokenizer", list(b"the")), (None, list(b" the"))):
        data = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps(data | {"tokenizer_class": kind}))
        import_hf(hf, tmp_path / f"from {kind}")
        for folder in (hf, tmp_path / f"from {kind}"):
            assert transformers.AutoTokenizer.from_pretrained(folder)("the")["input_ids"] == ids
            assert Tokenizer.load(folder).encode("the") == ids


def test_an_export_without_tokenizer_config_still_opens_as_a_tokenizer(transformers, gpt2, tmp_path):
    folder_of(gpt2, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer_config.json").unlink()
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert tokenizer("the")["input_ids"] == list(b"the")


def test_shards_are_joined(sample, tmp_path):
    shard(folder_of(sample, tmp_path / "hf"))
    import_hf(tmp_path / "hf", tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out"), sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_so_and_is_noted(sample, tmp_path, dtype):
    folder_of(sample, tmp_path / "hf")
    halves = {n: t.to(dtype) for n, t in load_torch(tmp_path / "hf" / "model.safetensors").items()}
    save_tensors(tmp_path / "hf" / "model.safetensors", halves)
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert any("F16 and stay so" in note for note in report.notes)
    imported = load_torch(tmp_path / "out" / "model.safetensors")
    assert imported.keys() == halves.keys()
    assert all(tensor.dtype == dtype for tensor in imported.values())
    assert all(torch.equal(imported[name], half) for name, half in halves.items())
    assert {p.dtype for p in load_model(tmp_path / "out").parameters()} == {torch.float32}
    again = export_hf(tmp_path / "out", tmp_path / "back")
    assert (again.folder / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_the_names_of_the_bare_gpt2_model_and_its_masks_are_understood(gpt2, tmp_path):
    # So OpenAI's own upload looks: no prefix, and a causal mask in every layer.
    folder_of(gpt2, tmp_path / "hf")

    def as_uploaded(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(gpt2.config.n_layer):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path / "hf", as_uploaded)
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert any("4 tensors that hold no parameters" in note for note in report.notes)
    assert same_weights(load_model(tmp_path / "out"), gpt2)


def test_the_rotary_frequencies_of_early_llama_files_are_left_out(llama, tmp_path):
    folder_of(llama, tmp_path / "hf")
    rewrite(
        tmp_path / "hf", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    import_hf(tmp_path / "hf", tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out"), llama)


def test_a_second_copy_of_the_shared_matrix_must_be_equal(gpt2, tmp_path):
    folder_of(gpt2, tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert any("lm_head.weight repeats transformer.wte.weight" in note for note in report.notes)
    rewrite(tmp_path / "hf", lambda t: t["lm_head.weight"].view(-1)[:1].add_(1e-3))
    with pytest.raises(FormatError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        import_hf(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_other_weight_formats_are_refused_unopened_with_the_way_out(gpt2, tmp_path, name):
    folder_of(gpt2, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "hf" / name)  # opening it would wait for ever
    with pytest.raises(FormatError, match=rf"holds '{name}' but no safetensors.*save_pretrained"):
        import_hf(tmp_path / "hf", tmp_path / "out")


def test_a_pickle_named_as_safetensors_is_refused(gpt2, tmp_path):
    folder_of(gpt2, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(
        b"\x80\x04\x95" + b"cposix\nsystem\n(S'false'\ntR." * 4
    )
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        import_hf(tmp_path / "hf", tmp_path / "out")


def test_a_folder_without_weights_is_refused(gpt2, tmp_path):
    folder_of(gpt2, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"holds neither model\.safetensors nor"):
        import_hf(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "a/../../model.safetensors",
        "/etc/hostname",
        "C:\\model.safetensors",
        "..\\model.safetensors",
        "a\x00b",
        "",
        ".",
        "x" * 4096,
        "link.safetensors",
        "linked/model.safetensors",
        "fifo",
        "folder",
        "../hf-evil/model.safetensors",
    ],
    ids=lambda name: ascii(name)[:24],
)
def test_a_shard_name_that_leaves_the_folder_is_refused(gpt2, tmp_path, name):
    hf = folder_of(gpt2, tmp_path / "hf")
    folder_of(gpt2, tmp_path / "hf-evil")
    (hf / "model.safetensors").rename(tmp_path / "model.safetensors")
    (hf / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
    (hf / "linked").symlink_to(tmp_path)
    (hf / "folder").mkdir()
    os.mkfifo(hf / "fifo")
    names = load_numpy(tmp_path / "model.safetensors")
    (hf / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(FormatError):
        import_hf(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("transformer.wpe.weight"), "does not place there"),
        (lambda m: m.update({"ghost": m["transformer.wpe.weight"]}), "'ghost'.*which lacks it"),
        (lambda m: m.update({"ghost": "absent.safetensors"}), "does not exist"),
        (lambda m: m.update({"transformer.wpe.weight": 3}), "must be a file name"),
        (lambda m: m.clear(), "weight_map"),
    ],
    ids=["unlisted", "ghost", "absent file", "number", "empty"],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(gpt2, tmp_path, change, message):
    shard(folder_of(gpt2, tmp_path / "hf"))
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    change(index["weight_map"])
    (tmp_path / "hf" / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"_attn_implementation_internal": "someone/kernels"}, "_attn_implementation_internal"),
    ],
    ids=lambda c: c if isinstance(c, str) else "",
)
def test_a_config_that_asks_for_more_than_portlm_computes_is_refused(llama, tmp_path, change, key):
    hf = folder_of(llama, tmp_path / "hf")
    (hf / "modeling_x.py").write_text("raise SystemExit('code from a model folder ran')")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FormatError, match=key):
        import_hf(hf, tmp_path / "out")


def test_nothing_that_asks_for_code_reaches_the_checkpoint(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    (hf / "tokenization_x.py").write_text("raise SystemExit('code from a model folder ran')")
    tokenizer = json.loads((hf / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    (hf / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    generation = {"custom_generate": "someone/code", "temperature": 0.7, "eos_token_id": [0, 3]}
    (hf / "generation_config.json").write_text(json.dumps(generation))
    report = import_hf(hf, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {"temperature": 0.7, "eos_token_id": [0, 3]}
    assert any("auto_map" in note for note in report.notes)
    assert any("custom_generate" in note for note in report.notes)


@pytest.mark.parametrize(
    "text", [None, "{", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}'], ids=str
)
def test_without_a_tokenizer_portlm_can_use_the_weights_come_alone_and_a_note_says_so(gpt2, tmp_path, text):
    hf = folder_of(gpt2, tmp_path / "hf")
    (hf / "tokenizer.json").unlink()
    if text is not None:
        (hf / "tokenizer.json").write_text(text)
    report = import_hf(hf, tmp_path / "out")
    assert any("token ids only" in note for note in report.notes)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert same_weights(load_model(tmp_path / "out"), gpt2)


@pytest.mark.parametrize("back", [False, True], ids=["import", "export"])
def test_control_tokens_that_the_model_lacks_are_noted_and_everything_else_works(gpt2, tmp_path, back):
    """A [PAD] added to the tokenizer alone: transformers reads text with it as well."""
    save_model(tmp_path / "hf", build(replace(gpt2.config, vocab_size=256, eos_token_ids=())))
    byte_tokenizer(END_OF_TEXT).save(tmp_path / "hf")
    report = (export_hf if back else import_hf)(tmp_path / "hf", tmp_path / "out")
    words = "257 tokens and the model 256: the control tokens beyond are never used"
    assert any(words in note for note in report.notes)
    assert Tokenizer.load(tmp_path / "out").vocab_size == 257
    with portlm.load(tmp_path / "out", "torch") as session:
        assert (session.tokenizer.vocab_size, session.tokenizer.eos_id) == (256, None)
        assert len(session.generate("a", max_new_tokens=3).token_ids) == 3


@pytest.mark.parametrize("back", [False, True], ids=["import", "export"])
def test_a_tokenizer_whose_text_the_model_cannot_read_is_left_out(gpt2, tmp_path, back):
    """Nothing could load it, not even to take token ids."""
    save_model(tmp_path / "hf", build(replace(gpt2.config, vocab_size=200, eos_token_ids=())))
    byte_tokenizer(END_OF_TEXT).save(tmp_path / "hf")
    report = (export_hf if back else import_hf)(tmp_path / "hf", tmp_path / "out")
    words = (
        "left out, so the model takes token ids only (--ids): the tokenizer has 257 tokens and the model 200"
    )
    assert any(words in note for note in report.notes)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    with portlm.load(tmp_path / "out", "torch") as session:
        assert len(session.generate([[1, 2]], max_new_tokens=3)[0].token_ids) == 3


def test_an_existing_folder_is_left_alone(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    (tmp_path / "out").mkdir()
    import_hf(hf, tmp_path / "out")  # empty, so nothing can be lost
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for transfer in (import_hf, export_hf):
        with pytest.raises(UsageError, match="exists already"):
            transfer(hf, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_refused_import_leaves_no_trace(gpt2, tmp_path):
    hf = folder_of(gpt2, tmp_path / "hf")
    (hf / "generation_config.json").write_text("[]")  # noticed only after the weights were written
    with pytest.raises(FormatError, match="generation_config"):
        import_hf(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_hostile_index_files_end_in_an_error_of_ours(gpt2, tmp_path_factory):
    hf = folder_of(gpt2, tmp_path_factory.mktemp("fuzz") / "hf")
    shard(hf)
    index = json.loads((hf / INDEX).read_text())
    texts = st.text(max_size=12) | st.sampled_from(sorted(set(index["weight_map"].values())))
    value = texts | st.integers() | st.none() | st.lists(texts, max_size=2)

    @settings(max_examples=100, deadline=None)
    @given(
        st.dictionaries(st.sampled_from(sorted(index["weight_map"])) | texts, value, min_size=1, max_size=4)
    )
    def run(change):
        (hf / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))
        try:
            import_hf(hf, hf.parent / "out" / os.urandom(8).hex())
        except PortlmError:
            return
        assert all(index["weight_map"].get(name) == shard for name, shard in change.items())

    run()


def test_values_survive_whatever_their_bits_are(gpt2, tmp_path):
    # Infinities, NaN with a payload and denormals are bits like any others.
    hf = folder_of(gpt2, tmp_path / "hf")
    bits = np.array([0x7F800000, 0xFFC12345, 1, 0x80000000] * 6, np.uint32)
    rewrite(hf, lambda t: t.update({"transformer.ln_f.bias": torch.from_numpy(bits.view(np.float32))}))
    import_hf(hf, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
