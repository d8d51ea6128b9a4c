"""Word vectors in word2vec's text format: there and back without a bit lost, and damage is named by its line."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm import hub_word2vec  # noqa: E402
from portlm.errors import FormatError, UsageError  # noqa: E402
from portlm.hub_word2vec import export_word2vec, import_word2vec  # noqa: E402
from portlm.models import DECODERS, build, load_model, save_model  # noqa: E402
from portlm.models.word_vectors import WordVectorsConfig  # noqa: E402
from portlm.text_tokenizer import train_words  # noqa: E402
from portlm.tokenizer import Tokenizer, byte_tokenizer  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = build(WordVectorsConfig(vocab_size=6, width=7))
    with torch.no_grad():
        model.vectors.weight.mul_(torch.logspace(-30, 30, 7))
    save_model(tmp_path / "m", model, train_words(["a a a b b é don x_1"], 6))
    return tmp_path / "m"


def test_every_bit_comes_back(checkpoint, tmp_path):
    """All but [UNK], which is no word."""
    export_word2vec(checkpoint, tmp_path / "v.vec")
    lines = (tmp_path / "v.vec").read_text().split("\n")
    assert lines[0] == "5 7"
    assert [line.split(" ")[0] for line in lines[1:]] == ["a", "b", "don", "x_1", "é", ""]
    done = import_word2vec(tmp_path / "v.vec", tmp_path / "again")
    assert (done.family, done.parameters, done.notes) == ("word_vectors", 42, ())
    before, after = (load_model(folder).vectors.weight for folder in (checkpoint, tmp_path / "again"))
    assert torch.equal(before[1:], after[1:])
    assert not after[0].any()
    tokenizer = Tokenizer.load(tmp_path / "again")
    assert tokenizer.encode("a é  don't x_1\nb") == [1, 5, 0, 4, 2]
    export_word2vec(tmp_path / "again", tmp_path / "twice.vec")
    assert (tmp_path / "twice.vec").read_bytes() == (tmp_path / "v.vec").read_bytes()


@pytest.mark.parametrize(
    "text",
    ["3 2\nking 1 2\nqueen -0.5 1e-3 \nU.S. 0 1\n", "king 1 2\nqueen -0.5 0.001\nU.S. 0 1"],
    ids=["word2vec", "GloVe"],
)
def test_files_of_word2vec_and_of_glove_are_read(portlm_run, tmp_path, text):
    """word2vec.c ends its lines with a space; GloVe's files have no first line of counts."""
    (tmp_path / "v.txt").write_text(text)
    assert portlm_run("import", tmp_path / "v.txt", tmp_path / "m").out.strip() == str(tmp_path / "m")
    with portlm.load(tmp_path / "m", "torch") as session:
        vectors = session.embed(["king", "queen", "U.S.", "the U.S. king"], normalize=False)
        assert {near.word for near in session.neighbours("king")} == {"queen", "U.S."}
    table = np.array([[1, 2], [-0.5, 0.001], [0, 1]], np.float32)
    np.testing.assert_array_equal(vectors[:3], table)
    np.testing.assert_allclose(vectors[3], [1 / 3, 1], rtol=1e-6)


@pytest.fixture
def portlm_run():
    """Function: runs the command line in this process."""
    from types import SimpleNamespace

    from click.testing import CliRunner

    from portlm.cli import cli

    def run(*arguments):
        result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
        return SimpleNamespace(code=result.exit_code, out=result.stdout)

    return run


def test_words_that_no_text_could_hold_are_left_out_with_a_note(tmp_path):
    (tmp_path / "v.vec").write_text("4 1\na 1\na\u3000b 2\na 3\nb 4\n")
    done = import_word2vec(tmp_path / "v.vec", tmp_path / "m")
    assert done.notes == (
        "1 of 4 words were left out, since they are listed before",
        "1 of 4 words were left out, since they hold a space of some kind",
    )
    assert load_model(tmp_path / "m").vectors.weight.flatten().tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"", "is empty"), (b"3 2\n", "promises 3 words, and 0 follow"), (b"1 2\na 1 2\nb 1 2\n", "promises 1 words"),
     (b"1 2\na 1\n", "line 2 is no word"), (b"1 2\n 1 2\n", "line 2 is no word"),
     (b"a 1 2\nb 1\n", "line 2 is no word"),
     (b"a\n", "line 1 is no word"), (b"1 1\na x\n", "line 2 has something else than numbers"),
     (b"1 1\na nan\n", "line 2 has NaN"), (b"1 1\n\xff 1\n", "line 2 is no UTF-8 at byte 0"),
     (b"1 0\na\n", "line 2 is no word"), (b"a" * 5000 + b" 1\n", "line 1 is no word of 1 to 4096"),
     (b"1 1\na\xe3\x80\x80b 1\n", "holds no word vectors")],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_refused_by_its_line(tmp_path, raw, message):
    (tmp_path / "v.vec").write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        import_word2vec(tmp_path / "v.vec", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "v.vec").write_text("2 1\na 1\nb 2\n")
    monkeypatch.setattr(hub_word2vec, "MAX_VOCAB", 2)
    with pytest.raises(FormatError, match="more than 1 words are too many"):
        import_word2vec(tmp_path / "v.vec", tmp_path / "m")
    monkeypatch.setattr(hub_word2vec, "MAX_LINE_BYTES", 4)
    with pytest.raises(FormatError, match="line 1 is longer than 4 bytes"):
        import_word2vec(tmp_path / "v.vec", tmp_path / "m")
    with pytest.raises(FormatError):
        import_word2vec(tmp_path / "none.vec", tmp_path / "m")


def test_what_has_no_words_is_refused(checkpoint, tmp_path, portlm_run):
    save_model(tmp_path / "gpt2", build(DECODERS["gpt2"].config_class().tiny()), byte_tokenizer())
    with pytest.raises(FormatError, match="word2vec's format holds word vectors, and this is a gpt2"):
        export_word2vec(tmp_path / "gpt2", tmp_path / "v.vec")
    save_model(tmp_path / "bytes", build(WordVectorsConfig(vocab_size=256, width=2)), byte_tokenizer())
    with pytest.raises(FormatError, match=r"the token .* is no word without spaces"):
        export_word2vec(tmp_path / "bytes", tmp_path / "v.vec")
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"there is no tokenizer\.json"):
        export_word2vec(checkpoint, tmp_path / "v.vec")
    assert not (tmp_path / "v.vec").exists()


def test_the_command_writes_a_file_and_refuses_options_of_graphs(checkpoint, tmp_path, portlm_run):
    outcome = portlm_run("export", checkpoint, tmp_path / "v.vec", "--to", "word2vec")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'v.vec'}\n")
    assert (tmp_path / "v.vec").read_text().startswith("5 7\n")
    with pytest.raises(UsageError, match="--to word2vec writes none"):
        portlm_run("export", checkpoint, tmp_path / "w.vec", "--to", "word2vec", "--profile", "fused")
