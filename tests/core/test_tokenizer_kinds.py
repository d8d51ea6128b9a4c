"""Tokenizers of every kind against the library that defines them: ids, text, and text as it grows."""

import base64
import collections
import itertools
import json
import os
import random
import re

import numpy as np
import pytest
import tokenizer_files
import tokenizers

from portlm.errors import FormatError, UsageError
from portlm.text_tokenizer import TextTokenizer, train_words
from portlm.tokenizer import Tokenizer
from portlm.tokenizer_charsmap import check_charsmap
from portlm.tokenizer_kinds import parse_text

COUNT = int(os.environ.get("PORTLM_TEXTS", "500"))  # 100000 is the figure to run by hand; it takes minutes
KINDS = tokenizer_files.KINDS


def without_pieces(text, ours):
    """The text without the names of control tokens, which the library's Unigram makes of it (see below)."""
    for name in ours.special:
        text = text.replace(name, "|")
    return text


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each kind, opened here and by the library."""
    pairs = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("kind")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_files.document(kind)))
        pairs[kind] = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return pairs


def read(document, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_the_library(opened, kind):
    """With control tokens found in text, and with their names as text; whole, and streamed."""
    ours, theirs = opened[kind]
    for special in (False, True):
        theirs.encode_special_tokens = not special
        for text in tokenizer_files.texts(COUNT, seed=special):
            text = text if special or not kind.startswith("t5") else without_pieces(text, ours)
            ids = ours.encode(text, special=special)
            assert ids == theirs.encode(text).ids, text
            for skip in (False, True):
                whole = theirs.decode(ids, skip_special_tokens=skip) if ids else ""
                assert ours.decode(ids, skip_special=skip) == whole, text
                decoder = ours.stream_decoder(skip)
                assert "".join([*map(decoder.push, ids), decoder.finish()]) == whole, text


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_are_written_as_the_library_writes_them(opened, kind):
    """A model may choose ids that no text has: bytes that are no character, pieces in the wrong place."""
    ours, theirs = opened[kind]
    draw = random.Random(1)
    bytes_of = [i for i in range(ours.vocab_size) if (theirs.id_to_token(i) or "").startswith("<0x")]
    for _ in range(COUNT):
        pool = draw.choice([range(ours.vocab_size), bytes_of or range(ours.vocab_size), range(300)])
        ids = [draw.choice(pool) for _ in range(draw.choice((1, 2, 5, 12)))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), ids
        decoder = ours.stream_decoder()
        pieces = [decoder.push(index) for index in ids]
        rest = decoder.finish()
        assert "".join([*pieces, rest]) == ours.decode(ids)
        assert decoder.push(ids[0]) + decoder.finish() == ours.decode(ids[:1])  # it begins anew


@pytest.mark.parametrize("kind", ["llama 2", "gemma", "t5 with bytes", "qwen 2"])
def test_half_a_character_is_never_shown(opened, kind):
    ours, _ = opened[kind]
    text = "a 漢 \U0001f9ff b"
    ids = ours.encode(text, add_special_tokens=False)
    assert len(ids) > len(text) or kind == "qwen 2" or kind == "t5 with bytes"
    decoder = ours.stream_decoder()
    assert "\ufffd" not in "".join([*map(decoder.push, ids), decoder.finish()])


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("gpt2", "llama 3")])
def test_text_never_becomes_a_control_token(opened, kind):
    """Unigram and WordPiece know them as pieces, which ordinary text could spell."""
    ours, _ = opened[kind]
    assert isinstance(ours, TextTokenizer)
    control = set(ours.special.values()) - {ours.unknown_id}
    for name in ours.special:
        for text in (name, f" {name} ", f"a{name}b", f"\u2581{name}", f"  {name}", name * 3):
            assert not control & set(ours.encode(text, add_special_tokens=False)), text
            if name != "<mask>" and ours.special[name] != ours.unknown_id:
                assert ours.special[name] in ours.encode(text, special=True, add_special_tokens=False)


def test_the_name_of_a_piece_would_have_become_one(opened):
    """The promise above is no accident: the library alone breaks it."""
    _, theirs = opened["t5"]
    theirs.encode_special_tokens = True
    assert theirs.token_to_id("<extra_id_0>") in theirs.encode("<extra_id_0>").ids


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_their_types_are_those_of_the_library(opened, kind):
    ours, theirs = opened[kind]
    theirs.encode_special_tokens = True
    texts = [without_pieces(text, ours) for text in tokenizer_files.texts(60, seed=5)]
    for one, other in zip(texts, reversed(texts), strict=True):
        pair, single = theirs.encode(one, other), theirs.encode(one)
        assert ours.encode_typed(one, other) == (pair.ids, pair.type_ids)
        assert ours.encode_typed(one) == (single.ids, single.type_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_same_tokenizer(opened, kind, tmp_path):
    ours, _ = opened[kind]
    ours.save(tmp_path)
    again, library = (
        Tokenizer.load(tmp_path),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    library.encode_special_tokens = True
    assert again.sha256 == ours.sha256
    for text in tokenizer_files.texts(40, seed=9):
        text = without_pieces(text, ours)
        assert ours.encode(text) == again.encode(text) == library.encode(text).ids
    bare = ours.without_template()
    assert (bare.begin_ids, bare.end_ids) == ([], [])
    assert bare.encode("a b") == ours.encode("a b", add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_gives_the_ids_of_the_whole(opened, kind):
    """Where text may be cut, the cut does not show; elsewhere it is not cut."""
    ours, theirs = opened[kind]
    theirs.encode_special_tokens = True
    text = without_pieces("  ".join(tokenizer_files.texts(4500, seed=3)) + tokenizer_files.SAMPLE, ours)
    pieces = list(ours.encode_pieces(text))
    assert list(itertools.chain(*pieces)) == theirs.encode(text, add_special_tokens=False).ids
    assert (len(pieces) > 1) == (
        kind in ("gpt2", "llama 3", "qwen 2", "gpt-neox", "bert", "bert, cased", "gpt", "words")
    )


def test_what_is_no_text_is_refused_and_not_replaced(opened):
    for kind in ("llama 2", "bert", "t5", "qwen 2"):
        for bad in (b"a\xff", "a\udcff", "\ud800"):
            with pytest.raises(UsageError, match="only a byte-level tokenizer takes any bytes"):
                opened[kind][0].encode(bad)
        assert opened[kind][0].encode("é".encode()) == opened[kind][0].encode("é")
    with pytest.raises(UsageError, match="outside the vocabulary"):
        opened["bert"][0].decode([10**6])


def test_control_tokens_that_a_model_lacks_are_taken_away(opened):
    for kind in ("llama 2", "t5", "qwen 2"):
        ours = opened[kind][0]
        names = sorted(ours.special.items(), key=lambda item: item[1])
        last = names[-1][1]
        if last != ours.vocab_size - 1:
            with pytest.raises(FormatError, match="text becomes some of the others"):
                ours.within(ours.vocab_size - 1)
            continue
        smaller = ours.within(last)
        assert (smaller.vocab_size, smaller.special) == (last, dict(names[:-1]))
        assert smaller.encode("some words") == ours.encode("some words")
        with pytest.raises(FormatError, match="text becomes some of the others"):
            ours.within(300)


BROKEN = {
    "bert": [
        (("model", "unk_token"), "[NONE]", "unk_token is"),
        (("model", "max_input_chars_per_word"), 0, "max_input_chars"),
        (("model", "continuing_subword_prefix"), None, "continuing_subword_prefix"),
        (("pre_tokenizer",), {"type": "WhitespaceSplit"}, "BertPreTokenizer alone"),
        (("normalizer", "lowercase"), "yes", "lowercase is"),
        (("normalizer", "strip_accents"), 1, "strip_accents is"),
        (("normalizer",), {"type": "Rot13"}, "normalizer 'Rot13' is none of"),
        (("decoder", "cleanup"), 3, "cleanup is"),
        (("decoder",), {"type": "CTC"}, "decoder 'CTC'"),
        (("added_tokens", 0, "id"), 4, "has two ids"),
        (("post_processor", "special_tokens", "[CLS]", "ids"), [4], "not the control token of that name"),
        (("post_processor",), {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 2]}, "not the control"),
    ],
    "t5": [
        (("model", "unk_id"), 10**6, "unk_id is"),
        (("model", "vocab", 5, 1), "0", "score"),
        (("model", "vocab", 5, 0), "<pad>", "listed twice"),
        (("model", "vocab", 5), ["a"], "not a text and its score"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "Metaspace alone"),
        (("pre_tokenizer", "replacement"), "ab", "Metaspace replaces"),
        (("pre_tokenizer", "prepend_scheme"), "often", "prepend_scheme is"),
        (("normalizer", "normalizers", 0, "precompiled_charsmap"), "AAAA", "charsmap is cut short"),
        (("normalizer", "normalizers", 0, "precompiled_charsmap"), None, "must be base64"),
        (("normalizer", "normalizers", 0, "precompiled_charsmap"), "%%", "no base64"),
        (("normalizer", "normalizers", 2, "pattern", "Regex"), "(a+)+$", "could take for ever"),
        (("normalizer", "normalizers"), [{"type": "NFC"}] * 17, "more than 16 steps"),
    ],
    "words": [
        (("model", "unk_token"), "[NONE]", "unk_token is '\\[NONE\\]', which is not in vocab"),
        (("model", "unk_token"), None, "unk_token is None"),
        (("model", "vocab", "the"), 1, "id 1 is given twice"),
        (("model", "fuse_unk"), True, "model has the unknown entry 'fuse_unk'"),
        (("pre_tokenizer",), {"type": "Digits"}, "WordLevel is read with one of the pre-tokenizers BertPre"),
    ],
    "llama 2": [
        (("model", "dropout"), 0.1, "other ids each time"),
        (("model", "unk_token"), "<none>", "not in vocab"),
        (("model", "merges", 0), ["<", "s>"], "needs a token that is not in vocab"),
        (("decoder", "decoders"), [{"type": "Fuse"}, {"type": "ByteFallback"}], "in this order"),
        (("decoder", "decoders", 3, "stop"), 1, "from the beginning"),
        (("decoder", "decoders", 2), {"type": "Metaspace"}, "alone or in its place"),
        (("decoder",), {"type": "ByteLevel"}, "must be the last pre-tokenizer"),
        (("normalizer", "normalizers", 0, "prepend"), "", "prepend is"),
    ],
    "qwen 2": [
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "(a|a)*b", "could take for ever"),
        (("pre_tokenizer", "pretokenizers", 0, "behavior"), "Sometimes", "behavior is"),
        (("model", "byte_fallback"), True, "no byte_fallback"),
        (("decoder",), None, "must be the last pre-tokenizer"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [(kind, *case) for kind, cases in BROKEN.items() for case in cases],
    ids=str,
)
def test_a_broken_file_is_refused_by_what_is_wrong(kind, place, value, message, tmp_path):
    document = tokenizer_files.document(kind)
    part = document
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(FormatError, match=message) as caught:
        read(document, tmp_path)
    assert str(caught.value).isprintable()


def test_tokens_that_the_library_would_number_otherwise_are_refused(tmp_path):
    """It counts them in the order of the file, whatever their ids are there."""
    document = tokenizer_files.document("qwen 2")
    first, second = document["added_tokens"][-2:]
    first["id"], second["id"] = second["id"], first["id"]
    with pytest.raises(FormatError, match="'<tool>' is listed after one with a larger id"):
        read(document, tmp_path)


def test_merges_that_lead_to_a_control_token_are_refused(tmp_path):
    document = tokenizer_files.document("llama 2")
    left, right = document["model"]["merges"][0]
    document["added_tokens"].append(
        tokenizer_files.token(left + right, document["model"]["vocab"][left + right])
    )
    with pytest.raises(FormatError, match="ordinary text could become the control token"):
        read(document, tmp_path)


def test_a_character_map_stays_inside_itself():
    """Every bit of a small map turned: what passes the check, the library can walk with any text."""
    good = tokenizer_files.charsmap({"ﬁ": "fi", "a": "é"})
    raw = bytearray(base64.b64decode(good))
    assert check_charsmap(good, "x") == good
    document = tokenizer_files.document("t5")
    used = [4 * i for i, unit in enumerate(np.frombuffer(bytes(raw[4:]), "<u4", (len(raw) - 4) // 4)) if unit]
    places = [
        0,
        1,
        2,
        3,
        *(4 + place + byte for place in used for byte in range(4)),
        *range(len(raw) - 6, len(raw)),
    ]
    refused = passed = 0
    for place in places:
        for bit in range(8):
            bad = bytearray(raw)
            bad[place] ^= 1 << bit
            value = base64.b64encode(bad).decode()
            try:
                check_charsmap(value, "x")
            except FormatError:
                refused += 1
                continue
            passed += 1
            document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": value}
            library = tokenizers.normalizers.Normalizer
            normalizer = tokenizers.Tokenizer.from_str(json.dumps(document)).normalizer
            assert isinstance(normalizer, library)
            normalizer.normalize_str("aﬁ é 漢" + "".join(map(chr, range(256))))
    assert min(refused, passed) > 20


def test_a_file_keeps_its_kind_through_a_mutation_or_is_refused():
    """Random damage: an error in one line, or a tokenizer that the library accepts."""
    draw, messages = random.Random(7), []
    values = [
        None,
        True,
        0,
        -1,
        2**40,
        1.5,
        "",
        "a",
        [],
        {},
        [[]],
        {"type": "Sequence"},
        {"type": "NFC"},
        "ByteLevel",
    ]
    for kind in ("bert", "t5", "llama 2", "qwen 2", "gpt", "roberta", "words"):
        for _ in range(60):
            document = tokenizer_files.document(kind)
            place = document
            while True:
                key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.2:
                    break
                place = place[key]
            place[key] = draw.choice(values)
            if not isinstance(document.get("model"), dict) or document["model"].get("type") not in (
                "BPE",
                "WordPiece",
                "WordLevel",
                "Unigram",
            ):
                continue
            try:
                file = parse_text(document, "x")
                tokenizer = TextTokenizer(file)
            except FormatError as error:
                messages.append(str(error))
            else:
                tokenizers.Tokenizer.from_str(tokenizer.to_json())
                tokenizer.decode(tokenizer.encode("some text, with words </s> 漢"))
    assert len(messages) > 100
    assert all(message.isprintable() for message in messages)


def test_words_are_counted_and_numbered_by_how_often_they_stand_there(tmp_path):
    """By a count in Python; equally frequent ones follow in the order of their characters."""
    text = "the cat, the dog. The cat saw; the dog saw the Cat!\nthe end " * 3
    wanted = collections.Counter(re.findall(r"\w+|[^\w\s]+", text))
    order = sorted(wanted, key=lambda word: (-wanted[word], word))
    tokenizer = train_words([text], len(order) - 1)
    names = [tokenizer.token_name(i) for i in range(tokenizer.vocab_size)]
    assert names == ["[UNK]", *order[: len(order) - 2]]
    assert (tokenizer.unknown_id, tokenizer.eos_id) == (0, None)
    ids = tokenizer.encode("the cat saw a unicorn")
    assert tokenizer.decode(ids) == "the cat saw [UNK] [UNK]"
    assert tokenizer.encode("[UNK]") == [0, 0, 0]
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256 == train_words([text], len(order) - 1).sha256


def test_a_vocabulary_of_words_that_the_text_does_not_have_is_refused():
    with pytest.raises(UsageError, match=r"which is 3 with \[UNK\]: ask for at most 3"):
        train_words(["a b a"], 4)
    with pytest.raises(UsageError, match="a vocabulary of 1 words is not possible"):
        train_words(["a b a"], 1)
    with pytest.raises(UsageError, match="no Unicode"):
        train_words(["a \ud800"], 2)
