"""Learning word vectors: losses and gradients beside a rewrite in float64, what is drawn beside word2vec's rules."""

import itertools
import math
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_objectives import interrupt_at  # noqa: E402

import portlm  # noqa: E402
from portlm import settings  # noqa: E402
from portlm.data.batches import IGNORE  # noqa: E402
from portlm.errors import ConfigError, FormatError, UsageError  # noqa: E402
from portlm.train.config import PretrainConfig  # noqa: E402
from portlm.train.interrupt import InterruptedTraining  # noqa: E402
from portlm.train.metrics import comparable, read_metrics  # noqa: E402
from portlm.train.objectives import glove, skipgram  # noqa: E402
from portlm.train.presets import preset_settings  # noqa: E402
from portlm.train.pretrain import pretrain  # noqa: E402
from portlm.weights import load_numpy  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    "skipgram": {"skipgram.window": 2},
    "cbow": {"skipgram.cbow": True, "skipgram.window": 2},
    "glove": {},
}


def drawing(counts, **changes):
    values = {"window": 3, "negatives": 4, "subsample": 0.0, "cbow": False, "seed": 5} | changes
    return skipgram.Drawing(np.asarray(counts, np.float64), **values)


# ---- negative sampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cbow", [False, True], ids=["skip-gram", "CBOW"])
def test_negative_sampling_is_the_papers_formula(cbow):
    """Loss and both gradients against loops over words in float64, to float32's rounding of sums of some hundred."""
    draw = np.random.default_rng(0)
    V, M = 11, 6
    examples = drawing(np.ones(V), cbow=cbow).examples(draw.integers(0, V, (3, 9)), 0)
    words, contexts = (torch.tensor(draw.standard_normal((V, M)), dtype=torch.float32) for _ in range(2))
    words.requires_grad_()
    contexts.requires_grad_()
    found = skipgram.negative_sampling(words, contexts, examples)
    found.sum().backward()

    w, u = (table.detach().double().numpy() for table in (words, contexts))
    losses, dw, du = [], np.zeros((V, M)), np.zeros((V, M))
    for inputs, weights, outputs, counts in zip(*(part.tolist() for part in examples), strict=True):
        used = [i for i, share in zip(inputs, weights, strict=True) if share]
        h = sum(w[i] for i in used) / len(used)
        loss, dh = 0.0, np.zeros(M)
        for place, output in enumerate(outputs):
            if place and output == outputs[0]:
                assert counts[place] == 0
                continue
            label = 1.0 if place == 0 else 0.0
            p = 1 / (1 + math.exp(-(u[output] @ h)))
            loss -= math.log(p if label else 1 - p)
            dh += (p - label) * u[output]
            du[output] += (p - label) * h
        for i in used:
            dw[i] += dh / len(used)
        losses.append(loss)
    np.testing.assert_allclose(found.detach(), losses, rtol=1e-5)
    np.testing.assert_allclose(words.grad, dw, atol=1e-4)
    np.testing.assert_allclose(contexts.grad, du, atol=1e-4)


def test_pairs_lie_inside_the_window_of_their_word_and_near_ones_are_more():
    """A word reaches 1 to 3 words far, equally often: of places at a distance of d, (4 - d) / 3 are pairs."""
    rows = np.arange(4 * 5000).reshape(4, 5000)
    examples = drawing(np.ones(rows.size)).examples(rows, 0)
    distance = (examples.outputs[:, 0] - examples.inputs[:, 0]).numpy()
    assert {*distance.tolist()} == {-3, -2, -1, 1, 2, 3}
    assert (examples.inputs[:, 0] // 5000).equal(examples.outputs[:, 0] // 5000)  # no pair of two rows
    for d in (1, 2, 3):
        share = (4 - d) / 3
        for side in (-d, d):  # five standard errors
            assert (distance == side).sum() / rows.size == pytest.approx(
                share, abs=5 * math.sqrt(share * (1 - share) / rows.size) + 12 / rows.size
            )
    centres = examples.inputs[:, 0].numpy()
    reach = np.zeros(rows.size, int)
    np.maximum.at(reach, centres, abs(distance))
    for centre in (7, 5003, 12345):  # all places up to the reach, and none beyond
        own = sorted(distance[centres == centre])
        assert own == [d for d in range(-reach[centre], reach[centre] + 1) if d]


def test_a_word_that_is_left_out_makes_its_neighbours_neighbours():
    """As word2vec.c has it: what is no word, and what subsampling takes, is gone before windows are looked at."""
    counts = np.array([1.0, 1, 0, 1])
    found = drawing(counts, window=1).examples(np.array([[0, 2, 2, 1, IGNORE, 3]]), 0)
    pairs = {*zip(found.inputs[:, 0].tolist(), found.outputs[:, 0].tolist(), strict=True)}
    assert pairs == {(0, 1), (1, 0), (1, 3), (3, 1)}
    assert 2 not in found.outputs


def test_a_context_is_the_mean_of_its_words():
    found = drawing(np.ones(6), window=2, cbow=True).examples(np.array([[0, 1, 2, 3, 4, 5]]), 3)
    assert found.outputs[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(found.weights.sum(1), np.ones(6), rtol=1e-6)
    for inputs, weights, right in zip(found.inputs, found.weights, found.outputs[:, 0], strict=True):
        used = inputs[weights > 0]
        assert (weights[weights > 0] == 1 / len(used)).all()
        assert ((used - right).abs() <= 2).all()
        assert right not in used


def test_words_stay_with_the_probability_of_word2vec():
    """The C code's own expression: (sqrt(cn / (sample * train_words)) + 1) * (sample * train_words) / cn."""
    counts, sample = np.array([5000.0, 300, 20, 1, 0]), 1e-3
    found = skipgram.keep_probability(counts, sample)
    total = counts.sum()
    for share, cn in zip(found, counts, strict=True):
        wanted = (math.sqrt(cn / (sample * total)) + 1) * (sample * total) / cn if cn else 0.0
        assert share == pytest.approx(min(wanted, 1.0), rel=1e-12)
    assert skipgram.keep_probability(counts, 0.0).tolist() == [1, 1, 1, 1, 0]


def test_frequent_words_are_left_out_as_often_as_they_should_be():
    """40,000 draws: five standard errors."""
    counts = np.array([900.0, 100.0])
    (keep, _), rows = skipgram.keep_probability(counts, 0.01), np.zeros((40, 1000), np.int64)
    rows[:, ::10] = 1
    found = drawing(counts, subsample=0.01, window=1, cbow=True).examples(rows, 0)
    share = (found.outputs[:, 0] == 0).sum().item() / (0.9 * rows.size)
    assert share == pytest.approx(keep, abs=5 * math.sqrt(keep * (1 - keep) / (0.9 * rows.size)))


def test_negatives_are_drawn_by_the_power_of_their_counts():
    counts = np.array([1000.0, 0, 100, 10, 1])
    found = drawing(counts, negatives=20).examples(np.zeros((20, 200), np.int64), 0)
    shares = np.bincount(found.outputs[:, 1:].flatten(), minlength=5) / found.outputs[:, 1:].numel()
    wanted = counts**0.75 / (counts**0.75).sum()
    n = found.outputs[:, 1:].numel()
    assert shares[1] == 0
    np.testing.assert_array_less(abs(shares - wanted), 5 * np.sqrt(wanted * (1 - wanted) / n) + 1e-12)
    assert (found.counts[:, 1:] == (found.outputs[:, 1:] != 0)).all()  # a negative that is the right word


def test_what_is_drawn_depends_on_seed_and_step_alone():
    rows = np.arange(60).reshape(3, 20) % 7

    def made(seed, step):
        return torch.cat(
            [part.flatten().float() for part in drawing(np.ones(7), seed=seed).examples(rows, step)]
        )

    assert made(1, 2).tolist() == made(1, 2).tolist()
    assert made(1, 2).tolist() != made(2, 2).tolist()
    assert made(1, 2).tolist() != made(1, 3).tolist()


# ---- GloVe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1 << 20, 7, 2])
def test_pairs_are_counted_by_their_distance_on_both_sides(monkeypatch, at_once):
    """By a loop over all pairs of places; also where the text is counted in parts."""
    monkeypatch.setattr(glove, "_AT_ONCE", at_once)
    tokens, counted = np.random.default_rng(0).integers(0, 6, 50), np.array([1, 1, 0, 1, 1, 1], bool)
    text = [t for t in tokens.tolist() if counted[t]]
    wanted = {}
    for i, j in itertools.product(range(len(text)), repeat=2):
        if 1 <= abs(i - j) <= 4:
            wanted[text[i], text[j]] = wanted.get((text[i], text[j]), 0) + 1 / abs(i - j)
    cells = glove.cooccurrences(tokens, counted, 4)
    found = dict(
        zip(zip(cells.words.tolist(), cells.contexts.tolist(), strict=True), cells.counts, strict=True)
    )
    assert found.keys() == wanted.keys()
    assert list(found) == sorted(found)
    for pair, count in wanted.items():
        assert found[pair] == pytest.approx(count, rel=1e-12)


def test_glove_is_the_papers_formula():
    """Loss and gradients of tables and biases against a loop in float64."""
    draw = np.random.default_rng(1)
    V, M, E, x_max, power = 7, 5, 40, 20.0, 0.6
    tables = glove.Tables(torch.nn.Parameter(torch.tensor(draw.standard_normal((V, M)), dtype=torch.float32)))
    with torch.no_grad():
        for bias in (tables.word_bias, tables.context_bias):
            bias.normal_()
    ids, counts = draw.integers(0, V, (2, E)), np.exp(draw.uniform(-1, 5, E))
    part = glove.Part(*torch.from_numpy(ids), torch.tensor(counts, dtype=torch.float32), 1.0)
    found = glove.squared_errors(tables, part, x_max, power)
    found.sum().backward()
    w, c, b, d = (p.detach().double().numpy() for p in tables.parameters())
    grads = [np.zeros_like(p) for p in (w, c, b, d)]
    for e in range(E):
        i, j, x = *ids[:, e], counts[e]
        weight = min(1.0, (x / x_max) ** power)
        error = w[i] @ c[j] + b[i] + d[j] - math.log(x)
        assert found[e].item() == pytest.approx(weight * error**2, rel=1e-4, abs=1e-5)
        for grad, at, value in zip(grads, (i, j, i, j), (c[j], w[i], 1.0, 1.0), strict=True):
            grad[at] += 2 * weight * error * value
    for parameter, grad in zip(tables.parameters(), grads, strict=True):
        np.testing.assert_allclose(parameter.grad, grad, rtol=1e-4, atol=1e-3)


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A text of nouns between articles and verbs: nouns stand in like company, and so do verbs; some words are rare."""
    draw, nouns, verbs = random.Random(0), [f"n{i}" for i in range(8)], [f"v{i}" for i in range(8)]
    parts = []
    for i in range(2500):
        noun, verb, other = draw.choice(nouns), draw.choice(verbs), draw.choice(nouns)
        parts += ["the", noun, verb, "a", other, "." if i % 50 else f"rare{i}"]
    path = tmp_path_factory.mktemp("speech") / "text.txt"
    path.write_text(" ".join(parts))
    return path


def config(text, kind="skipgram", **changes):
    values = {
        "objective": "glove" if kind == "glove" else "skipgram", "model.family": "word_vectors", "steps": 12,
        "data.texts": [str(text)], "data.tokenizer": "word:20", "model.width": 16, "model.context_length": 16,
        "data.batch_size": 4, "log_interval": 4, "evaluation.interval": 6, "checkpoint.interval": 4, "threads": 1,
        "optimizer.name": "adagrad", "optimizer.lr": 0.2, "optimizer.weight_decay": 0.0,
    } | KINDS[kind] | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    return settings.load(PretrainConfig, overrides=list(values.items()))


@pytest.mark.parametrize("kind", ["skipgram", "cbow"])
def test_words_in_like_company_get_like_vectors(speech, tmp_path, kind):
    """Each noun's nearest words are nouns, each verb's verbs; chance is a half."""
    settings_ = config(
        speech, kind, steps=400, data__batch_size=16, evaluation__interval=400, checkpoint__interval=400
    )
    result = pretrain(settings_, tmp_path / "run", quiet=True, plot=False)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    # All scores are 0: a coin for the right word, and for each of five others that is not it by chance.
    assert 5 * math.log(2) < first["loss"] < 6 * math.log(2) + 1e-6
    assert last["loss"] < first["loss"]
    assert (result.loss, result.bits_per_byte) == (last["loss"], None)
    sample = [record["text"] for record in records if record["kind"] == "sample"][-1]
    assert all(line.count(", ") == 4 for line in sample.split("\n"))
    with portlm.load(result.checkpoint, "torch") as session:
        for letter in "nv":
            found = session.neighbours([f"{letter}{i}" for i in range(8)], top=3)
            alike = [near.word[0] == letter for nearest in found for near in nearest]
            assert sum(alike) / len(alike) > 0.9
        assert not session.embed("rare50 rare100", normalize=False).any()  # [UNK] is no word
        assert session.embed("the n1 " * 100).shape == (16,)  # a longer text than a row of a batch
    assert list(load_numpy(result.checkpoint / "model.safetensors")) == ["vectors.weight"]


def test_glove_fits_the_counts_of_a_text_it_has_not_seen_and_saves_the_sum_of_its_tables(speech, tmp_path):
    """w + w~ of the last checkpoint's tensors, and 0 for [UNK]."""
    settings_ = config(speech, "glove", steps=200, evaluation__interval=200, checkpoint__interval=200)
    result = pretrain(settings_, tmp_path / "run", quiet=True, plot=False)
    first, *_, last = [
        r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"
    ]
    assert last < first / 10
    trained = load_numpy(tmp_path / "run" / "checkpoints" / "step-200" / "objective.safetensors")
    assert {*trained} == {"words", "contexts", "word_bias", "context_bias"}
    saved = load_numpy(result.checkpoint / "model.safetensors")["vectors.weight"]
    np.testing.assert_array_equal(saved[1:], (trained["words"] + trained["contexts"])[1:])
    assert not saved[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit(speech, tmp_path, monkeypatch, kind):
    made = config(speech, kind, data__accumulate=2)
    pretrain(made, tmp_path / "straight", quiet=True, plot=False)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 7)
        for _ in range(2):
            with pytest.raises(InterruptedTraining):
                pretrain(made, tmp_path / "broken", resume="auto", quiet=True, plot=False)
    pretrain(made, tmp_path / "broken", resume="auto", quiet=True, plot=False)
    ends = []
    for name in ("straight", "broken"):
        vectors = load_numpy(tmp_path / name / "final" / "model.safetensors")["vectors.weight"]
        ends.append((vectors.tobytes(), comparable(read_metrics(tmp_path / name / "metrics.jsonl"))))
    assert ends[0] == ends[1]


def objective(text, folder, kind="skipgram", **changes):
    from portlm.train.corpus import open_corpus
    from portlm.train.objectives import objective_class

    made = config(text, kind, **changes)
    corpus = open_corpus(made.data, folder, fresh=True, note=lambda text: None)
    return objective_class(made.objective)(made, corpus, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_have_the_gradient_of_the_whole(speech, tmp_path, kind):
    from portlm.train.loop import accumulate_gradients

    gradients = []
    for rows, parts in ((12, 1), (4, 3)):
        torch.manual_seed(0)
        made = objective(speech, tmp_path / f"{rows}", kind, data__batch_size=rows, data__accumulate=parts)
        with torch.no_grad():
            made.model.contexts.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        batches = made.batches()
        assert (len(batches), sum(part.share for part in batches)) == (parts, pytest.approx(1))
        gradients.append(
            (accumulate_gradients(made.loss, batches), *(p.grad for p in made.model.parameters()))
        )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)  # the same sum in another order


def test_every_pair_is_learned_once_in_each_pass(speech, tmp_path):
    made = objective(speech, tmp_path, "glove", data__batch_size=3)
    n, seen = len(made.cells.counts), []
    for _ in range(2 * n // 48 + 1):
        (part,) = made.batches()
        seen += zip(part.words.tolist(), part.contexts.tolist(), strict=True)
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == sorted({*seen})
    assert seen[:n] != seen[n : 2 * n]


def test_a_batch_without_a_pair_changes_nothing(speech, tmp_path):
    made = objective(speech, tmp_path)
    made.drawing.keep[:] = 0
    (part,) = made.batches()
    loss = made.loss(part)
    loss.backward()
    assert loss == 0
    assert not made.model.words.grad.any()
    with pytest.raises(
        UsageError, match="in the held-out text no word of the vocabulary stands beside another"
    ):
        made.evaluate(lambda: False)


def test_a_damaged_state_is_refused(speech, tmp_path):
    made = objective(speech, tmp_path / "data")
    state, tensors = made.state()
    made.restore(tmp_path, state, tensors)
    with pytest.raises(FormatError, match=r"holds tensors .*, this run trains"):
        made.restore(tmp_path, state, {"words": tensors["words"]})
    with pytest.raises(FormatError, match="says nothing of the sampler"):
        made.restore(tmp_path, {}, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_one_word_teaches_nothing(tmp_path, kind):
    (tmp_path / "text.txt").write_text("word " * 500)
    with pytest.raises(UsageError, match="the training text has 1 different words of the vocabulary"):
        objective(tmp_path / "text.txt", tmp_path / "data", kind, data__tokenizer="word:2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective=skipgram"],
            "objective skipgram is not for the family gpt2: set model.family = word_vectors",
        ),
        (["objective=glove", "model.family=bert"], "objective glove is not for the family bert"),
        (
            ["model.family=word_vectors"],
            "causal is not for the family word_vectors: set objective = skipgram or glove",
        ),
        (["model.family=word_vectors", "objective=masked"], "masked is not for the family word_vectors"),
        (["skipgram.window=3"], r"the settings of \[skipgram\] are for objective skipgram"),
        (
            ["model.family=word_vectors", "objective=skipgram", "glove.x_max=3"],
            r"\[glove\] are for objective glove",
        ),
        (
            ["model.family=word_vectors", "objective=skipgram", "skipgram.window=0"],
            "skipgram.window must be at least 1",
        ),
        (["model.family=word_vectors", "objective=skipgram", "skipgram.negatives=0"], "skipgram.negatives"),
        (["model.family=word_vectors", "objective=skipgram", "skipgram.subsample=-1"], "skipgram.subsample"),
        (["model.family=word_vectors", "objective=glove", "glove.window=0"], "glove.window"),
        (["model.family=word_vectors", "objective=glove", "glove.x_max=0"], "glove.x_max"),
        (["model.family=word_vectors", "objective=glove", "glove.power=2"], "glove.power"),
        (["objective=word2vec"], "objective must be one of .*skipgram, glove"),
        (["model.family=word_vectors", "objective=skipgram", "model.n_layer=7"], "n_layer"),
        (["optimizer.name=adagrad", "optimizer.momentum=0.5"], "optimizer.momentum is Muon's"),
    ],
    ids=str,
)
def test_settings_that_do_not_belong_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings.load(PretrainConfig, overrides=overrides)


@pytest.mark.parametrize(("name", "objective_"), [("word2vec", "skipgram"), ("glove", "glove")])
def test_the_presets_are_those_of_the_papers(name, objective_):
    made = settings.load(PretrainConfig, preset=preset_settings(name))
    assert (made.objective, made.model.family, made.optimizer.name) == (objective_, "word_vectors", "adagrad")


# ---- the optimiser ---------------------------------------------------------------------------------------------------


def test_adagrad_is_pytorchs():
    """Ten steps: the same operations in the same order, but for where eps is added."""
    from portlm.train.adagrad import AdaGrad

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    pair = AdaGrad([ours], lr=0.1), torch.optim.Adagrad([theirs], lr=0.1)
    for _ in range(10):
        grad = torch.randn(5, 3)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        assert pair[0].step() == pytest.approx(float(grad.norm()), rel=1e-6)
        pair[1].step()
    torch.testing.assert_close(ours, theirs)


def test_adagrad_clips_decays_and_refuses_what_is_no_number():
    from portlm.train.adagrad import AdaGrad

    p = torch.nn.Parameter(torch.full((2,), 3.0))
    optimizer = AdaGrad([p], lr=0.5, weight_decay=0.1, max_grad_norm=1.0)
    p.grad = torch.tensor([30.0, 40.0])
    assert optimizer.step() == 50
    assert optimizer.state[p]["sum"].tolist() == pytest.approx([0.36, 0.64], rel=1e-5)
    assert p.tolist() == pytest.approx([3 * 0.95 - 0.5] * 2, rel=1e-6)
    before = p.tolist()
    p.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(optimizer.step())
    assert (p.tolist(), optimizer.state[p]["sum"].tolist()) == (before, optimizer.state[p]["sum"].tolist())
    with pytest.raises(ValueError, match="eps must be at least 0"):
        AdaGrad([p], eps=-1.0)
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        AdaGrad([p], max_grad_norm=0.0)
    with pytest.raises(ValueError, match="no sum of the parameter's shape"):
        AdaGrad([p]).load_state_dict(
            {"state": {0: {}}, "param_groups": AdaGrad([p]).state_dict()["param_groups"]}
        )
