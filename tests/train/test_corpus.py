"""The text of a run: a resumed run trains on the tokens of the text that it was begun with, or says that it cannot."""

import json

import pytest

torch = pytest.importorskip("torch")

from tiny_runs import TEXT, pretrain, tiny  # noqa: E402

from portlm.data.shards import prepare  # noqa: E402
from portlm.errors import ConfigError, FormatError  # noqa: E402
from portlm.tokenizer import byte_tokenizer, train_bpe  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_other_text_is_noticed_on_resume(text, tmp_path):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    prepare(TEXT + "more", byte_tokenizer(), run / "data")
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        pretrain(tiny(text), run, resume="auto", quiet=True)


@pytest.mark.parametrize("change", ["content", "one byte", "path"])
def test_a_resume_with_another_text_is_refused_and_changes_nothing(text, tmp_path, change):
    """The run trains on its own tokens: a text that is not theirs would be passed over in silence."""
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    named = tmp_path / "other.txt" if change == "path" else text
    named.write_text(TEXT.replace("99", "98") if change == "one byte" else TEXT.upper(), encoding="utf-8")
    for resume in ("auto", str(run / "checkpoints" / "step-8")):
        with pytest.raises(
            ConfigError, match=r"(has changed|another text).*--out.*'data\.texts=\[\]'"
        ) as caught:
            pretrain(tiny(named, steps=16), run, resume=resume, quiet=True)
        assert str(named) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_resumed_run_may_name_more_or_fewer_texts_no_more_than_others(text, tmp_path):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    with pytest.raises(ConfigError, match="begun with 1 texts, and 2 are named"):
        pretrain(tiny(text, data__texts=[str(text), str(text)]), run, resume="auto", quiet=True)
    with pytest.raises(FormatError, match=r"typo\.txt does not exist"):
        pretrain(tiny(tmp_path / "typo.txt"), run, resume="auto", quiet=True)


def test_a_text_that_moved_or_went_or_is_left_out_is_no_obstacle(text, tmp_path, capsys):
    straight = pretrain(tiny(text, steps=16), tmp_path / "straight", quiet=True)
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    moved = text.rename(tmp_path / "moved.txt")
    pretrain(tiny(moved, steps=13), run, resume="auto")
    assert "tokens in" not in capsys.readouterr().err  # it is the same text
    pretrain(tiny(moved, steps=14), run, resume="auto")
    moved.unlink()
    pretrain(tiny(text, steps=15), run, resume="auto")
    assert (
        f"{text} is not there any more: the run trains on the tokens in {run / 'data'}"
        in capsys.readouterr().err
    )
    pretrain(tiny(text, steps=16, data__texts=[]), run, resume="auto")
    assert f"no text is named: the run trains on the tokens in {run / 'data'}" in capsys.readouterr().err
    assert (run / "data" / "train" / "index.json").read_bytes() == (
        straight.run / "data" / "train" / "index.json"
    ).read_bytes()


def test_a_run_from_before_digests_of_texts_says_that_none_is_compared(text, tmp_path, capsys):
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    (run / "data" / "texts.json").unlink()
    text.write_text(TEXT.upper(), encoding="utf-8")
    pretrain(tiny(text, steps=14), run, resume="auto")
    assert f"{text}: not read, and not compared" in capsys.readouterr().err
    (run / "data" / "texts.json").write_text('[{"path": 3}]')
    with pytest.raises(FormatError, match=r"texts\.json is no list of texts"):
        pretrain(tiny(text, steps=16), run, resume="auto", quiet=True)


def test_another_tokenizer_of_the_same_name_is_noticed_on_resume(text, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe([TEXT], 280).to_json())
    run = pretrain(tiny(text, data__tokenizer=str(path)), tmp_path / "run", quiet=True).run
    path.write_text(train_bpe([TEXT], 290).to_json())
    with pytest.raises(ConfigError, match="not the tokenizer that the run was begun with"):
        pretrain(tiny(text, data__tokenizer=str(path)), run, resume="auto", quiet=True)
    path.unlink()
    assert (
        pretrain(tiny(text, data__tokenizer=str(path), steps=14), run, resume="auto", quiet=True).steps == 14
    )


def test_tokens_left_by_another_text_do_not_stop_a_run_that_continues_one_elsewhere(text, tmp_path):
    first = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    prepare(TEXT.upper(), byte_tokenizer(), tmp_path / "more" / "data")
    byte_tokenizer().save(tmp_path / "more" / "data")
    assert pretrain(tiny(text, steps=14), tmp_path / "more", resume=str(first), quiet=True).steps == 14


@pytest.mark.parametrize(
    "ids", [b"\x01\x00", b"\xff\x7f"], ids=["another id", "an id outside the vocabulary"]
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_two_altered_bytes_of_a_shard_are_noticed_and_the_shard_is_named(text, tmp_path, part, ids):
    """In a run that is resumed, and in prepared shards."""
    run = pretrain(tiny(text), tmp_path / "run", quiet=True).run
    (shard,) = (run / "data" / part).glob("*.bin")
    raw = bytearray(shard.read_bytes())
    raw[100:102] = ids
    shard.write_bytes(raw)
    with pytest.raises(FormatError, match=f"{shard.name} was altered"):
        pretrain(tiny(text, steps=14), run, resume="auto", quiet=True)
    with pytest.raises(FormatError, match=f"{shard.name} was altered"):
        pretrain(tiny(run / "data"), tmp_path / "from-shards", quiet=True)


def test_ids_outside_the_vocabulary_are_an_error_that_names_the_shard(text, tmp_path):
    """With digests that fit: whoever wrote the shards meant another vocabulary."""
    prepare(TEXT, train_bpe([TEXT], 280), tmp_path / "shards")
    for part in ("train", "val"):
        index = tmp_path / "shards" / part / "index.json"
        index.write_text(
            json.dumps(json.loads(index.read_text()) | {"vocab_size": 256, "tokenizer_sha256": None})
        )
    (shard,) = (tmp_path / "shards" / "train").glob("*.bin")
    with pytest.raises(FormatError, match=f"{shard.name} holds a token id outside the vocabulary of 256"):
        pretrain(tiny(tmp_path / "shards"), tmp_path / "run", quiet=True)
