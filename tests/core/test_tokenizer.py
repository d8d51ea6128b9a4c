import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from portlm import text_pieces
from portlm.data.python_topics import python_topics
from portlm.errors import FormatError, StorageError, UsageError
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe
from portlm.tokenizer_file import TokenizerFile
from portlm.tokenizer_steps import SPLIT_PATTERNS, byte_level

LLAMA_SPLIT = next(iter(SPLIT_PATTERNS))
SAMPLE = python_topics()[:30_000]
BPE = train_bpe([SAMPLE, "é漢字漢字\U0001f600\U0001f600 naïve naïve 漢字"], 512)


def recut(pre_tokenizer: dict) -> Tokenizer:
    """The same vocabulary behind another way to cut words."""
    file = BPE._file
    return Tokenizer(
        TokenizerFile(file.vocab, file.merges, False, pre_tokenizer, file.special, {}), eos=END_OF_TEXT
    )


TOKENIZERS = {
    "bpe": BPE,
    "bytes": byte_tokenizer(),
    "bytes with end": byte_tokenizer(END_OF_TEXT),
    "llama 3": recut(
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA_SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level(use_regex=False),
            ],
        }
    ),
    "smollm": recut(
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level()]}
    ),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
# Text dense in what the cutting patterns tell apart, and in the name of the control token.
TRICKY = st.lists(
    st.sampled_from(
        [
            *"ab1'. \n\r\t\u00a0\u3000\u2028\x1c\u200b\x00é漢\u0301Ⅻ\ufffdĠ\U0001f600",
            *("'ll", "12345", "   ", "\r\n", "<|endoftext|>", "<|", "endoftext", "|>"),
        ]
    ),
    max_size=30,
).map("".join)
ANY_BYTES = st.lists(st.binary(max_size=8) | TRICKY.map(str.encode), max_size=6).map(b"".join)


@every_tokenizer
@given(text=UNICODE | TRICKY)
def test_text_in_is_text_out(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode(text.encode())
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)


@every_tokenizer
@given(raw=ANY_BYTES)
@example(raw=bytes(range(256)))
@example(raw=b"\xed\xa0\x80 a surrogate, \xc0\x80 overlong, \xf4\x90\x80\x80 too large, \xe2\x82 cut")
def test_any_bytes_in_are_bytes_out(tokenizer, raw):
    ids = tokenizer.encode(raw)
    assert tokenizer.decode_bytes(ids) == raw
    assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")
    assert tokenizer.decode_bytes(np.array(ids, np.uint16)) == raw


@every_tokenizer
@given(text=TRICKY)
@example(text=END_OF_TEXT)
def test_text_never_becomes_a_control_token(tokenizer, text):
    control = set(tokenizer.special.values())
    assert control.isdisjoint(tokenizer.encode(text))
    assert control.isdisjoint(tokenizer.encode(text.encode() + b"\xff"))


@given(TRICKY, TRICKY)
def test_control_tokens_are_encoded_on_request_wherever_they_stand(before, after):
    before, after = before.replace("|", ""), after.replace("|", "")
    ids = BPE.encode(before + END_OF_TEXT + after, special=True)
    assert ids == [*BPE.encode(before), BPE.eos_id, *BPE.encode(after)]
    assert BPE.decode(ids) == before + END_OF_TEXT + after
    assert BPE.decode(ids, skip_special=True) == before + after


@every_tokenizer
@given(raw=ANY_BYTES, special=st.booleans())
def test_streamed_pieces_join_to_the_whole_and_never_show_half_a_character(tokenizer, raw, special):
    ids = tokenizer.encode(raw, special=special)
    stream = tokenizer.stream_decoder()
    for _ in range(2):  # a finished decoder begins anew
        pieces = [*map(stream.push, ids), stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
    text = raw.decode("utf-8", "ignore").replace("\ufffd", "")
    assert not any("\ufffd" in stream.push(i) for i in tokenizer.encode(text))
    assert stream.finish() == ""


def test_a_streamed_character_appears_with_its_last_byte():
    stream = byte_tokenizer().stream_decoder()
    assert [stream.push(b) for b in "é\U0001f600".encode()] == ["", "é", "", "", "", "\U0001f600"]
    assert [stream.push(b) for b in b"\xe2\x82A"] == ["", "", "\ufffdA"]
    assert (stream.push(0xE2), stream.finish(), stream.finish()) == ("", "\ufffd", "")


@pytest.mark.parametrize("name", ["bpe", "llama 3", "smollm"])
@given(text=TRICKY)
def test_cutting_a_long_text_into_pieces_does_not_show(name, text):
    """Forced to cut at every opportunity, the ids are those of the library on the whole text."""
    tokenizer = TOKENIZERS[name]
    whole = tokenizer._library.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_pieces, "PIECE_CHARS", 1)
        assert tokenizer.encode(text) == whole


def test_a_text_of_many_pieces_equals_the_library_on_the_whole():
    text = SAMPLE * 10
    assert len(list(text_pieces.cut(text))) > 3
    assert BPE.encode(text) == BPE._library.encode(text, add_special_tokens=False).ids
    pieces = list(BPE.encode_pieces(text))
    assert len(pieces) > 3
    assert [i for piece in pieces for i in piece] == BPE.encode(text)


def test_text_without_spaces_is_encoded_in_pieces_that_a_signal_gets_between():
    """Only a word of more than a million characters is cut where the cut may show."""
    for text in ("ACGT" * 600_000, "漢" * 2_400_000):
        pieces = list(text_pieces.cut(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) == 2**20
        assert max(sum(map(len, group)) for group in text_pieces.groups(pieces)) <= 2**20
    lines = "漢字，漢字。\n" * 100_000
    assert max(map(len, text_pieces.cut(lines))) < 2**17
    assert all(piece.endswith("。\n") for piece in text_pieces.cut(lines))
    shorter = "ACGT" * 250_000
    assert list(text_pieces.cut(shorter)) == [shorter]


@pytest.mark.parametrize("name", ["bpe", "llama 3", "smollm"])
@pytest.mark.parametrize("char", ["a", " ", "\n", "1", "'", "é", "漢"], ids=ascii)
def test_runs_of_one_character_take_linear_time(name, char):
    """A hundred times the length may take 2000 times the time (noise, logarithms), and quadratic would be 10000."""
    tokenizer = TOKENIZERS[name]
    tokenizer.encode(char)
    spent = []
    for length in (3_000, 300_000):
        start = time.process_time()
        ids = tokenizer.encode(char * length)
        spent.append(time.process_time() - start)
        assert tokenizer.decode(ids) == char * length
    assert spent[1] < 2000 * max(spent[0], 1e-4)


def test_bytes_given_as_surrogates_are_encoded_as_those_bytes():
    """What os.fsdecode and sys.argv give for bytes that are not UTF-8."""
    raw = b"caf\xe9 \xff"
    text = os.fsdecode(raw)
    assert BPE.encode(text) == BPE.encode(raw)
    assert BPE.decode(BPE.encode(text), errors="surrogateescape") == text
    assert BPE.encode("\udcc3\udca9") == BPE.encode("é")


@pytest.mark.parametrize("code", [0xD800, 0xDC7F, 0xDBFF, 0xDFFF], ids=hex)
def test_other_halves_of_surrogate_pairs_are_refused(code):
    char = chr(code)
    for tokenizer in TOKENIZERS.values():
        with pytest.raises(UsageError, match=rf"character 2 of the text is '\\u{code:x}'"):
            tokenizer.encode("ab" + char)
    with pytest.raises(UsageError, match="character 2 "):
        train_bpe(["ab" + char], 300)


@pytest.mark.parametrize("bad", [-1, 512, 2**40])
def test_ids_outside_the_vocabulary_are_refused(bad):
    for ids in ([0, bad], np.array([bad, 0])):
        with pytest.raises(UsageError, match=f"token id {bad} is outside the vocabulary of 512"):
            BPE.decode(ids)
    with pytest.raises(UsageError):
        BPE.stream_decoder().push(bad)
    with pytest.raises(UsageError):
        BPE.token_bytes(bad)


def test_nothing_encodes_to_nothing():
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.encode("") == tokenizer.encode(b"") == []
        assert tokenizer.decode([]) == ""
        assert tokenizer.encode_batch(["", "a", b"\xff"]) == [
            [],
            tokenizer.encode("a"),
            tokenizer.encode(b"\xff"),
        ]


def test_the_first_ids_are_the_bytes_and_the_last_is_the_end():
    for tokenizer in (BPE, byte_tokenizer(END_OF_TEXT)):
        assert [tokenizer.token_bytes(b) for b in range(256)] == [bytes([b]) for b in range(256)]
        assert tokenizer.eos_id == tokenizer.vocab_size - 1
        assert tokenizer.token_bytes(tokenizer.eos_id) == END_OF_TEXT.encode()
    plain = byte_tokenizer()
    assert (plain.vocab_size, plain.eos_id, plain.special) == (256, None, {})
    assert plain.encode(bytes(range(256))) == list(range(256))


def test_training_compresses_and_gives_exactly_the_size_asked_for():
    assert BPE.vocab_size == 512
    assert len(BPE.encode(SAMPLE)) < 0.5 * len(SAMPLE.encode())
    assert train_bpe([SAMPLE], 400, eos=None).vocab_size == 400
    assert train_bpe([SAMPLE], 257).encode("abc") == [97, 98, 99]
    assert train_bpe("one text", 257).vocab_size == 257


def test_training_is_the_same_in_every_process(tmp_path):
    code = (
        "from portlm.tokenizer import train_bpe; from portlm.data.python_topics import python_topics\n"
        "print(train_bpe([python_topics()[:30_000]], 600).sha256)"
    )
    digests = set()
    for seed, threads in (("1", "1"), ("2", "4")):
        env = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_a_vocabulary_the_text_cannot_support_names_both_numbers():
    with pytest.raises(
        UsageError, match=r"vocabulary of 5000 tokens is more than this text supports, which is \d+:"
    ):
        train_bpe([SAMPLE[:2000]], 5000)
    for size in (0, 256, 2**20 + 1):
        with pytest.raises(UsageError, match=f"vocabulary of {size} tokens is not possible"):
            train_bpe([SAMPLE], size)


def test_runs_of_one_character_do_not_make_endless_tokens():
    tokenizer = train_bpe(["-" * 100_000 + " " + SAMPLE[:5000]], 300)
    assert max(len(tokenizer.token_bytes(i)) for i in range(300)) <= 128


@every_tokenizer
def test_a_saved_tokenizer_is_the_same_when_opened(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        opened = Tokenizer.load(path)
        assert opened.sha256 == tokenizer.sha256
        assert (opened.eos_id, opened.bos_id, opened.vocab_size) == (
            tokenizer.eos_id,
            None,
            tokenizer.vocab_size,
        )
        assert opened.encode(SAMPLE[:500]) == tokenizer.encode(SAMPLE[:500])
    first = (tmp_path / "new" / "folder" / "tokenizer.json").read_bytes()
    opened.save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == first


def test_saving_where_no_folder_can_be_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made a folder"):
        BPE.save(tmp_path / "file" / "folder")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Each tokenizer opened by transformers from the files portlm saved."""
    transformers = pytest.importorskip("transformers", reason="the differential test needs transformers")
    opened = {}
    for name, tokenizer in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("foreign")
        tokenizer.save(folder)
        opened[name] = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert opened[name].eos_token_id == tokenizer.eos_id
        assert len(opened[name]) == tokenizer.vocab_size
    return opened


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=UNICODE | TRICKY)
def test_ids_equal_those_of_transformers(foreign, name, text):
    ids = foreign[name](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZERS[name].encode(text) == ids
    assert foreign[name].decode(ids) == text
    assert TOKENIZERS[name].encode(text, special=True) == foreign[name](text)["input_ids"]


def test_ids_equal_those_of_transformers_on_real_text(foreign):
    for name, tokenizer in TOKENIZERS.items():
        assert tokenizer.encode(SAMPLE) == foreign[name](SAMPLE)["input_ids"]


def test_the_roles_come_from_the_config_and_nothing_else_in_it_matters(tmp_path):
    BPE.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for text, eos, bos in (
        ('{"eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}}', 511, None),
        ('{"bos_token": "<|endoftext|>", "eos_token": null}', None, 511),
        ('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "tokenizer_class": "Evil"}', 511, None),
        ("{}", 511, None),
    ):
        config.write_text(text)
        opened = Tokenizer.load(tmp_path)
        assert (opened.eos_id, opened.bos_id) == (eos, bos)
    for text in ('{"eos_token": "</s>"}', '{"eos_token": 3}', "[]", "{", '{"bos_token": "a"}'):
        config.write_text(text)
        with pytest.raises(FormatError, match=r"tokenizer_config\.json"):
            Tokenizer.load(tmp_path)


def test_bytes_need_neither_torch_nor_the_library():
    code = (
        "import sys; from portlm.tokenizer import byte_tokenizer\n"
        "assert byte_tokenizer().encode('hi') == [104, 105]\n"
        "assert not {'torch', 'tokenizers', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
