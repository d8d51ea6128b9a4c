import copy
import json
import re
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portlm.errors import FormatError, UsageError
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe
from portlm.tokenizer_file import BYTE_TO_CHAR, MAX_FILE_BYTES, parse
from portlm.tokenizer_steps import SPLIT_PATTERNS

BPE = train_bpe(["the theme of the thesis then " * 4], 264)
MERGED = BPE.token_bytes(256).decode()  # the first token that training made
GOOD = json.loads(BPE.to_json())
LLAMA_SPLIT = next(iter(SPLIT_PATTERNS))


def edited(*path, value):
    """A copy of the good file with one place changed, or removed when the value is `...`."""
    document = copy.deepcopy(GOOD)
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def added(**changes):
    token = {"id": 264, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    return edited("added_tokens", value=[*GOOD["added_tokens"], token | changes])


def template(**changes):
    entry = {"id": END_OF_TEXT, "ids": [263], "tokens": [END_OF_TEXT]}
    token, a, b = (
        {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
        *({"Sequence": {"id": x, "type_id": 0}} for x in "AB"),
    )
    value = {"type": "TemplateProcessing", "single": [token, a], "pair": [token, a, b],
             "special_tokens": {END_OF_TEXT: entry}}  # fmt: skip
    return edited("post_processor", value=value | changes)


def vocab(**changes):
    return edited(
        "model", "vocab", value={k: v for k, v in (GOOD["model"]["vocab"] | changes).items() if v is not ...}
    )


def pre(*steps):
    return edited("pre_tokenizer", value={"type": "Sequence", "pretokenizers": list(steps)})


BYTE_LEVEL = GOOD["pre_tokenizer"]
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA_SPLIT}, "behavior": "Isolated", "invert": False}

REFUSED = {
    "null": None,
    "list": [GOOD],
    "empty": {},
    "extra key": edited("extra", value=1),
    "version": edited("version", value="2.0"),
    "no version": edited("version", value=...),
    "truncation list": edited("truncation", value=[]),
    "normalizer list": edited("normalizer", value=[]),
    "charsmap": edited("normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "no decoder": edited("decoder", value=None),
    "other decoder": edited("decoder", value={"type": "WordPiece"}),
    "decoder key": edited("decoder", "x", value=1),
    # the model
    "no model": edited("model", value=...),
    "unigram": edited("model", "type", value="Unigram"),
    "dropout": edited("model", "dropout", value=0.1),
    "prefix": edited("model", "continuing_subword_prefix", value="##"),
    "suffix": edited("model", "end_of_word_suffix", value="</w>"),
    "unk": edited("model", "unk_token", value=3),
    "byte fallback": edited("model", "byte_fallback", value=True),
    "ignore merges 1": edited("model", "ignore_merges", value=1),
    "model key": edited("model", "x", value=1),
    # the vocabulary
    "vocab list": edited("model", "vocab", value=[]),
    "vocab empty": edited("model", "vocab", value={}),
    "a byte missing leaves a gap": vocab(a=...),
    "empty token": vocab(**{"": 264}),
    "long token": vocab(**{"a" * 4097: 264}),
    "foreign token": vocab(**{"漢": 264}),
    "id twice": vocab(aa=5),
    "id of the end": vocab(aa=263),
    "gap": vocab(aa=265),
    **{f"id {v!r}": vocab(aa=v) for v in (-1, 2**20, 2**31, 2**32, 2**63, 2**64, 264.0, True, "264", None, [])},
    # merges
    "merges null": edited("model", "merges", value=None),
    "merge longer than any token": edited("model", "merges", value=[["the", "the"]]),
    "merge of unknown": edited("model", "merges", 0, value=["漢", "t"]),
    "merge of three": edited("model", "merges", 0, value="t h e"),
    "merge of one": edited("model", "merges", 0, value=["th"]),
    "merge of numbers": edited("model", "merges", 0, value=[1, 2]),
    "merge empty": edited("model", "merges", 0, value=["", "t"]),
    "merge twice": edited("model", "merges", value=[GOOD["model"]["merges"][0]] * 2),
    # added tokens
    "added null": edited("added_tokens", value=None),
    "added text": edited("added_tokens", value=["<x>"]),
    "too many added": edited("added_tokens", value=[GOOD["added_tokens"][0]] * 1025),
    "added key": added(x=1),
    "added empty": added(content=""),
    "added long": added(content="x" * 257),
    "added number": added(content=3),
    "added twice": added(content=END_OF_TEXT, id=263),
    "added gap": added(id=265),
    "added id taken": added(id=5),
    "added id text": added(id="264"),
    "added id true": added(id=True),
    "added flag": added(special=1),
    "other id in vocab": added(content="a"),
    "two meanings": edited("added_tokens", value=[*GOOD["added_tokens"], GOOD["added_tokens"][0]
                    | {"id": BYTE_TO_CHAR.index("Ġ"), "content": "Ġ", "special": False}]),
    "control byte": edited("added_tokens", 0, value=GOOD["added_tokens"][0] | {"id": 97, "content": "a"}),
    "control merge": edited("added_tokens", value=[*GOOD["added_tokens"], GOOD["added_tokens"][0]
                     | {"id": 256, "content": MERGED}]),
    # cutting words
    "no pre-tokenizer": edited("pre_tokenizer", value=None),
    "fixed length 0": edited("pre_tokenizer", value={"type": "FixedLength", "length": 0}),
    "byte level first": pre(BYTE_LEVEL, SPLIT),
    "byte level twice": pre(BYTE_LEVEL, BYTE_LEVEL),
    "no byte level": pre(SPLIT),
    "no steps": pre(),
    "many steps": pre(SPLIT, SPLIT, SPLIT, SPLIT, BYTE_LEVEL),
    "nested": pre({"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}),
    "steps object": edited("pre_tokenizer", value={"type": "Sequence", "pretokenizers": {"a": 1}}),
    "prefix space text": edited("pre_tokenizer", "add_prefix_space", value="yes"),
    "regex text": edited("pre_tokenizer", "use_regex", value="yes"),
    "slow pattern": pre(SPLIT | {"pattern": {"Regex": "(a+)+$"}}, BYTE_LEVEL),
    "pattern string": pre(SPLIT | {"pattern": {"String": "a"}}, BYTE_LEVEL),
    "pattern list": pre(SPLIT | {"pattern": {"Regex": []}}, BYTE_LEVEL),
    "removed": pre(SPLIT | {"behavior": "Removed"}, BYTE_LEVEL),
    "inverted": pre(SPLIT | {"invert": True}, BYTE_LEVEL),
    # what transformers puts around
    "post unknown": edited("post_processor", value={"type": "BertProcessing"}),
    "post text": edited("post_processor", value="ByteLevel"),
    "post nested": edited("post_processor", value={"type": "Sequence",
                   "processors": [{"type": "Sequence", "processors": [{"type": "ByteLevel"}]}]}),
    "post null step": edited("post_processor", value={"type": "Sequence", "processors": [None]}),
    "two templates": edited("post_processor", value={"type": "Sequence",
                     "processors": [template()["post_processor"]] * 2}),
    "template names a missing token": template(single=[{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                                                       {"Sequence": {"id": "A", "type_id": 0}}]),
    "template without declaration": template(special_tokens={}),
    "template with other id": template(special_tokens={
        END_OF_TEXT: {"id": END_OF_TEXT, "ids": [1], "tokens": [END_OF_TEXT]}}),
    "template with foreign token": template(special_tokens={"a": {"id": "a", "ids": [97], "tokens": ["a"]}}),
    "template loses the text": template(single=[{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}]),
    "template of the text twice": template(single=[{"Sequence": {"id": "A", "type_id": 0}}] * 2),
    "template of one text in pair": template(pair=[{"Sequence": {"id": "A", "type_id": 0}}]),
    "template of C": template(single=[{"Sequence": {"id": "C", "type_id": 0}}]),
    "template piece": template(single=[{"Sequence": {"id": "A"}}]),
    "template type": template(single=[{"Sequence": {"id": "A", "type_id": -1}}]),
    "template list": template(single="$A"),
    "template empty": template(single=[]),
    "template special list": template(special_tokens=[]),
}  # fmt: skip


@pytest.mark.parametrize("document", REFUSED.values(), ids=REFUSED.keys())
def test_a_malformed_file_is_refused_in_one_line(tmp_path, document):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).isprintable()


def test_the_good_file_and_its_allowed_variants_are_accepted():
    for document in (
        GOOD,
        template(),
        added(),
        added(special=False),
        added(lstrip=True),
        edited("post_processor", value={"type": "ByteLevel", "trim_offsets": False}),
        edited("post_processor", value={"type": "Sequence", "processors": []}),
        edited("normalizer", value={"type": "Sequence", "normalizers": []}),
        edited("model", "merges", value=[" ".join(pair) for pair in GOOD["model"]["merges"]]),
        edited("model", "type", value=...),
        edited("model", "unk_token", value=END_OF_TEXT),
        edited("model", "continuing_subword_prefix", value=""),
        edited(
            "truncation",
            value={"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        ),
        edited("padding", value={"strategy": {"Fixed": 9}}),
        edited("decoder", value={"type": "ByteLevel"}),
        pre(SPLIT, BYTE_LEVEL),
        pre({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
        edited("model", "ignore_merges", value=True),
    ):
        tokenizer = Tokenizer(parse(document, "x"))
        ids = tokenizer.encode("the thesis <x> <|endoftext|> \U0001f600", add_special_tokens=False)
        assert tokenizer.decode(ids) == "the thesis <x> <|endoftext|> \U0001f600"
        # what is written again opens in the library itself, with the same ids
        library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        library.encode_special_tokens = True
        text = "the thesis <x>"
        assert library.encode(text).ids == tokenizer.encode(text)
        assert parse(json.loads(tokenizer.to_json()), "x") == tokenizer._file


def test_added_tokens_that_are_no_control_tokens_are_found_in_text():
    tokenizer = Tokenizer(parse(added(special=False), "x"))
    assert tokenizer.encode("a<x>b") == [97, 264, 98]
    assert tokenizer.decode([97, 264, 98], skip_special=True) == "a<x>b"
    assert Tokenizer(parse(added(), "x")).encode("a<x>b") == [97, *b"<x>", 98]


def test_truncation_in_a_file_truncates_nothing():
    document = edited(
        "truncation", value={"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    )
    assert Tokenizer(parse(document, "x")).encode("abcdef") == list(b"abcdef")


def test_the_byte_alphabet_is_that_of_the_library():
    assert sorted(BYTE_TO_CHAR) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    word = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):
        assert word.pre_tokenize_str(chr(byte))[0][0] == BYTE_TO_CHAR[byte]
    assert word.pre_tokenize_str("é")[0][0] == "".join(BYTE_TO_CHAR[b] for b in "é".encode())


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(PanicException("index out\nof bounds"), FormatError), (Exception("bad"), FormatError),
     (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["panic", "exception", "interrupt"],
)  # fmt: skip
def test_a_panic_of_the_library_becomes_a_format_error(monkeypatch, raised, expected):
    class Panicking:
        @staticmethod
        def from_str(text):
            raise raised

    monkeypatch.setattr(tokenizers, "Tokenizer", Panicking)
    with pytest.raises(expected) as caught:
        Tokenizer(parse(GOOD, "x"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_or_no_json_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    for raw in (b"", b"\x80\x02}q\x00.", b'{"model": {}, "model": {}}', b"[" * 10_000, b"NaN"):
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    monkeypatch.setattr("portlm.tokenizer.MAX_FILE_BYTES", 1000)
    byte_tokenizer().save(tmp_path)
    with pytest.raises(FormatError, match="larger than the 1000 bytes"):
        Tokenizer.load(path)
    with pytest.raises(FormatError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")


OTHER_KINDS = {
    "a tokenizer of the kind 'Morse'": {"model": {"type": "Morse"}},
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_a_tokenizer_of_another_kind_is_refused_by_its_name(tmp_path, what):
    document = GOOD | {"normalizer": None, "pre_tokenizer": None} | copy.deepcopy(OTHER_KINDS[what])
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FormatError) as caught:
        Tokenizer.load(tmp_path)
    assert f"this is {what}, and portlm reads BPE, WordPiece, WordLevel and Unigram only" in str(caught.value)


def test_a_normalizer_is_refused_by_its_name():
    for value in ({"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}):
        with pytest.raises(FormatError, match=r"the normalizer .*'NFC'.* rewrites text"):
            parse(edited("normalizer", value=value), "x")


def test_a_large_file_of_empty_objects_is_refused_before_they_are_made(tmp_path):
    """Each would take a hundred bytes and a call: 13 s and 1.7 GB for the whole file."""
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.write(b'{"added_tokens": [' + b"{}," * (MAX_FILE_BYTES // 3 - 10) + b"{}]}")
    code = (
        "import resource, sys\n"
        "from portlm.errors import FormatError\n"
        "from portlm.tokenizer import Tokenizer\n"
        "before = resource.getrusage(resource.RUSAGE_SELF)\n"
        "try: Tokenizer.load(sys.argv[1])\n"
        "except FormatError as error: print(error)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print((after.ru_maxrss - before.ru_maxrss) // 1024, after.ru_utime - before.ru_utime)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    message, figures = done.stdout.splitlines()
    assert message.endswith("holds more than the 5242880 JSON values allowed for it")
    mebibytes, seconds = map(float, figures.split())
    assert mebibytes < 100  # the file itself is 64
    assert seconds < 5


SCALARS = st.none() | st.booleans() | st.integers(-2, 2**33) | st.floats() | st.text(max_size=3)
REPLACEMENTS = st.one_of(
    SCALARS,
    st.sampled_from(["ByteLevel", "BPE", "Sequence", "a", "th", END_OF_TEXT, "<x>", 0, 97, 262, 263, 264]),
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from(["type", "id", "content", "vocab", "Regex"]), SCALARS, max_size=2),
    st.sampled_from([BYTE_LEVEL, SPLIT, GOOD["added_tokens"][0], GOOD["model"]["merges"][0]]),
)


def mutate(data, value):
    """Descend to a random place and replace, remove, copy or rename what is there."""
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(value[key], dict | list) and value[key] and data.draw(st.booleans()):
            value = value[key]
            continue
        action = data.draw(st.sampled_from(["replace", "remove", "copy", "rename"]))
        if action == "replace":
            value[key] = copy.deepcopy(data.draw(REPLACEMENTS))  # the next mutation may go into it
        elif action == "remove":
            del value[key]
        elif action == "copy":
            value[key] = copy.deepcopy(value[data.draw(st.sampled_from(keys))])
        elif isinstance(value, dict):
            value[data.draw(st.sampled_from(["a", "th", "<x>", "aa", "type", "漢"]))] = value.pop(key)
        return


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_mutated_file_is_refused_or_keeps_every_promise(data):
    document = copy.deepcopy(
        data.draw(st.sampled_from([GOOD, template(), added(special=False), pre(SPLIT, BYTE_LEVEL)]))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data, document)
    try:
        tokenizer = Tokenizer(parse(document, "x"))
    except FormatError as error:
        message = str(error)
    else:
        message = ""
        tokenizers.Tokenizer.from_str(tokenizer.to_json())
        raw = b"the <x> <|endoftext|> th aa \xff \xf0\x9f\x98\x80"
        try:
            ids = tokenizer.encode(raw, add_special_tokens=False)
        except UsageError as error:
            message = str(error)
            assert re.search("no token for the byte 0x", message)
        else:
            back = tokenizer.decode_bytes(ids)
            if tokenizer._file.prefixed:
                raw, back = raw.replace(b" ", b""), back.replace(b" ", b"")
            assert back == raw
            assert not set(tokenizer.special.values()) & set(ids)
    assert "\n" not in message
