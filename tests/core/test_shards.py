import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portlm.data import shards
from portlm.data.python_topics import python_topics
from portlm.data.shards import TokenShards, write_shards
from portlm.errors import FormatError, StorageError, UsageError
from portlm.tokenizer import train_bpe


def write(folder, ids, **options):
    return write_shards(folder, [ids], **({"vocab_size": 300, "text_bytes": len(ids)} | options))


@given(
    st.lists(st.lists(st.integers(0, 299), max_size=7), min_size=1, max_size=6).filter(lambda p: any(p)),
    st.integers(1, 9),
    st.data(),
)
@settings(max_examples=30, deadline=None)  # each example waits for the disk
def test_every_range_reads_back_whatever_the_pieces_and_shards(tmp_path_factory, pieces, shard_tokens, data):
    folder = tmp_path_factory.mktemp("shards")
    flat = [i for piece in pieces for i in piece]
    write_shards(folder, pieces, vocab_size=300, text_bytes=5, shard_tokens=shard_tokens)
    opened = TokenShards.open(folder)
    assert len(opened) == len(flat)
    assert [opened[i] for i in range(len(flat))] == flat
    assert opened[-1] == flat[-1]
    start = data.draw(st.integers(-len(flat), len(flat)))
    stop = data.draw(st.none() | st.integers(-len(flat), len(flat)))
    assert opened[start:stop].tolist() == flat[start:stop]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_narrowest_type_that_holds_the_vocabulary_is_used(tmp_path, vocab_size, dtype):
    opened = write(tmp_path, [0, vocab_size - 1], vocab_size=vocab_size)
    assert opened.dtype == dtype
    assert opened[:].tolist() == [0, vocab_size - 1]
    assert sum(p.stat().st_size for p in tmp_path.glob("*.bin")) == 2 * np.dtype(dtype).itemsize


def test_the_same_tokens_give_the_same_files(tmp_path):
    for name, pieces in (("a", [[1, 2, 3], [4, 5]]), ("b", [[1], [], [2, 3, 4, 5]])):
        write_shards(tmp_path / name, pieces, vocab_size=9, text_bytes=5, shard_tokens=2)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab")
    assert a == b
    assert len(a) == 4


def test_rewriting_replaces_the_data_set_and_spares_open_maps_and_other_files(tmp_path):
    old = write(tmp_path, list(range(10)), shard_tokens=3)
    (tmp_path / "notes.bin").write_bytes(b"mine")
    write(tmp_path, [7, 8], shard_tokens=3)
    assert TokenShards.open(tmp_path)[:].tolist() == [7, 8]
    assert old[:].tolist() == list(range(10))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_rewrite_leaves_the_old_data_set(tmp_path, monkeypatch):
    write(tmp_path, list(range(10)), shard_tokens=3)
    real, calls = os.replace, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr("os.replace", fail_later)
    with pytest.raises(StorageError):
        write(tmp_path, list(range(100, 110)), shard_tokens=3)
    assert TokenShards.open(tmp_path)[:].tolist() == list(range(10))


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        ([], {}),
        ([300], {}),
        ([-1], {}),
        ([0.5], {}),
        (np.zeros((2, 2), np.int64), {}),
        ([1], {"vocab_size": 0}),
        ([1], {"vocab_size": 2**20 + 1}),
        ([1], {"text_bytes": -1}),
        ([1], {"shard_tokens": 0}),
    ],
    ids=str,
)
def test_what_is_no_data_set_is_a_usage_error(tmp_path, ids, options):
    with pytest.raises(UsageError):
        write(tmp_path, ids, **options)
    assert not (tmp_path / "index.json").exists()


def test_ranges_outside_the_data_set_are_refused(tmp_path):
    opened = write(tmp_path, [1, 2, 3])
    for start, count in ((-1, 1), (0, 4), (4, 0), (2, -1)):
        with pytest.raises(UsageError):
            opened.read(start, count)
    for position in (3, -4):
        with pytest.raises(IndexError):
            opened[position]
    with pytest.raises(UsageError, match="step"):
        opened[::2]


def test_a_cut_shard_is_refused_always_and_an_altered_one_unless_told_otherwise(tmp_path):
    write(tmp_path, list(range(10)))
    path = next(tmp_path.glob("*.bin"))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(FormatError, match="has 19 bytes"):
        TokenShards.open(tmp_path)
    path.write_bytes(b"\x09" + raw[1:])
    assert TokenShards.open(tmp_path, verify=False)[0] == 9
    with pytest.raises(FormatError, match="altered"):
        TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(FormatError):
        TokenShards.open(tmp_path)


def test_an_id_outside_the_vocabulary_is_found(tmp_path):
    write(tmp_path, [5, 6, 7])
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"vocab_size": 7}))
    with pytest.raises(FormatError, match="outside the vocabulary of 7"):
        TokenShards.open(tmp_path)


def damage(**changes):
    return lambda index: index | changes


def damage_shard(**changes):
    return lambda index: index | {"shards": [index["shards"][0] | changes, *index["shards"][1:]]}


DAMAGES = {
    "not ours": damage(format="other"),
    "future": damage(format_version=2),
    "unknown key": damage(extra=1),
    "missing key": lambda index: {k: v for k, v in index.items() if k != "tokens"},
    "list": lambda index: [index],
    "dtype": damage(dtype="uint32"),
    "object dtype": damage(dtype="object"),
    **{
        f"{key} {value}": damage(**{key: value})
        for key in ("vocab_size", "tokens", "text_bytes", "shard_tokens")
        for value in (-1, 2**53 + 1, 2**64, 1.5, True, "3", None, [])
    },
    "more tokens": damage(tokens=11),
    "fewer tokens": damage(tokens=9),
    "tokenizer": damage(tokenizer_sha256="zz"),
    "no shards": damage(shards=[]),
    "shards null": damage(shards=None),
    "shard list": damage(shards=[1, 2]),
    "shard key": damage_shard(extra=1),
    "shard hash": damage_shard(sha256="0" * 63),
    "shard tokens": damage_shard(tokens=3),
    **{
        f"name {name!a}": damage_shard(file=name)
        for name in ("../x", "/etc/passwd", "", "a\\b", "nul\0", "index.json", None, 3)
    },
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES.keys())
def test_an_index_that_contradicts_itself_is_refused(tmp_path, change):
    write(tmp_path, list(range(10)), shard_tokens=4)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(FormatError) as caught:
        TokenShards.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_index_says_what_is_missing(tmp_path):
    with pytest.raises(FormatError, match=r"index\.json is missing"):
        TokenShards.open(tmp_path)


def test_another_tokenizer_is_refused(tmp_path):
    opened = write(tmp_path, [1], tokenizer_sha256="a" * 64)
    opened.check_tokenizer(SimpleNamespace(sha256="a" * 64))
    with pytest.raises(FormatError, match="another tokenizer"):
        opened.check_tokenizer(SimpleNamespace(sha256="b" * 64))


def test_prepare_holds_out_the_last_tenth_of_the_text(tmp_path):
    tokenizer = SimpleNamespace(
        vocab_size=256, sha256="a" * 64, encode_pieces=lambda text: iter([list(text.encode())])
    )
    text = "".join(f"line {i} é\n" for i in range(100))
    train, val = shards.prepare(text, tokenizer, tmp_path)
    assert bytes(train[:].tolist()) + bytes(val[:].tolist()) == text.encode()
    assert (train.text_bytes, val.text_bytes) == (len(train), len(val))
    assert val.text_bytes == len(text.encode()) // 10
    assert train.tokenizer_sha256 == "a" * 64
    with pytest.raises(UsageError, match="held-out"):
        shards.prepare(text, tokenizer, tmp_path, held_out=0)


def test_prepared_ids_are_the_text_again_and_carry_their_tokenizer(tmp_path):
    text = python_topics()[:20_000]
    tokenizer = train_bpe([text], 300)
    train, val = shards.prepare(text, tokenizer, tmp_path)
    assert tokenizer.decode(train[:]) + tokenizer.decode(val[:]) == text
    assert train.vocab_size == 300
    train.check_tokenizer(tokenizer)
    with pytest.raises(FormatError, match="another tokenizer"):
        val.check_tokenizer(train_bpe([text], 301))
