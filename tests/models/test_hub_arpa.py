"""n-gram models in ARPA files: there and back, what such a file says by definition, and damage named by its line."""

import dataclasses
import gzip
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install portlm[train]")
pytest.importorskip("numba", reason="numba is missing: pip install portlm[train]")

from ngram_trees import random_ngrams  # noqa: E402

from portlm import arpa_file, hub_arpa  # noqa: E402
from portlm.errors import FormatError, UsageError  # noqa: E402
from portlm.hub_arpa import export_arpa, import_arpa  # noqa: E402
from portlm.models import build, load_config, load_model, save_model  # noqa: E402
from portlm.models.gpt2 import GPT2Config  # noqa: E402
from portlm.models.ngram import NGramConfig  # noqa: E402
from portlm.text_tokenizer import train_words, words_at_spaces  # noqa: E402
from portlm.tokenizer import Tokenizer, byte_tokenizer  # noqa: E402
from portlm.train.kneser_ney import estimate, make_model  # noqa: E402
from portlm.train.ngram import scores  # noqa: E402
from portlm.train.ngram_counts import count  # noqa: E402

# As KenLM writes it: 0 for the beginning, which never follows anything, and tabs around the words.
KENLM = """\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-0.9\t<unk>\t0
0\t<s>\t-0.30103
-0.6\t</s>\t0
-0.5\ta\t-0.2
-0.7\tb\t-0.1

\\2-grams:
-0.3\t<s> a\t-0.4
-0.2\ta b\t-0.05
-0.8\tb </s>\t0
-0.4\tb a\t0

\\3-grams:
-0.1\t<s> a b
-0.15\ta b </s>

\\end\\
"""


def by_definition(text):
    """What an ARPA file says, word for word: a function (word, history) -> log10 p."""
    found, order = {}, 0
    for line in text.splitlines():
        fields = line.split()
        if line.endswith("-grams:"):
            order = int(line[1:-7])
        elif order and len(fields) > 1:
            weight = float(fields[order + 1]) if len(fields) == order + 2 else 0.0
            found[tuple(fields[1 : order + 1])] = float(fields[0]), weight

    def p(word, history):
        if (*history, word) in found:
            return found[(*history, word)][0]
        return found.get(history, (0, 0.0))[1] + p(word, history[1:])

    return p


@pytest.fixture
def kenlm(tmp_path):
    (tmp_path / "k.arpa").write_text(KENLM)
    return tmp_path / "k.arpa"


def counted(tmp_path, order=3):
    """A checkpoint of a text of words, with its tokenizer."""
    rng = np.random.default_rng(order)
    names = ["a", "b", "é", "don", "x_1", "."]
    text = " ".join(names[i] for i in np.minimum(rng.geometric(0.4, 400) - 1, 5))
    tokenizer = train_words([text], 6)  # one word has no token
    ids = np.array(tokenizer.encode(text))
    levels = list(count(ids, 6, order))
    save_model(tmp_path / "m", make_model(levels, estimate(levels)), tokenizer)
    return tmp_path / "m", ids, tokenizer


@pytest.mark.parametrize("order", [1, 2, 4])
def test_kneser_ney_in_a_file_has_the_probabilities_of_the_model(tmp_path, order):
    """By the format's definition. Nine digits beside logarithms in float32, of which as many are added: 1e-6."""
    folder, ids, tokenizer = counted(tmp_path, order)
    export_arpa(folder, tmp_path / "m.arpa")
    p = by_definition((tmp_path / "m.arpa").read_text())
    names = ["<unk>", *tokenizer.names()[1:]]
    words = np.concatenate((ids[:60], np.random.default_rng(0).integers(6, size=60)))
    found = scores(load_model(folder), words)
    for t in range(order, len(words)):
        history = tuple(names[word] for word in words[t - order + 1 : t])
        assert found[t] / math.log(10) == pytest.approx(p(names[words[t]], history), abs=1e-6)


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize("suffix", [".arpa", ".arpa.gz"])
def test_a_model_comes_back_with_its_numbers(tmp_path, with_tokenizer, suffix):
    """Nine digits tell float32 numbers apart; 3e-7 are two of their last bits, where -99 is added to others."""
    folder, _, tokenizer = counted(tmp_path, 4)
    export_arpa(folder, tmp_path / f"m{suffix}")
    done = import_arpa(tmp_path / f"m{suffix}", tmp_path / "again", folder if with_tokenizer else None)
    assert (done.family, done.notes) == ("ngram", ())
    before, after = load_model(folder), load_model(tmp_path / "again")
    ids = torch.randint(6, (2, 50), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(ids)[..., :6], before(ids), rtol=3e-7, atol=0)
    assert after.config.vocab_size == (6 if with_tokenizer else 8)  # words that never come: <s> and </s>
    again = Tokenizer.load(tmp_path / "again")
    if with_tokenizer:
        assert again.sha256 == tokenizer.sha256
    else:
        assert again.names() == ["<unk>", *tokenizer.names()[1:], "<s>", "</s>"]
    export_arpa(tmp_path / "again", tmp_path / f"twice{suffix}")
    assert (tmp_path / f"twice{suffix}").read_bytes() == (tmp_path / f"m{suffix}").read_bytes()


def test_every_run_in_the_tables_is_written_under_the_names_of_its_tokens(tmp_path):
    """A tree of random runs over bytes and a token that ends a text; two of them have a name of their own."""
    config = dataclasses.replace(NGramConfig.tiny(), vocab_size=257, histories=1201, places=1703)
    model = random_ngrams(config)
    save_model(tmp_path / "m", model, byte_tokenizer("<|endoftext|>"))
    export_arpa(tmp_path / "m", tmp_path / "m.arpa")
    words, grams = arpa_file.read_arpa(tmp_path / "m.arpa", max_order=4, max_words=300, max_ngrams=9999)
    assert sum(len(level.words) for level in grams[1:]) == int((model.parents >= 0).sum()) > 100
    assert words[256:] == ["</s>", "<s>", "<unk>"]
    assert words[ord(" ")] == "Ġ"
    import_arpa(tmp_path / "m.arpa", tmp_path / "again", tmp_path / "m")
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    ids[:, ::3] = 0  # whose children are sure to be there
    torch.testing.assert_close(load_model(tmp_path / "again")(ids), model(ids), rtol=3e-7, atol=0)


def test_a_file_of_kenlm_is_read_as_sentences(kenlm, tmp_path):
    done = import_arpa(kenlm, tmp_path / "m")
    assert done.notes == ()
    tokenizer, model = Tokenizer.load(tmp_path / "m"), load_model(tmp_path / "m")
    ids = tokenizer.encode("a b\nzebra a")
    assert ids == [1, 3, 4, 0, 3]
    assert load_config(tmp_path / "m").eos_token_ids == (2,)
    expected = [-99, -0.3, -0.1, -0.05 - 0.1 - 0.9, -0.5]
    np.testing.assert_allclose(scores(model, np.array(ids)) / math.log(10), expected, rtol=2e-7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", r"ends at line 24 without \\data\\"),
        ("ngram 1=5\n", "", r"line 2, 'ngram 2=4', must count the n-grams of 1"),
        ("ngram 3=2", "ngram 3", r"""line 4, 'ngram 3', is not "ngram ORDER=COUNT\""""),
        ("ngram 3=2", "ngram 3=-2", r"line 4, 'ngram 3=-2', is not"),
        ("ngram 3=2", "ngram 3=999999999999", r"line 4, .* is not"),
        ("ngram 3=2", "ngram 3=0", "line 4, 'ngram 3=0', must be from 1"),
        ("ngram 3=2", "ngram 3=16777216", "line 4, .* must be from 1 to 1048576 words and to 16777216 n-grams"),
        ("ngram 1=5", "ngram 1=1048577", "line 2, .* must be from 1 to 1048576 words"),
        ("ngram 3=2", "ngram 2=2", "line 4, 'ngram 2=2', must count the n-grams of 3"),
        ("ngram 3=2\n", "ngram 3=2\n" + "".join(f"ngram {n}=1\n" for n in range(4, 18)), "line 18, .* at most 16"),
        ("ngram 3=2", "ngram 3=3", "stands where 3-grams end: 2 of the 3"),
        ("ngram 2=4", "ngram 2=3", "line 17, .* is one more than the 3 2-grams"),
        ("\\2-grams:", "\\3-grams:", r"line 13, '\\\\3-grams:', must be \\2-grams:"),
        ("\\1-grams:", "-1 c", r"line 6, '-1 c', must be \\1-grams:"),
        ("-0.2\ta b\t-0.05", "-0.2\ta c\t-0.05", "line 15, .* holds 'c', which is not among the 1-grams"),
        ("-0.2\ta b\t-0.05", "-0.2\ta", "line 15, .* is no logarithm, 2 words and perhaps a weight"),
        ("-0.2\ta b\t-0.05", "-0.2\tb a\t-0.05", "the 2-gram 'b a' stands there twice"),
        ("-0.2\ta b\t-0.05", "-0.2\tb b", "the 3-gram 'a b </s>' stands there without its history, 'a b'"),
        ("-0.2\ta b", "nan\ta b", "line 15, .* holds 'nan', and must hold a number from -300 to 0"),
        ("-0.2\ta b", "-inf\ta b", "line 15, .* holds '-inf'"),
        ("-0.2\ta b", "0.2\ta b", "line 15, .* holds '0.2'"),
        ("-0.2\ta b", "-0_2\ta b", "line 15, .* holds '-0_2'"),
        ("\t-0.05", "\tinf", "line 15, .* holds 'inf', and must hold a number from -300 to 300"),
        ("<s> a b\n", "<s> a b\t-0.5\n", "line 20, .* has a weight, and no n-gram is longer"),
        ("-0.7\tb", "-0.7\ta", "line 11, .* is a word that stands before"),
        ("\\end\\\n", "", r"ends at line 23 without \\end\\"),
        ("\\end\\", "-0.1\ta a a\n\\end\\", r"line 23, .* must be \\end\\: there are more n-grams"),
        ("\\end\\\n", "\\end\\\nmore\n", r"line 24, 'more', stands behind \\end\\"),
        ("\\end\\\n", "\\end\\\n" + "\n" * 2000, "is the last of 1000 blank ones"),
        ("\ta\t", "\t" + "a" * 70000 + "\t", "line 10 is longer than 65536 bytes"),
        (KENLM, "", r"ends at line 1 without \\data\\"),
    ],
)  # fmt: skip
def test_damage_is_named_by_its_line(kenlm, tmp_path, old, new, message):
    assert old in KENLM
    kenlm.write_text(KENLM.replace(old, new, 1))
    with pytest.raises(FormatError, match=message):
        import_arpa(kenlm, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    """But behind its end, and where only the end of a line is gone."""
    path = tmp_path / "k.arpa"
    for size in range(len(KENLM) - 1):
        path.write_text(KENLM[:size])
        with pytest.raises(FormatError, match=r"k\.arpa"):
            arpa_file.read_arpa(path, max_order=3, max_words=5, max_ngrams=11)


def test_a_file_that_unpacks_to_more_than_it_promises_ends_there(tmp_path):
    """A gigabyte of blank lines, or of one line, in a megabyte."""
    for filler in (b"\n", b"a"):
        packed = gzip.compress(KENLM.encode()) + gzip.compress(filler * 2**20) * 1024
        (tmp_path / "k.arpa.gz").write_bytes(packed)
        with pytest.raises(FormatError, match=r"blank ones|is longer than 65536 bytes"):
            import_arpa(tmp_path / "k.arpa.gz", tmp_path / "m")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:-8] + bytes(4) + raw[-4:]])
def test_a_damaged_compressed_file_is_refused(tmp_path, damage):
    (tmp_path / "k.arpa.gz").write_bytes(damage(gzip.compress(KENLM.encode())))
    with pytest.raises(FormatError, match=r"k\.arpa\.gz is compressed and damaged"):
        import_arpa(tmp_path / "k.arpa.gz", tmp_path / "m")


def test_words_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "k.arpa").write_bytes(KENLM.encode().replace(b"\tb", b"\t\xff").replace(b" b", b" \xff"))
    with pytest.raises(FormatError, match="is no UTF-8"):
        import_arpa(tmp_path / "k.arpa", tmp_path / "m")


def test_words_that_a_file_lacks_and_those_no_text_becomes_are_noted(tmp_path):
    """Without <unk> a word without a token is impossible; \u3000 is a space at which texts are cut."""
    (tmp_path / "k.arpa").write_text(
        "\\data\\\nngram 1=2\n\n\\1-grams:\n-0.3\ta\n-0.3\tb\u3000c\n\n\\end\\\n"
    )
    done = import_arpa(tmp_path / "k.arpa", tmp_path / "m")
    assert [note.split(":")[0] for note in done.notes] == [
        "<unk> is not in the file", "1 words hold a space of some kind, so no text becomes them",
    ]  # fmt: skip
    assert Tokenizer.load(tmp_path / "m").encode("a other") == [0, 2]
    expected = [-0.3, -99]
    np.testing.assert_allclose(
        scores(load_model(tmp_path / "m"), np.array([0, 2])) / math.log(10), expected, rtol=2e-7
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["b", "[UNK]", "a", "never"], "<s> a"),  # it has no <s>, and the file has n-grams with it
        (["b", "[UNK]", "<s>", "</s>"], "word 'a' is no token"),
        (["b", "[UNK]", "a", "<s>", "</s>", "never"], None),
    ],
)
def test_words_of_a_file_are_tokens_of_a_tokenizer(kenlm, tmp_path, words, expected):
    words_at_spaces(words).save(tmp_path / "t")
    if expected is not None:
        with pytest.raises(FormatError, match="is no token of the tokenizer"):
            import_arpa(kenlm, tmp_path / "m", tmp_path / "t")
        return
    done = import_arpa(kenlm, tmp_path / "m", tmp_path / "t")
    assert done.notes == ("1 tokens are not in the file: their probability is 10^-0.9, that of <unk>",)
    found = scores(load_model(tmp_path / "m"), np.array([3, 2, 0, 1, 5])) / math.log(10)
    np.testing.assert_allclose(found, [-99, -0.3, -0.1, -0.05 - 0.1 - 0.9, -0.9], rtol=2e-7)


def test_what_is_no_such_model_or_has_no_such_words_is_not_written(tmp_path):
    tiny = NGramConfig(vocab_size=4, order=1)
    save_model(tmp_path / "gpt2", build(GPT2Config.tiny()), None)
    with pytest.raises(FormatError, match="ARPA files hold n-gram models, and this is a gpt2"):
        export_arpa(tmp_path / "gpt2", tmp_path / "m.arpa")
    save_model(tmp_path / "bare", build(tiny))
    with pytest.raises(FormatError, match=r"an ARPA file is made of words, and there is no tokenizer\.json"):
        export_arpa(tmp_path / "bare", tmp_path / "m.arpa")
    save_model(tmp_path / "few", build(tiny), words_at_spaces(["[UNK]", "a", "b"]))
    with pytest.raises(FormatError, match="the tokenizer has 3 tokens, and the model 4"):
        export_arpa(tmp_path / "few", tmp_path / "m.arpa")
    save_model(tmp_path / "same", build(tiny), words_at_spaces(["[UNK]", "a", "b", "<unk>"]))
    with pytest.raises(FormatError, match="two tokens would be called '<unk>'"):
        export_arpa(tmp_path / "same", tmp_path / "m.arpa")
    save_model(tmp_path / "spaced", build(tiny), words_at_spaces(["[UNK]", "a", "b\u3000c", "d"]))
    with pytest.raises(FormatError, match=r"the token 'b\\u3000c' is no word without spaces"):
        export_arpa(tmp_path / "spaced", tmp_path / "m.arpa")
    model = build(tiny)
    with torch.no_grad():
        model.log_probs[2] = 0.5
    save_model(tmp_path / "more", model, words_at_spaces(["[UNK]", "a", "b", "c"]))
    with pytest.raises(
        FormatError, match=r"log_probs holds 0\.217147 of 10, which is no logarithm of a prob"
    ):
        export_arpa(tmp_path / "more", tmp_path / "m.arpa")
    assert not (tmp_path / "m.arpa").exists()


def test_larger_tables_than_a_model_s_are_refused(kenlm, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_arpa, "MAX_PLACES", 10)
    with pytest.raises(FormatError, match=r"line 4, .* to 10 n-grams in all"):
        import_arpa(kenlm, tmp_path / "m")


def test_a_folder_that_holds_something_is_left_alone(kenlm, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").write_text("")
    with pytest.raises(UsageError, match="exists already and is left alone"):
        import_arpa(kenlm, tmp_path / "m")
