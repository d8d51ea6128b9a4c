"""What a session says with a model that reads whole texts, beside transformers' own pipelines on the same weights."""

import dataclasses
import itertools
import json
import random
import shutil
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import tokenizer_files  # noqa: E402
from encoders import ENCODERS, labelled, random_model  # noqa: E402

import portlm  # noqa: E402
from portlm.engine import CallSpec  # noqa: E402
from portlm.errors import ContextLengthError, FormatError, PortlmError, UsageError  # noqa: E402
from portlm.labels import Labels  # noqa: E402
from portlm.models import load_model, save_model  # noqa: E402
from portlm.roles import TensorSpec  # noqa: E402
from portlm.runtimes.answers import best_passage, pooled, scores_of  # noqa: E402
from portlm.runtimes.reading import Reading  # noqa: E402
from portlm.token_spans import token_spans, words  # noqa: E402
from portlm.tokenizer import Tokenizer  # noqa: E402

TEXTS = [
    "A list is a sequence of items, which may be changed.",
    "Naïve café: don't!",
    "x",
    "Python's functions return values; a generator yields them one by one, and remembers where it was.",
]
KIND = {"bert": "bert", "distilbert": "bert, cased", "roberta": "roberta"}
MASK = {"bert": "[MASK]", "distilbert": "[MASK]", "roberta": "<mask>"}
families = pytest.mark.parametrize("family", ENCODERS)


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip(
            "transformers", reason="transformers is missing: pip install portlm[hf]"
        )
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return package


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Function (family, heads, changes) -> a folder with random weights and a tokenizer of the family's kind."""
    made = {}

    def make(family, heads, **change):
        key = (family, heads, *sorted(change.items()))
        if key not in made:
            document = tokenizer_files.document(KIND[family])
            size = len(document["model"]["vocab"]) + (
                len(document["added_tokens"]) if family == "roberta" else 0
            )
            config = labelled(ENCODERS[family].config_class().tiny(), heads)
            model = random_model(dataclasses.replace(config, vocab_size=size, context_length=64, **change))
            folder = tmp_path_factory.mktemp("reading") / family
            save_model(folder, model.eval())
            (folder / "tokenizer.json").write_text(json.dumps(document))
            names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
                     "unk_token": "[UNK]"}  # fmt: skip
            if family == "roberta":
                names = {
                    "pad_token": "<|endoftext|>",
                    "mask_token": "<mask>",
                    "cls_token": "<s>",
                    "sep_token": "</s>",
                }
            types = ["token_type_ids"] * (family == "bert")
            inputs = {"model_input_names": ["input_ids", *types, "attention_mask"]}
            (folder / "tokenizer_config.json").write_text(
                json.dumps(
                    {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **inputs, **names}
                )
            )
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="module")
def opened(checkpoint):
    """Function as checkpoint -> a session on the torch engine."""
    sessions = {}

    def load(family, heads, **change):
        key = (family, heads, *sorted(change.items()))
        if key not in sessions:
            sessions[key] = portlm.load(checkpoint(family, heads, **change), "torch")
        return sessions[key]

    yield load
    for session in sessions.values():
        session.close()


def pipeline(transformers, task, folder, auto):
    """transformers' pipeline for a folder."""
    model = getattr(transformers, auto).from_pretrained(folder)
    return transformers.pipeline(
        task, model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder)
    )


# ---- embed -------------------------------------------------------------------------------------------------------


@families
def test_an_embedding_is_the_mean_of_what_transformers_says_of_the_tokens(
    transformers, opened, checkpoint, family
):
    folder, session = checkpoint(family, ()), opened(family, ())
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for pooling, normalize in itertools.product(("mean", "cls"), (True, False)):
        found = session.embed(TEXTS, pooling=pooling, normalize=normalize, batch_size=3)
        assert (found.dtype, found.shape) == (np.float32, (4, 24))
        for vector, text in zip(found, TEXTS, strict=True):
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()
            expected = hidden.mean(0) if pooling == "mean" else hidden[0]
            expected = expected / expected.norm() if normalize else expected
            # Two float32 computations of numbers of about 1.
            np.testing.assert_allclose(vector, expected, atol=1e-5, rtol=1e-5)


@families
def test_neither_the_batch_nor_its_padding_changes_a_vector(opened, family):
    session = opened(family, ())
    alone = np.stack([session.embed(text) for text in TEXTS])
    for batch_size in (1, 2, 64):
        # The sums run over other lengths, hence in another order.
        np.testing.assert_allclose(session.embed(TEXTS, batch_size=batch_size), alone, atol=2e-6)
    ids = [session.tokenizer.encode(text) for text in TEXTS]
    np.testing.assert_allclose(session.embed(ids), alone, atol=2e-6)
    assert session.embed([]).shape == (0, 24)


def test_a_text_longer_than_the_context_is_refused_unless_it_may_be_cut(opened):
    session = opened("bert", ())
    text = "list " * 100
    with pytest.raises(ContextLengthError, match=r"text 1 has \d+ tokens, but the model's context holds 64"):
        session.embed(["x", text])
    tokenizer = session.tokenizer
    ids = tokenizer.encode(text)
    kept = [*ids[:63], *tokenizer.end_ids]
    assert len(kept) == 64
    np.testing.assert_allclose(session.embed(text, truncate=True), session.embed(kept), atol=1e-6)


def test_pooling_of_known_numbers():
    hidden = np.array([[3.0, 0.0], [5.0, 8.0]], np.float32)
    assert pooled(hidden, "mean", False).tolist() == [4.0, 4.0]
    assert pooled(hidden, "cls", True).tolist() == [1.0, 0.0]
    assert pooled(0 * hidden, "mean", True).tolist() == [0.0, 0.0]  # and no NaN


# ---- classify ----------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_labels_and_scores_are_those_of_transformers(transformers, opened, checkpoint, family, problem):
    folder, session = (
        checkpoint(family, ("classify",), problem=problem),
        opened(family, ("classify",), problem=problem),
    )
    theirs = pipeline(transformers, "text-classification", folder, "AutoModelForSequenceClassification")
    for found, expected in zip(session.classify(TEXTS), theirs(TEXTS, top_k=None), strict=True):
        assert [label.name for label in found.labels] == [each["label"] for each in expected]
        assert [label.score for label in found.labels] == pytest.approx(
            [e["score"] for e in expected], abs=1e-5
        )
        assert (found.label, found.score) == (found.labels[0].name, found.labels[0].score)
    pair = theirs({"text": TEXTS[0], "text_pair": TEXTS[1]}, top_k=None)
    found = session.classify(TEXTS[0], TEXTS[1])
    assert {x.name: x.score for x in found.labels} == pytest.approx(
        {e["label"]: e["score"] for e in pair}, abs=1e-5
    )


def test_the_second_text_and_its_types_matter(opened):
    session = opened("bert", ("masked_lm", "next_sentence"))
    one = session.classify(TEXTS[0], TEXTS[1], head="next_sentence")
    other = session.classify(TEXTS[1], TEXTS[0], head="next_sentence")
    assert {label.name for label in one.labels} == {"follows", "does not follow"}
    assert sum(label.score for label in one.labels) == pytest.approx(1)
    assert one.score != pytest.approx(other.score, abs=1e-4)
    joined = session.tokenizer.encode_typed(TEXTS[0], TEXTS[1])[0]
    assert session.classify(joined, head="next_sentence").score != pytest.approx(one.score, abs=1e-6)


def test_scores_of_known_numbers():
    logits = np.log(np.array([1, 3], np.float32))
    assert scores_of(logits, None).tolist() == pytest.approx([0.25, 0.75])
    assert scores_of(logits, "multi_label_classification").tolist() == pytest.approx([0.5, 0.75])
    assert scores_of(np.zeros(1, np.float32), None).tolist() == [0.5]
    assert scores_of(np.full(1, 7, np.float32), "regression").tolist() == [7]
    assert scores_of(np.array([-1e4, 1e4], np.float32), "multi_label_classification").tolist() == [0, 1]


# ---- tag ---------------------------------------------------------------------------------------------------------


@families
def test_tags_of_tokens_are_those_of_transformers(transformers, opened, checkpoint, family):
    folder, session = checkpoint(family, ("tag",)), opened(family, ("tag",))
    theirs = pipeline(transformers, "token-classification", folder, "AutoModelForTokenClassification")
    for text, found in zip(TEXTS, session.tag(TEXTS, words=False), strict=True):
        expected = [each for each in theirs(text, ignore_labels=[]) if each["start"] < each["end"]]
        assert [(t.begin, t.end, t.label) for t in found] == [
            (e["start"], e["end"], e["entity"]) for e in expected
        ]
        assert [t.score for t in found] == pytest.approx([float(e["score"]) for e in expected], abs=1e-5)


@families
def test_a_word_has_the_label_of_its_first_token(opened, family):
    session = opened(family, ("tag",))
    for text in TEXTS:
        tokens, whole = session.tag(text, words=False), session.tag(text)
        assert [(tag.begin, tag.end) for tag in whole] == words(text)
        assert [tag.text for tag in whole] == [text[begin:end] for begin, end in words(text)]
        first = {tag.begin: tag for tag in reversed(tokens)}
        for tag in whole:
            assert (tag.label, tag.score) == pytest.approx(
                (first[tag.begin].label, first[tag.begin].score), abs=1e-5
            )


@pytest.mark.parametrize("kind", ["bert", "bert, cased", "roberta", "gpt2", "llama 3", "qwen 2"])
def test_where_tokens_lie_is_what_the_library_says(tmp_path, kind):
    import tokenizers

    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files.document(kind)))
    ours, theirs = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in [*TEXTS, "  two  spaces ", "漢字かな 😀👩‍👩‍👧", "", "e\u0301a"]:
        encoding = theirs.encode(text, add_special_tokens=False)
        ids, spans = token_spans(ours, text)
        assert ids == encoding.ids
        for (begin, end), (first, last) in zip(spans, encoding.offsets, strict=True):
            # Theirs may have the space before a word in it.
            assert text[begin:end] == text[first:last].strip()
            assert begin == end or first <= begin < end <= last


# ---- span --------------------------------------------------------------------------------------------------------


@families
def test_the_passage_is_the_best_of_all(transformers, opened, checkpoint, family):
    """Found by trying every pair, on what transformers' class says."""
    folder, session = checkpoint(family, ("span",)), opened(family, ("span",))
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        given = tokenizer("What is a list?", text, return_tensors="pt", return_offsets_mapping=True)
        spans, of = given.pop("offset_mapping")[0].tolist(), given.sequence_ids(0)
        logits = model(**given)
        starts, ends = logits.start_logits[0].detach().numpy(), logits.end_logits[0].detach().numpy()
        inside = [t for t, which in enumerate(of) if which == 1 and text[slice(*spans[t])].strip()]
        for longest in (1, 3, 30):
            pairs = [(i, j) for i in inside for j in inside if i <= j < i + longest]
            i, j = max(pairs, key=lambda pair: starts[pair[0]] + ends[pair[1]])
            found = session.span("What is a list?", text, longest=longest)
            assert text[spans[i][0] : spans[j][1]].strip() == found.text
            assert text[found.begin : found.end] == found.text
            seen = [0, *inside]
            shares = [np.exp(x[seen] - np.logaddexp.reduce(x[seen])) for x in (starts, ends)]
            place = [seen.index(i), seen.index(j)]
            assert found.score == pytest.approx(float(shares[0][place[0]] * shares[1][place[1]]), rel=1e-3)


def test_no_answer_is_given_where_it_is_better_by_more_than_the_threshold(opened):
    session = opened("bert", ("span",))
    passage = session.span("What?", TEXTS[0])
    assert passage.text
    assert session.span("What?", TEXTS[0], no_answer=1e6) == passage
    empty = session.span("What?", TEXTS[0], no_answer=-1e6)
    assert (empty.text, empty.begin, empty.end) == ("", 0, 0)
    assert session.span(["What?"] * 2, [TEXTS[0], TEXTS[1]])[0].text == passage.text
    with pytest.raises(UsageError, match="the text is empty, so nothing in it is an answer"):
        session.span("What?", "  ")


def test_the_best_passage_of_random_numbers_is_found():
    draw = np.random.default_rng(0)
    for _ in range(50):
        T, longest = int(draw.integers(2, 20)), int(draw.integers(1, 8))
        start, end = draw.standard_normal((2, T)).astype(np.float32)
        allowed = draw.random(T) < 0.7
        allowed[0], allowed[-1] = False, True
        pairs = [(i, j) for i in range(T) for j in range(i, min(T, i + longest)) if allowed[i] and allowed[j]]
        i, j, best, none = best_passage(start, end, allowed, longest)
        assert (i, j) == max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
        assert best - none == pytest.approx(float(start[i] + end[j] - start[0] - end[0]), abs=1e-5)


# ---- fill --------------------------------------------------------------------------------------------------------


@families
def test_fillings_are_those_of_transformers(transformers, opened, checkpoint, family):
    folder, session = checkpoint(family, ("masked_lm",)), opened(family, ("masked_lm",))
    theirs = pipeline(transformers, "fill-mask", folder, "AutoModelForMaskedLM")
    mask = MASK[family]
    texts = [f"A list is a {mask} of items.", f"{mask} returns.", f"The {mask} is a {mask}"]
    for text, found in zip(texts, session.fill(texts, top_k=4), strict=True):
        expected = theirs(text, top_k=4)
        expected = expected if isinstance(expected[0], list) else [expected]
        assert len(found) == text.count(mask)
        for ours, each in zip(found, expected, strict=True):
            assert [f.token_id for f in ours] == [e["token"] for e in each]
            assert [f.score for f in ours] == pytest.approx([e["score"] for e in each], abs=1e-6)


def test_only_the_mask_becomes_a_control_token(opened):
    session = opened("bert", ("masked_lm",))
    plain = session.fill("a [MASK] b")
    assert session.fill("a [SEP] [MASK] b") != plain
    row = session._masked("[CLS] a [MASK]", "[MASK]", 4)
    assert [t for t in row.ids if t < 5] == [2, *[1] * row.ids.count(1), 4, 3]


# ---- what a model cannot do --------------------------------------------------------------------------------------


def test_a_language_model_says_what_it_cannot_do(checkpoints):
    with portlm.load(checkpoints["gpt2"], "torch") as session:
        for ask, needs in (
            (lambda: session.embed("a"), "embed texts: that takes a model with encoder"),
            (lambda: session.classify("a"), "classify texts: that takes a model with head:classify"),
            (lambda: session.tag("a"), "tag words: that takes a model with head:tag"),
            (lambda: session.span("a", "b"), "find passages: that takes a model with head:span"),
            (lambda: session.fill("[MASK]"), "fill in masks: that takes a model with head:masked_lm"),
        ):
            with pytest.raises(UsageError, match=f"this model cannot {needs}, and this one has decoder"):
                ask()


def test_an_encoder_says_that_it_cannot_continue_a_text(opened):
    with pytest.raises(UsageError, match="this model has no role 'decoder', only encoder"):
        opened("bert", ()).generate("a")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.embed("a", pooling="max"), "pooling"),
        (lambda s: s.embed("a", batch_size=0), "batch_size"),
        (lambda s: s.embed(5), "texts must be a text"),
        (lambda s: s.embed([[]]), "text 0 is empty"),
        (lambda s: s.embed([10**6]), "holds token 1000000"),
        (lambda s: s.tag(5), "texts must be a text, or a list of texts"),
        (lambda s: s.tag([["a"]]), "texts must be a text, or a list of texts"),
    ],
)
def test_arguments_out_of_range_are_refused(opened, ask, message):
    with pytest.raises(UsageError, match=message):
        ask(opened("bert", ("tag",)))


def test_arguments_of_the_other_verbs_are_checked(opened):
    with pytest.raises(UsageError, match="top_k"):
        opened("bert", ("masked_lm",)).fill("[MASK]", top_k=0)
    with pytest.raises(UsageError, match=r"text 1 has no \[MASK\], so there is nothing to fill in"):
        opened("bert", ("masked_lm",)).fill(["[MASK]", "a"])
    with pytest.raises(UsageError, match="each of 2 texts needs another text"):
        opened("bert", ("classify",)).classify(["a", "b"], ["c"])
    with pytest.raises(UsageError, match="is token ids, which make no pair"):
        opened("bert", ("classify",)).classify([1, 2], "c")
    with pytest.raises(UsageError, match="2 questions need as many texts, got 1"):
        opened("bert", ("span",)).span(["a", "b"], ["c"])
    with pytest.raises(ContextLengthError):
        opened("bert", ("span",)).span("a", "list " * 100)


def test_labels_that_do_not_fit_the_head_are_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("bert", ("classify",)), tmp_path / "model")
    with portlm.load(folder, "torch") as session:
        session.labels = Labels(("one", "two"))
        with pytest.raises(
            UsageError, match=r"head:classify gives 3 answers, and id2label in config.json names 2"
        ):
            session.classify("a")


def test_a_model_without_tokenizer_takes_token_ids(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("bert", ("tag",)), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with portlm.load(folder, "torch") as session:
        assert session.embed([2, 9, 3]).shape == (24,)
        with pytest.raises(UsageError, match="this model has no tokenizer"):
            session.embed("a")
        with pytest.raises(UsageError, match="this model has no tokenizer"):
            session.tag("a")


def test_numbers_that_are_none_are_an_error(checkpoint, tmp_path):
    folder = tmp_path / "model"
    model = load_model(checkpoint("bert", ()))
    model.norm.weight.data[0] = float("nan")
    save_model(folder, model)
    with (
        portlm.load(folder, "torch") as session,
        pytest.raises(PortlmError, match="the last_hidden_state of encoder are not numbers"),
    ):
        session.embed([1, 2])


def test_labels_of_a_damaged_config_are_a_format_error(checkpoint, tmp_path):
    from portlm.labels import read_labels

    for text, message in (("[]", "JSON object"), ('{"id2label": {"1": "a"}}', "id2label must name 0, 1")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            read_labels(tmp_path)


# ---- on every engine ---------------------------------------------------------------------------------------------


def test_random_texts_of_any_length_are_read_in_any_order(opened):
    session, draw = opened("bert", ("tag",)), random.Random(0)
    texts = [
        " ".join(draw.choices(["list", "of", "items", "yield"], k=draw.randint(0, 20))) for _ in range(40)
    ]
    alone = [session.tag(text) for text in texts]
    for found, expected in zip(session.tag(texts, batch_size=7), alone, strict=True):
        assert [(t.text, t.label) for t in found] == [(t.text, t.label) for t in expected]


def refusing(role, *shape):
    """A session on an engine that says that a head gives logits of this shape, and computes nothing."""

    class Engine:
        roles = {  # noqa: RUF012
            role: CallSpec(
                (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
                (TensorSpec("logits", "float32", shape),),
            )
        }

    session = Reading()
    session.engine = Engine()
    return session


def test_a_head_whose_numbers_are_not_what_its_verb_reads_is_refused_before_anything_is_read():
    verbs = {"classify": ("x",), "tag": ("x",), "span": ("x", "y")}
    shapes = {"classify": ("batch", "sequence", 2), "tag": ("batch", 2), "span": ("batch", 2)}
    for verb, texts in verbs.items():
        with pytest.raises(UsageError, match=f"its head:{verb} gives no logits of that shape"):
            getattr(refusing(f"head:{verb}", *shapes[verb]), verb)(*texts)
    with pytest.raises(UsageError, match="its head:span gives 3 numbers for each token, not 2"):
        refusing("head:span", "batch", "sequence", 3).span("x", "y")
