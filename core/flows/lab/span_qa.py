"""Questions about facts: an encoder that learned hidden words finds answers with few labels, a fresh one does not.

A fact is an entity, a relation, one to three values and a dot: ``e7 rB B03 B21 .`` says what B of e7 is. Each relation
has values of its own, as years answer "when" and towns "where". Texts without questions say four facts three times
each, in any order, so a hidden word can be looked up where its fact is said again. A question is an entity and a
relation, the text behind it has twelve facts, each said once, and the answer is the values of the one that is asked
for. Which words are values of what, hidden words have taught; that a question asks for them, 500 labels teach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.data.batches import IGNORE
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, mean_curve, named, parameters, seeded
from portlm.models.bert import BertConfig
from portlm.train.evaluation import evaluating
from portlm.train.objectives.masked import hide

_RELATIONS, _ENTITIES, _VALUES, _LONGEST = 12, 16, 24, 3  # values of each relation; of a fact, at most
_SAID, _TIMES = 4, 3  # facts of a text without questions, and how often it says each
_PAD, _CLS, _SEP, _MASK, _DOT = range(5)
_ENTITY = 5  # the first entity's id; relations and their values follow
_RELATION = _ENTITY + _ENTITIES
_VALUE = _RELATION + _RELATIONS
VOCAB = _VALUE + _RELATIONS * _VALUES
_LENGTH = 5 + _RELATIONS * (_LONGEST + 3)  # of the longest question with its text
_TEXTS, _ROWS, _PRETRAINING = 20_000, 64, 2500  # without questions, in a batch, steps
_LABELS, _JUDGED, _LABELLED_ROWS, _STEPS = 500, 400, 20, 400
# The usual first weights of 0.02 are for a width of 768.
_BERT = BertConfig(
    vocab_size=VOCAB, context_length=_LENGTH, n_layer=2, n_head=4, width=64, hidden=256, heads=("masked_lm",),
    init_std=0.08,
)  # fmt: skip


class Questions(NamedTuple):
    """Questions with their texts and answers, B of them of at most T tokens.

    Attributes:
        ids: (B, T) int64.
        mask: (B, T) int64, 0 on padding.
        ends: (B, 2) int64, places of the first and the last token of each answer.
    """

    ids: Tensor
    mask: Tensor
    ends: Tensor


def fact(generator: np.random.Generator, relation: int) -> list[int]:
    """Return what a text says of some entity: it, the relation, and one to three values."""
    values = generator.integers(0, _VALUES, generator.integers(1, _LONGEST + 1)) + relation * _VALUES + _VALUE
    return [_ENTITY + int(generator.integers(_ENTITIES)), _RELATION + relation, *values.tolist()]


def texts(generator: np.random.Generator, count: int) -> np.ndarray:
    """Return texts without questions (count, T) int64, padded."""
    rows = np.full((count, _LENGTH), _PAD)
    for row in rows:
        facts = [fact(generator, int(relation)) for relation in generator.permutation(_RELATIONS)[:_SAID]]
        said = [facts[n % _SAID] for n in generator.permutation(_SAID * _TIMES)]
        text = [_CLS, *(token for each in said for token in (*each, _DOT)), _SEP]
        row[: len(text)] = text
    return rows


def questions(generator: np.random.Generator, count: int) -> Questions:
    """Return questions about texts that say twelve facts once."""
    rows, ends = np.full((count, _LENGTH), _PAD), np.zeros((count, 2), np.int64)
    for row, end in zip(rows, ends, strict=True):
        facts = [fact(generator, int(relation)) for relation in generator.permutation(_RELATIONS)]
        asked = int(generator.integers(_RELATIONS))
        text = [_CLS, *facts[asked][:2], _SEP]
        for number, each in enumerate(facts):
            if number == asked:
                end[:] = len(text) + 2, len(text) + len(each) - 1
            text += [*each, _DOT]
        text.append(_SEP)
        row[: len(text)] = text
    ids = torch.from_numpy(rows)
    return Questions(ids, (ids != _PAD).long(), torch.from_numpy(ends))


def ends_of(model: Any, asked: Questions) -> Tensor:
    """Return what a model says of each token as the first and as the last of the answer, logits (B, 2, T)."""
    logits = model.answer("span", asked.ids, asked.mask).transpose(1, 2)
    return logits.masked_fill(asked.mask[:, None] == 0, -1e30)


@torch.no_grad()
def found(model: Any, asked: Questions) -> float:
    """Return the share of answers whose both ends are right."""
    with evaluating(model):
        said = torch.cat(
            [
                ends_of(model, Questions(*part)).argmax(-1)
                for part in zip(*(of.split(100) for of in asked), strict=True)
            ]
        )
    return float((said == asked.ends).all(1).float().mean())


class SpanQA:
    """A BERT of two layers that finds answers: pretrained on hidden words, and from scratch, with 500 labels."""

    name: ClassVar[str] = "span-qa"
    shows: ClassVar[str] = (
        "An encoder pretrained on hidden words finds answers after a few hundred labels that a fresh one misses."
    )
    source: ClassVar[str] = "Devlin et al., 2018"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("pretrained", ">=", 0.90),
        Bar("pretrained_over_scratch", ">=", 0.05),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Pretrain, and measure the share of 400 answers that each way finds without a fault."""
        generator = seeded(seed)
        pool = texts(generator, _TEXTS)
        labelled, judged = questions(generator, _LABELS), questions(generator, _JUDGED)

        def hidden() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for step in range(_PRETRAINING):
                rows = pool[generator.integers(0, len(pool), _ROWS)]
                rows = rows[:, : int((rows != _PAD).sum(1).max())]
                read, said = hide(np.where(rows == _PAD, IGNORE, rows), seed, step, VOCAB, _MASK)
                yield torch.from_numpy(read), torch.from_numpy(said), torch.from_numpy(rows != _PAD).long()

        def some() -> Iterator[Questions]:
            drawn = seeded(seed, stream=1)
            while True:
                order = torch.from_numpy(drawn.permutation(_LABELS))
                for part in order.view(-1, _LABELLED_ROWS):
                    yield Questions(*(of[part] for of in labelled))

        pretrained = fresh(_BERT, seed)
        losses = fit(
            pretrained, hidden(), _PRETRAINING, lr=3e-3, warmup=100, loss=lambda batch: pretrained(*batch),
            tell=named(tell, "pretraining"),
        )  # fmt: skip
        figures: dict[str, Any] = {"curve": mean_curve(losses), "parameters": parameters(pretrained)}
        for way in ("pretrained", "scratch"):
            model: Any = fresh(dataclasses.replace(_BERT, heads=("span",)), seed)
            if way == "pretrained":
                own = model.state_dict()
                learned = {name: p for name, p in pretrained.state_dict().items() if name in own}
                model.load_state_dict(own | learned)

            def loss(asked: Questions, model: Any = model) -> Tensor:
                return F.cross_entropy(ends_of(model, asked).flatten(0, 1), asked.ends.flatten())

            fit(model, some(), _STEPS, lr=1e-3, warmup=_STEPS // 10, loss=loss, tell=named(tell, way))
            figures[way] = found(model, judged)
            tell(f"{way}: {figures[way]:.3f} of the answers")
        figures["pretrained_over_scratch"] = figures["pretrained"] - figures["scratch"]
        return figures

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the share of answers that each way finds, by seed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for number, way in enumerate(("pretrained", "scratch")):
            shares = [result[way] for result in results.values()]
            axes.bar(np.arange(len(shares)) + 0.4 * number, shares, 0.4, label=way)
        axes.axhline(1 / _RELATIONS, color="black", linestyle="--", label="a guess among the facts")
        axes.set_xticks(np.arange(len(results)) + 0.2, [f"seed {seed}" for seed in results])
        axes.set_ylabel(f"answers found, {_LABELS} labels")
        axes.legend()
        figure.savefig(path, dpi=120)
