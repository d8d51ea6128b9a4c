"""Find the part of a text that answers a question: two numbers for each token, one as its beginning, one as its end.

Devlin et al., 2018 (arXiv:1810.04805), section 4.2. An encoder reads ``[CLS] question [SEP] text [SEP]``; the loss is
the mean of the cross-entropies of the first and of the last token of the answer, among all tokens of the row. Where the
text holds no answer, or the context has cut it off, both are the first token, [CLS] (section 4.3).

B questions, T tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm import models
from portlm.data.labelled import parted
from portlm.data.questions import Question, read_questions, tokens_of
from portlm.errors import ConfigError, UsageError
from portlm.models import FAMILIES, Config
from portlm.runtimes.answers import best_passage
from portlm.token_spans import Span, token_spans
from portlm.tokenizer import Tokenizer
from portlm.train.config import DataSettings, PretrainConfig
from portlm.train.evaluation import evaluating
from portlm.train.initial import begun_from, family_of, with_ids
from portlm.train.objectives import Stop
from portlm.train.objectives.classify import ClassifyObjective, Part, kept_tokenizer

SPAN = "span"  # the head
_LONGEST = 30  # tokens of an answer, as Devlin et al. have it


@dataclass(frozen=True)
class QuestionCorpus:
    """Questions with their texts; what it has is what a corpus of texts with labels has."""

    tokenizer: Tokenizer
    rows: list[Question]
    held_out: list[Question] | None
    labels: tuple[str, ...]
    digest: str


class Row(NamedTuple):
    """A question and its text as tokens.

    Attributes:
        ids: At most as many as the context holds.
        types: As many.
        label: Places of the first and the last token of the answer, (0, 0) for none.
        first: The place of the text's first token.
        spans: The characters of each of its tokens that are in the row.
    """

    ids: list[int]
    types: list[int]
    label: Span
    first: int
    spans: list[Span]


def open_questions(
    data: DataSettings, folder: Path, *, fresh: bool, note: Callable[[str], None]
) -> QuestionCorpus:
    """Return the questions of a run; a resumed one reads them again, with the tokenizer that it was begun with.

    Raises:
        UsageError: No file.
        FormatError: A file is missing or holds something else.
    """
    if not data.texts:
        raise UsageError("no questions: name at least one .jsonl file")
    files = (*data.texts, *((data.held_out,) if data.held_out else ()))
    note(f"reading questions from {' and '.join(files)}")
    rows = [row for path in data.texts for row in read_questions(path)]
    held_out = read_questions(data.held_out) if data.held_out else None
    texts = (text for row in rows for text in (row.question, row.text))
    tokenizer = kept_tokenizer(data.tokenizer, folder, texts, fresh=fresh, note=note)
    said = repr((rows, held_out, tokenizer.sha256))
    return QuestionCorpus(tokenizer, rows, held_out, (), hashlib.sha256(said.encode()).hexdigest())


class AnswerObjective(ClassifyObjective):
    """Cross-entropy of where answers begin and end; judged by that and by how many are found without a fault."""

    kind = "answer"
    open_corpus: ClassVar[Callable[..., Any]] = staticmethod(open_questions)

    def __init__(self, config: PretrainConfig, corpus: QuestionCorpus, device: torch.device):
        family = family_of(config)
        able = [name for name, it in FAMILIES.items() if _has_head(it.config_class())]
        if family not in able:
            raise ConfigError(
                f"objective answer needs a head for the ends of a passage, and a {family} has none: set "
                f"model.family = {' or '.join(able)}"
            )
        self.answers_cut = 0
        self.asked: list[Question] = (
            corpus.held_out or parted(corpus.rows, config.data.validation_fraction, config.seed)[1]
        )
        super().__init__(config, corpus, device)

    def _model(self) -> Any:
        """The encoder with a head for spans, fresh or begun from a checkpoint."""
        V, eos = self.tokenizer.vocab_size, self.tokenizer.eos_id
        if not self.config.init:
            return models.build(_with_span(self.config.model.config(V, () if eos is None else (eos,))))
        return begun_from(self.config.init, lambda config: _with_span(with_ids(V, config)))[0]

    def _rows(self, texts: Sequence[Any]) -> list[Any]:
        """Questions and texts as tokens; of a text that is too long the end is left out."""
        ends, rows = len(self.tokenizer.end_ids), []
        for asked in texts:
            ids, types = self.tokenizer.encode_typed(asked.question, asked.text)
            own, spans = token_spans(self.tokenizer, asked.text)
            first = len(ids) - ends - len(own)
            if ids[first : first + len(own)] != own:
                raise ConfigError("the tokenizer changes a text behind a question: no answer can be placed")
            if first + ends >= self.context:
                raise ConfigError(
                    f"a question of {first} tokens leaves no room in a context of {self.context}: take a larger one"
                )
            kept = min(len(own), self.context - first - ends)
            self.cut += kept < len(own)
            found = tokens_of((asked.start, asked.start + len(asked.answer)), spans)
            self.answers_cut += found is not None and found[1] >= kept
            label = (0, 0)
            if found is not None and found[1] < kept:
                label = first + found[0], first + found[1]
            ids, types = ([*row[: first + kept], *row[first + len(own) :]] for row in (ids, types))
            rows.append(Row(ids, types, label, first, spans[:kept]))
        return rows

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and data, and what the context cut off."""
        return {
            "vocab_size": self.model.config.vocab_size,
            "train_questions": len(self.rows),
            "held_out_questions": len(self.judged),
            "texts_cut": self.cut,
            "answers_cut": self.answers_cut,
            "steps_per_epoch": self.sampler.steps_per_epoch,
        }

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the questions of a part and both ends, weighted by its share in the batch."""
        logits = self._ends(batch)  # (B, 2, T)
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()) * batch.share

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per end, and ``exact``, the share of answers that are found without a fault."""
        total, right = 0.0, 0
        none = any(not asked.answer for asked in self.asked)
        with evaluating(self.model), torch.no_grad():
            size = self.config.data.batch_size
            for begin in range(0, len(self.judged), size):
                if stop():
                    return None
                rows = self.judged[begin : begin + size]
                part = self._part(rows, 1, 1)
                logits = self._ends(part).float()
                wanted = part.labels.flatten()
                total += F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum").item() / 2
                for row, asked, ends in zip(
                    rows, self.asked[begin : begin + size], logits.cpu().numpy(), strict=True
                ):
                    right += _said(row, asked.text, ends, none) == asked.answer
        return {"loss": total / len(self.judged), "exact": right / len(self.judged)}

    def sample(self, stop: Stop) -> str | None:
        """Return a held-out question, its answer, and what the model finds."""
        if not self.config.evaluation.sample_tokens or stop():
            return None
        asked, row = self.asked[0], self.judged[0]
        with evaluating(self.model), torch.no_grad():
            ends = self._ends(self._part([row], 1, 1)).float()[0].cpu().numpy()
        return f"{asked.question}\n{asked.answer}; said: {_said(row, asked.text, ends, none=False)}"

    def _ends(self, batch: Part) -> Tensor:
        """Logits (B, 2, T) of each token as first and as last of the answer; padding is neither."""
        logits = self.model.answer(SPAN, batch.ids, batch.mask, batch.types).transpose(1, 2)
        return logits.masked_fill(batch.mask[:, None] == 0, -1e30)


def _said(row: Row, text: str, ends: np.ndarray, none: bool) -> str:
    """Return the part of a text that logits (2, T) say, "" for none where there may be none."""
    allowed = np.zeros(ends.shape[1], bool)
    allowed[row.first : row.first + len(row.spans)] = [begin < end for begin, end in row.spans]
    if not allowed.any():
        return ""
    start, end, best, nothing = best_passage(ends[0], ends[1], allowed, _LONGEST)
    if none and nothing > best:
        return ""
    return text[row.spans[start - row.first][0] : row.spans[end - row.first][1]]


def _has_head(kind: Any) -> bool:
    return (SPAN,) in getattr(kind, "ARCHITECTURES", {}).values()


def _with_span(config: Config) -> Config:
    changed: Config = replace(config, heads=(SPAN,), labels=(), problem=None)
    return changed
