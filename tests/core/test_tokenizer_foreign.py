"""Files as they are published: what is put around and before a text, bytes without a token; against transformers."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from portlm.data.python_topics import python_topics
from portlm.data.shards import prepare
from portlm.errors import FormatError, UsageError
from portlm.models import DECODERS
from portlm.tokenizer import Tokenizer, train_bpe
from portlm.tokenizer_steps import SPLIT_PATTERNS, byte_level

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
SAMPLE = python_topics()[:30_000]
BASE = json.loads(train_bpe([SAMPLE, " a a" * 9], 510, eos=None).to_json())
BASE["added_tokens"] = [
    {"id": 510 + i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
     "normalized": False, "special": True} for i, content in enumerate([BEGIN, END])
]  # fmt: skip
IDS = {BEGIN: 510, END: 511}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": next(iter(SPLIT_PATTERNS))},
    "behavior": "Isolated",
    "invert": False,
}
LLAMA_3 = {"type": "Sequence", "pretokenizers": [SPLIT, byte_level(use_regex=False)]}
DIGITS = {"type": "Digits", "individual_digits": True}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.lists(
    st.sampled_from([" ", "\n", "a", "b1", "12", "'s", BEGIN, END, "é", "漢", "\u00a0", "\t"]), max_size=12
).map("".join)


def template(*single: str) -> dict:
    """A post-processor; $A is the text, $B in pairs the other."""

    def piece(name):
        return (
            {"Sequence": {"id": name[1], "type_id": 0}}
            if name[0] == "$"
            else {"SpecialToken": {"id": name, "type_id": 0}}
        )

    declared = {name: {"id": name, "ids": [IDS[name]], "tokens": [name]} for name in single if name in IDS}
    pair = [*single, *(name.replace("$A", "$B") for name in single)]
    return {"type": "TemplateProcessing", "single": [*map(piece, single)], "pair": [*map(piece, pair)],
            "special_tokens": declared}  # fmt: skip


AROUND = {
    "none": None,
    "byte level": byte_level(),
    "begin": template(BEGIN, "$A"),
    "begin in a sequence": {"type": "Sequence", "processors": [byte_level(), template(BEGIN, "$A")]},
    "end": template("$A", END),
    "both": template(BEGIN, "$A", END),
    "several": template(BEGIN, BEGIN, "$A", END, END),
}
BEFORE = {
    "bare": byte_level(),
    "bare with space": byte_level(add_prefix_space=True),
    "llama 3": LLAMA_3,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, byte_level()]},
    "sequence with space": {"type": "Sequence", "pretokenizers": [DIGITS, byte_level(add_prefix_space=True)]},
}


def write(folder, config=None, **parts):
    """A folder with a tokenizer, made of the base and other parts."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(BASE | parts))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": BEGIN, "eos_token": END} | config)
        )
    return folder


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the differential test needs transformers")


@pytest.fixture(scope="module")
def opened(transformers, tmp_path_factory):
    """Each combination of parts, opened here, opened by transformers, and opened by it from what is saved here."""
    pairs = {}
    for around, post_processor in AROUND.items():
        for before, pre_tokenizer in BEFORE.items():
            folder = write(tmp_path_factory.mktemp("in") / "model", {"tokenizer_class": "PreTrainedTokenizerFast"},
                           post_processor=post_processor, pre_tokenizer=pre_tokenizer)  # fmt: skip
            ours = Tokenizer.load(folder)
            ours.save(folder.with_name("saved"))
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            again = transformers.AutoTokenizer.from_pretrained(folder.with_name("saved"))
            pairs[around, before] = ours, theirs, again
    return pairs


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("around", AROUND)
@given(text=TEXTS)
def test_a_prompt_becomes_the_ids_that_transformers_makes_of_it(opened, around, before, text):
    """The names of control tokens inside stay text, the template is put around it unless it is switched off."""
    ours, theirs, again = opened[around, before]
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.encode(text) == ids
    assert (
        ours.encode(text, add_special_tokens=False)
        == theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    )
    assert ours.encode(text, special=True) == theirs(text, split_special_tokens=False)["input_ids"]
    assert (
        again(text, split_special_tokens=True)["input_ids"] == ids
    )  # what was saved here means the same there
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("around", AROUND)
def test_an_empty_prompt_is_what_the_template_alone_gives(opened, around):
    ours, theirs, _ = opened[around, "bare"]
    assert ours.encode("") == ours.encode(b"") == ours.begin_ids + ours.end_ids == theirs("")["input_ids"]
    assert ours.encode("", add_special_tokens=False) == []


def test_a_llama_3_prompt_begins_with_the_begin_of_text(opened):
    ours, _, _ = opened["begin in a sequence", "llama 3"]
    assert ours.encode("a")[0] == ours.begin_ids[0] == ours.bos_id == 510
    assert ours.encode_batch(["a", ""]) == [ours.encode("a"), [510]]
    assert ours.encode_batch(["a"], add_special_tokens=False) == [ours.encode("a")[1:]]
    assert ours.encode(BEGIN).count(510) == 1
    bare = ours.without_template()
    assert (bare.encode("a"), bare.begin_ids, bare.bos_id) == (ours.encode("a")[1:], [], 510)


def test_training_data_is_the_text_alone(opened, tmp_path):
    ours, _, _ = opened["both", "bare"]
    text = SAMPLE[:5000]
    assert [i for piece in ours.encode_pieces(text) for i in piece] == ours.encode(
        text, add_special_tokens=False
    )
    train, held_out = prepare(text, ours, tmp_path)
    assert not {510, 511} & {*train[: len(train)].tolist(), *held_out[: len(held_out)].tolist()}


CONFIGS = [
    {"tokenizer_class": name} | extra
    for name in ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "PreTrainedTokenizerFast",
                 "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast", "NoSuchTokenizer")
    for extra in ({}, {"add_prefix_space": True}, {"add_prefix_space": False},
                  {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False})
]  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "gpt2", None])
@pytest.mark.parametrize("before", ["bare", "bare with space"])
def test_tokenizer_config_changes_what_it_changes_in_transformers(transformers, tmp_path, before, model_type):
    """add_prefix_space for the classes that ask it; add_bos_token and add_eos_token for none with a tokenizer.json."""
    for i, config in enumerate(CONFIGS):
        folder = write(
            tmp_path / str(i), config, pre_tokenizer=BEFORE[before], post_processor=template(BEGIN, "$A")
        )
        if model_type is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
        ours.save(folder / "saved")
        again = transformers.AutoTokenizer.from_pretrained(folder / "saved")
        for text in ("a b", " a", "12 a", "\na", ""):
            ids = theirs(text)["input_ids"]
            assert (ours.encode(text), again(text)["input_ids"]) == (ids, ids), config


def test_without_a_class_or_a_model_the_config_may_ask_for_a_space(tmp_path):
    for space, text in ((True, " a"), (False, "a"), (None, "a")):
        folder = write(tmp_path, {"add_prefix_space": space}, pre_tokenizer=byte_level())
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.decode(tokenizer.encode("a")) == text


@pytest.mark.parametrize(
    "config", [None, {}, {"add_prefix_space": True}, {"add_prefix_space": False}], ids=str
)
@pytest.mark.parametrize("before", ["bare", "bare with space"])
@pytest.mark.parametrize(
    "model",
    [
        # The classes of Gemma and GPT-1 make one anew that is no byte level and needs <unk>; transformers has no gpt3.
        *(
            {"model_type": name}
            for name in DECODERS
            if name not in ("gemma2", "gemma3_text", "openai-gpt", "gpt3")
        ),
        {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"},
    ],
    ids=str,
)
def test_where_no_class_is_named_it_is_that_of_the_model(transformers, tmp_path, model, before, config):
    """GPT-2's own tokenizer_config.json names none."""
    folder = write(tmp_path, config, pre_tokenizer=BEFORE[before], post_processor=template(BEGIN, "$A"))
    (folder / "config.json").write_text(json.dumps(model))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in ("a b", " a", "12 a", "\na", "it's", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("space", [False, True])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("named", ["by the tokenizer", "by the model"])
def test_the_class_of_qwen_2_cuts_and_normalizes_anew(transformers, tmp_path, named, before, space):
    """What the file says of that is not asked; its template stays."""
    config = {"add_prefix_space": space} | ({"tokenizer_class": "Qwen2Tokenizer"} if "tok" in named else {})
    folder = write(
        tmp_path / "in", config, pre_tokenizer=BEFORE[before], post_processor=template(BEGIN, "$A")
    )
    if "model" in named:
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    for text in ("a b", " a", "12 a", "a12b", "IT'S it's", "e\u0301", "a\n\n b", ""):
        assert ours.encode(text) == again.encode(text) == theirs(text)["input_ids"]


def test_the_class_of_gpt_neox_has_no_template(transformers, tmp_path):
    folder = write(
        tmp_path,
        {"tokenizer_class": "GPTNeoXTokenizer"},
        post_processor=template(BEGIN, "$A"),
        pre_tokenizer=byte_level(),
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.load(folder).encode("a b") == theirs("a b")["input_ids"]
    assert Tokenizer.load(folder).begin_ids == []


def test_a_config_that_is_no_answer_is_refused(tmp_path):
    for config in ({"add_prefix_space": "yes"}, {"tokenizer_class": 3}):
        with pytest.raises(FormatError, match=r"tokenizer_config\.json: .* true or false"):
            Tokenizer.load(write(tmp_path, config))


def test_a_space_before_the_text_is_decoded_as_it_was_encoded():
    """The ids stand for bytes, and one of them is the space: encode adds it, decode does not take it away."""
    tokenizer = Tokenizer(Tokenizer(_file(BEFORE["bare with space"]))._file)
    for text, back in (("a b", " a b"), (" a b", " a b"), ("\na", " \na"), ("", "")):
        assert tokenizer.decode(tokenizer.encode(text)) == back


def test_a_long_text_gets_one_space_at_its_beginning():
    tokenizer = Tokenizer(_file(BEFORE["bare with space"]))
    for text in (SAMPLE * 10, "漢字。\n" * 40_000):
        library = tokenizer._library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == library
        assert tokenizer.decode(library) == f" {text}"


def _file(pre_tokenizer):
    from portlm.tokenizer_file import parse

    return parse(BASE | {"pre_tokenizer": pre_tokenizer}, "x")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """A tokenizer of SmolLM2's form: learned from text alone, so that bytes which it lacks have no token."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|im_start|>"], show_progress=False
    )
    learner.train_from_iterator([SAMPLE, "é漢字"], trainer)
    folder = tmp_path_factory.mktemp("smollm")
    learner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return folder


def test_a_byte_level_tokenizer_may_lack_bytes(transformers, smollm):
    ours, theirs = Tokenizer.load(smollm), transformers.AutoTokenizer.from_pretrained(smollm)
    assert 0 < ours._ids_of_byte.count(None) < 256
    for text in (SAMPLE, "x = 10\n\n  20", "é 漢字", "", "<|endoftext|>"):
        ids = ours.encode(text)
        assert ids == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ids) == text
        assert ours.encode(text.encode()) == ids


def test_a_byte_without_a_token_is_an_error_that_names_it(smollm):
    """The library leaves it out without a word, and the model would answer another text."""
    tokenizer = Tokenizer.load(smollm)
    assert tokenizer._library.encode("a\x07b", add_special_tokens=False).ids == tokenizer.encode("ab")
    for text, byte in (
        ("a\x07b", 0x07),
        ("ß", 0x9F),
        (b"a\xff", 0xFF),
        (b"\x00", 0),
        ("x" * 99 + "\x1b", 0x1B),
    ):
        with pytest.raises(
            UsageError, match=f"no token for the byte 0x{byte:02x}, which the text holds near"
        ):
            tokenizer.encode(text)


def test_a_tokenizer_without_merges_may_lack_bytes():
    from portlm.tokenizer_file import parse

    document = json.loads(json.dumps(BASE)) | {"added_tokens": []}
    document["model"] |= {"vocab": {"a": 0, "b": 1}, "merges": []}
    tokenizer = Tokenizer(parse(document, "x"))
    assert (tokenizer.encode("ab"), tokenizer.vocab_size) == ([0, 1], 2)
    with pytest.raises(UsageError, match="0x63"):
        tokenizer.encode("abc")


def test_control_tokens_that_a_model_lacks_are_taken_away_where_text_needs_none(opened):
    ours, _, _ = opened["none", "llama 3"]
    assert ours.within(512) is ours
    for size, special, ends in ((511, {BEGIN: 510}, (510, None)), (510, {}, (None, None))):
        smaller = ours.within(size)
        assert (smaller.vocab_size, smaller.special) == (size, special)
        assert (smaller.bos_id, smaller.eos_id) == ends
        assert smaller.encode(SAMPLE) == ours.encode(SAMPLE)
        assert smaller.encode(END, special=True) == ours.encode(END)
    for kind, size in (("none", 509), ("begin", 510), ("end", 511), ("both", 511)):
        with pytest.raises(
            FormatError, match=rf"has 512 tokens and the model {size}, and text becomes some of the others"
        ):
            opened[kind, "llama 3"][0].within(size)
    assert opened["begin", "llama 3"][0].within(511).begin_ids == [510]


def test_a_control_token_with_an_entry_in_the_vocabulary_can_be_taken_away(smollm, tmp_path):
    """Trainers put control tokens first; a [PAD] that was added comes last, in the vocabulary or not."""
    document = json.loads((smollm / "tokenizer.json").read_text())
    document["added_tokens"].append(BASE["added_tokens"][0] | {"id": 600, "content": "[PAD]"})
    document["model"]["vocab"]["[PAD]"] = 600
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert "[PAD]" in Tokenizer.load(tmp_path).special
    smaller = Tokenizer.load(tmp_path).within(600)
    assert "[PAD]" not in smaller.special
    assert smaller.decode(smaller.encode("[PAD]")) == "[PAD]"
