"""BLEU: sacreBLEU's figure is the paper's formula, and a run says it beside the loss."""

import math
import sys
from collections import Counter
from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm import settings  # noqa: E402
from portlm.errors import ConfigError, EngineUnavailableError, UsageError  # noqa: E402
from portlm.train.bleu import check_sacrebleu, corpus_bleu  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.metrics import read_metrics  # noqa: E402
from portlm.train.objectives.seq2seq import Seq2SeqObjective, open_pairs  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402

WRITTEN = ["the cat sat on the mat .", "a man is sleeping in a green room"]
WANTED = ["the cat sat on a mat .", "a man sleeps in a green room on a couch ."]
with_sacrebleu = pytest.mark.skipif(
    find_spec("sacrebleu") is None,
    reason="sacrebleu is missing: pip install portlm[translation]",
)


def by_formula(written, references):
    """Section 2.3 of the paper: clipped n-gram precisions of the corpus, their geometric mean, the brevity penalty."""
    logs = []
    for n in range(1, 5):
        hits = total = 0
        for text, reference in zip(written, references, strict=True):
            mine, theirs = (
                Counter(zip(*(words[i:] for i in range(n)), strict=False))
                for words in (text.split(), reference.split())
            )
            hits += sum((mine & theirs).values())
            total += sum(mine.values())
        logs.append(math.log(hits / total))
    c, r = (sum(len(text.split()) for text in texts) for texts in (written, references))
    return 100 * min(1.0, math.exp(1 - r / c)) * math.exp(sum(logs) / 4)


@with_sacrebleu
def test_bleu_is_that_of_the_paper_where_words_are_separated_by_spaces():
    found = corpus_bleu(WRITTEN, WANTED, "none")
    assert found.score == pytest.approx(by_formula(WRITTEN, WANTED), rel=1e-9)
    assert 0 < found.score < 100
    assert "tok:none" in found.signature
    assert corpus_bleu(WANTED, WANTED, "none").score == pytest.approx(100)


@with_sacrebleu
def test_plain_text_is_cut_into_words_by_13a():
    written, wanted = ["A house, by the sea stands alone."], ["A house , by the sea stands alone ."]
    assert corpus_bleu(written, wanted).score == pytest.approx(100)
    assert corpus_bleu(written, wanted, "none").score < 100
    assert "tok:13a" in corpus_bleu(written, wanted).signature


@with_sacrebleu
@pytest.mark.parametrize(("written", "wanted"), [([], []), (["a"], ["a", "b"])])
def test_what_cannot_be_compared_is_refused(written, wanted):
    with pytest.raises(UsageError, match="cannot be compared"):
        corpus_bleu(written, wanted)


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    for call in (check_sacrebleu, lambda: corpus_bleu(WRITTEN, WANTED)):
        with pytest.raises(EngineUnavailableError, match=r"pip install 'portlm\[translation\]'"):
            call()


@pytest.fixture
def config(tmp_path):
    for name, lines in (("a.txt", ("drei haeuser", "ein hund")), ("b.txt", ("three houses", "one dog"))):
        (tmp_path / name).write_text("\n".join(lines * 12))
    return settings.load(
        PretrainConfig,
        overrides=[
            ("objective", "seq2seq"), ("data.source", str(tmp_path / "a.txt")),
            ("data.target", str(tmp_path / "b.txt")), ("data.batch_size", 4), ("model.family", "seq2seq"),
            ("model.n_layer", 1), ("model.width", 16), ("model.context_length", 16), ("steps", 2),
            ("evaluation.interval", 2), ("evaluation.sample_tokens", 0), ("evaluation.translations", 2),
        ],
    )  # fmt: skip


@with_sacrebleu
@pytest.mark.usefixtures("one_thread")
def test_a_run_says_the_bleu_of_what_its_model_writes(config, tmp_path, monkeypatch):
    """What is compared is checked, since an untrained model's BLEU is 0 whatever it writes."""
    compared = []

    def spy(written, references):
        compared.append((written, references))
        return corpus_bleu(WRITTEN, WANTED)

    monkeypatch.setattr("portlm.train.objectives.seq2seq.corpus_bleu", spy)
    done = pretrain(config, tmp_path / "run", quiet=True, plot=False)
    records = [r for r in read_metrics(done.run / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in records] == [0, 2]
    assert all(r["bleu"] == corpus_bleu(WRITTEN, WANTED).score for r in records)
    import portlm

    with portlm.load(done.checkpoint, engine="torch") as session:
        own = session.translate(["ein hund", "drei haeuser"], max_new_tokens=15)  # by length
    assert compared[-1] == ([result.text.strip() for result in own], ["one dog", "three houses"])


@with_sacrebleu
@pytest.mark.usefixtures("one_thread")
def test_who_waits_for_the_end_does_not_wait_for_all_translations(config, tmp_path, monkeypatch):
    monkeypatch.setattr("portlm.train.objectives.seq2seq._TRANSLATED", 1)
    corpus = open_pairs(config.data, tmp_path / "data", fresh=True, note=lambda text: None)
    objective = Seq2SeqObjective(config, corpus, torch.device("cpu"))
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 3  # before the one batch of the loss, and before each of two translations

    assert objective.evaluate(stop) is None
    assert len(asked) == 3
    assert objective.model.training
    assert set(objective.evaluate(lambda: False)) == {"loss", "bleu"}


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_could_not_say_it_at_the_end_does_not_begin(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(EngineUnavailableError, match="sacrebleu is not installed"):
        pretrain(config, tmp_path / "run", quiet=True, plot=False)


def test_translations_are_of_pairs_alone():
    with pytest.raises(ConfigError, match=r"evaluation\.translations is for objective seq2seq"):
        settings.load(PretrainConfig, overrides=[("evaluation.translations", 4)])
