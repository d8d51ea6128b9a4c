"""Questions answered by parts of texts: what is read, what the loss is, what is learned, saved and found again."""

import json
import random
import shutil

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from tiny_runs import digest  # noqa: E402

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.errors import ConfigError, UsageError  # noqa: E402
from portlm.models import build, load_model, save_model  # noqa: E402
from portlm.models.bert import BertConfig  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.finetune import PRESET, finetune, in_epochs  # noqa: E402
from portlm.train.objectives.answer import AnswerObjective, open_questions  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def asked_of(draw):
    """Return a question for a digit among letters: the text has one, and the answer is that."""
    text, digit, at = draw.choices("abcdef", k=7), draw.choice("0123"), draw.randrange(7)
    text[at] = digit
    return {"question": "?", "text": "".join(text), "answer": digit}


@pytest.fixture
def questions(tmp_path):
    """A file of 48 questions."""
    draw = random.Random(0)
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(asked_of(draw)) for _ in range(48)))
    return path


def config_of(path, **more):
    values = {
        "objective": "answer", "data.texts": [str(path)], "data.batch_size": 8, "model.family": "bert",
        "model.n_layer": 1, "model.n_head": 2, "model.width": 16, "model.context_length": 16, "steps": 6,
        "evaluation.interval": 3, "checkpoint.interval": 2, "log_interval": 2, "threads": 1, "optimizer.lr": 5e-3,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    if "init" in more:
        values = {key: value for key, value in values.items() if not key.startswith("model.")}
    return settings.load(PretrainConfig, preset=PRESET, overrides=list(values.items()))


def objective_of(config, folder):
    corpus = open_questions(config.data, folder, fresh=True, note=lambda text: None)
    torch.manual_seed(0)
    return AnswerObjective(config, corpus, torch.device("cpu"))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_label_is_where_the_answer_is_in_the_row(family, questions, tmp_path):
    objective = objective_of(config_of(questions, model__family=family), tmp_path)
    assert len(objective.rows) == 43
    for row in objective.rows:
        first, last = row.label
        assert first == last
        assert bytes(row.ids[first : last + 1]).isdigit()


def test_the_loss_is_the_mean_over_questions_and_ends_and_padding_is_no_place(questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().split("\n")]
    rows[0] |= {"text": "x" + rows[0]["text"] + "yz"}  # so that the other rows are padded
    questions.write_text("\n".join(map(json.dumps, rows)))
    objective = objective_of(config_of(questions, data__held_out=str(questions)), tmp_path)
    chosen = objective.rows[:5]
    part = objective._part(chosen, 5, 1)
    expected = []
    for row in chosen:
        logits = objective.model.answer("span", torch.tensor([row.ids]), None, torch.tensor([row.types]))[0]
        shares = logits.log_softmax(0)  # (T, 2)
        expected.append(-(shares[row.label[0], 0] + shares[row.label[1], 1]) / 2)
    assert len({len(row.ids) for row in chosen}) == 2
    # the same sums in float32 in another order
    torch.testing.assert_close(objective.loss(part), sum(expected) / 5, atol=1e-5, rtol=1e-5)


def test_parts_of_a_batch_add_up_to_its_gradient(questions, tmp_path):
    gradients = []
    for name, more in (("whole", {}), ("parts", {"data__batch_size": 4, "data__accumulate": 2})):
        objective = objective_of(config_of(questions, **more), tmp_path / name)
        sum(objective.loss(part) for part in objective.batches()).backward()
        gradients.append({n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_what_is_learned_is_found_by_a_session(questions, tmp_path):
    config = config_of(
        questions, data__held_out=str(questions), model__width=32, steps=60, evaluation__interval=60,
        checkpoint__interval=60, schedule__warmup=0.1,
    )  # fmt: skip
    done = finetune(config, tmp_path / "run", quiet=True, plot=False)
    assert done.accuracy == 1
    with portlm.load(done.checkpoint, "torch") as session:
        found = session.span("?", "fab2cd")
    assert (found.text, found.begin, found.end) == ("2", 3, 4)


def test_a_text_without_an_answer_is_answered_by_nothing(tmp_path):
    draw = random.Random(1)
    rows = [asked_of(draw) for _ in range(48)]
    for row in rows[::2]:
        row["text"], row["answer"] = row["text"].replace(row["answer"], "a"), ""
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = config_of(
        path, data__held_out=str(path), model__width=32, steps=90, evaluation__interval=90,
        checkpoint__interval=90, schedule__warmup=0.1,
    )  # fmt: skip
    done = finetune(config, tmp_path / "run", quiet=True, plot=False)
    assert done.accuracy == 1
    with portlm.load(done.checkpoint, "torch") as session:
        assert session.span("?", "fabacd", no_answer=0.0).text == ""
        assert session.span("?", "fab2cd", no_answer=0.0).text == "2"


def test_an_answer_behind_the_end_of_the_context_is_none_and_is_not_counted_as_found(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "?", "text": "a" * 20 + "1", "answer": "1"}) + "\n" + json.dumps(
        {"question": "?", "text": "a" * 5 + "2", "answer": "2"}))  # fmt: skip
    objective = objective_of(config_of(path, data__held_out=str(path)), tmp_path)
    facts = objective.facts()
    assert (facts["texts_cut"], facts["answers_cut"]) == (2, 2)  # learned from, and judged by
    assert objective.rows[0].label == (0, 0)
    assert len(objective.rows[0].ids) == 16
    assert objective.rows[0].ids[-1] == objective.rows[1].ids[-1]  # [SEP]
    assert objective.evaluate(lambda: False)["exact"] in (0, 0.5)


def test_a_masked_encoder_gives_all_but_the_head(questions, tmp_path):
    from portlm.control_tokens import for_reading
    from portlm.tokenizer import byte_tokenizer

    tokenizer = for_reading(byte_tokenizer())[0]
    torch.manual_seed(5)
    old = build(BertConfig(
        vocab_size=tokenizer.vocab_size, context_length=16, n_layer=1, n_head=2, width=16, hidden=24,
        heads=("masked_lm",),
    ))  # fmt: skip
    save_model(tmp_path / "old", old, tokenizer)
    objective = objective_of(config_of(questions, init=str(tmp_path / "old")), tmp_path / "data")
    known = dict(old.named_parameters())
    fresh = [
        n for n, p in objective.model.named_parameters() if n not in known or not torch.equal(p, known[n])
    ]
    assert fresh == ["heads.span.weight", "heads.span.bias"]


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_last_bit(questions, tmp_path):
    config = config_of(questions, model__dropout=0.1, checkpoint__keep=3)
    for name in ("whole", "cut"):
        finetune(config, tmp_path / name, quiet=True, plot=False)
    for gone in ("checkpoints/step-6", "checkpoints/step-4", "final"):
        shutil.rmtree(tmp_path / "cut" / gone)
    finetune(config, tmp_path / "cut", resume="auto", quiet=True, plot=False)
    ends = [digest(tmp_path / name / "checkpoints" / "step-6") for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    assert load_model(tmp_path / "cut" / "final").config.heads == ("span",)


def test_epochs_of_questions_are_counted(questions):
    assert in_epochs(config_of(questions), 2).steps == 12  # 43 in batches of 8


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"model__family": "gpt2"}, ConfigError, "objective answer is not for the family gpt2: set .* = bert"),
        ({"model__context_length": 4}, ConfigError, "a question of 3 tokens leaves no room in a context of 4"),
        ({"data__texts": []}, UsageError, "no questions: name at least one"),
        ({"lm_coef": 0.1}, ConfigError, "lm_coef is for objective classify"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused(more, kind, message, questions, tmp_path):
    with pytest.raises(kind, match=message):
        objective_of(config_of(questions, **more), tmp_path)
