"""Say which label a text has: how a pretrained model is put to a task.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, for decoders; Devlin et al., 2018
(arXiv:1810.04805), for encoders. The loss is the cross-entropy of the label and, of a decoder, ``lm_coef`` times that
of the text's own tokens, which keeps it a language model (``L3 = L2 + lambda L1`` in section 3.2 of the first). Both
are means, over the texts and over the tokens of a batch.

A decoder reads ``_start_ text _classify_`` and answers at the last token, of pairs ``_start_ text _delimiter_ other
_classify_``; an encoder reads ``[CLS] text [SEP]`` and so on (portlm.control_tokens). These tokens are added to a
tokenizer that has none, with fresh rows in the token table.

B texts, T tokens, N labels.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm import models
from portlm.control_tokens import for_labelling, for_reading
from portlm.data.batches import IGNORE
from portlm.data.labelled import EpochSampler, Labelled, labels_in, parted, read_labelled
from portlm.data.pairs import padded
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.models import FAMILIES, Config
from portlm.models.causal import last_of
from portlm.models.heads import CLASSIFY, with_labels
from portlm.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from portlm.train.config import DataSettings, PretrainConfig
from portlm.train.evaluation import evaluating
from portlm.train.initial import begun_from, family_of, with_ids
from portlm.train.objectives import Stop


@dataclass(frozen=True)
class LabelledCorpus:
    """Texts with labels.

    Attributes:
        tokenizer: What makes tokens of them.
        rows: To learn from, or to be parted.
        held_out: To judge by; None for a part of the others.
        labels: Their names in order.
        digest: What identifies all of it, for comparison with a checkpoint.
    """

    tokenizer: Tokenizer
    rows: list[Labelled]
    held_out: list[Labelled] | None
    labels: tuple[str, ...]
    digest: str


def open_labelled(
    data: DataSettings, folder: Path, *, fresh: bool, note: Callable[[str], None]
) -> LabelledCorpus:
    """Return the texts of a run; a resumed one reads them again, with the tokenizer that it was begun with.

    Args:
        data: Where they are, and the tokenizer.
        folder: Where the run keeps its tokenizer.
        fresh: Whether the run begins.
        note: Told what is being done.

    Raises:
        UsageError: No file, one label alone, or held-out texts with others.
        FormatError: A file is missing or holds something else.
    """
    if not data.texts:
        raise UsageError("no texts with labels: name at least one .tsv or .jsonl file")
    files = (*data.texts, *((data.held_out,) if data.held_out else ()))
    note(f"reading texts with labels from {' and '.join(files)}")
    rows = [row for path in data.texts for row in read_labelled(path)]
    labels = labels_in(rows, " and ".join(data.texts))
    held_out = read_labelled(data.held_out) if data.held_out else None
    if others := sorted({row.label for row in held_out or ()} - {*labels}):
        raise UsageError(
            f"{data.held_out} has the label {others[0]}, of which there is no text to learn from"
        )
    kinds = {row.other is None for row in (*rows, *(held_out or ()))}
    if len(kinds) > 1:
        raise UsageError(f"{' and '.join(files)}: some hold pairs and some single texts")
    texts = (text for row in rows for text in (row.text, row.other) if text)
    tokenizer = kept_tokenizer(data.tokenizer, folder, texts, fresh=fresh, note=note)
    said = repr((rows, held_out, tokenizer.sha256))
    return LabelledCorpus(tokenizer, rows, held_out, labels, hashlib.sha256(said.encode()).hexdigest())


def kept_tokenizer(
    name: str, folder: Path, texts: Iterable[str], *, fresh: bool, note: Callable[[str], None]
) -> Tokenizer:
    """Return the tokenizer of a run, which keeps it in a folder; one that goes on has it from there.

    Args:
        name: ``data.tokenizer`` of the settings.
        folder: Where the run keeps it.
        texts: What a new one is made from.
        fresh: Whether the run begins.
        note: Told what is being done.
    """
    if not fresh and (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    kind, _, size = name.partition(":")
    if kind == "bpe":
        note(f"training a byte-pair tokenizer of {size} tokens")
        tokenizer = train_bpe([*texts], int(size))
    else:
        tokenizer = byte_tokenizer() if name == "byte" else Tokenizer.load(Path(name))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return tokenizer


class Row(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: At most as many as the context holds.
        types: As many, 0 for the first text and 1 for the second, of an encoder.
        label: Its number.
    """

    ids: list[int]
    types: list[int]
    label: int


class Part(NamedTuple):
    """Some texts of a step's batch.

    Attributes:
        ids: (B, T) int64, padded on the right.
        mask: (B, T) int64, 0 on padding.
        types: (B, T) int64.
        labels: (B,) int64.
        share: Of the batch's texts that are in these rows.
        token_share: Of the batch's tokens that are predicted.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor
    labels: Tensor
    share: float
    token_share: float


class ClassifyObjective:
    """Cross-entropy of labels; judged by that and by how many are right, on texts that were not learned from.

    Args:
        config: The settings of the run.
        corpus: The texts.
        device: Where the model trains.

    Raises:
        ConfigError: The family has no head for labels, or the settings do not fit it.
    """

    kind = "classify"
    open_corpus: ClassVar[Callable[..., Any]] = staticmethod(open_labelled)

    def __init__(self, config: PretrainConfig, corpus: Any, device: torch.device):
        self.config, self.corpus, self.device, self.labels = config, corpus, device, corpus.labels
        family = family_of(config)
        self.encoder = FAMILIES[family].kind == "encoder"
        if self.encoder and config.lm_coef not in (0, PretrainConfig.lm_coef):
            raise ConfigError(f"lm_coef is for decoders, and {family} is an encoder: leave it out")
        self.tokenizer = for_reading(corpus.tokenizer)[0] if self.encoder else for_labelling(corpus.tokenizer)
        self.model: Any = self._model().to(device)
        if config.lm_coef and not self.encoder and not self.model.generates:
            raise ConfigError(
                f"lm_coef {config.lm_coef:g} has the model predict its text, and a {family} with an output matrix of "
                "its own has none beside labels: set lm_coef = 0"
            )
        self.context, self.parts = self.model.config.context_length, config.data.accumulate
        if self.context <= len(self.tokenizer.begin_ids) + len(self.tokenizer.end_ids) + 1:
            raise ConfigError(
                f"a context of {self.context} tokens holds no text beside control tokens: take a larger one"
            )
        learned, judged = corpus.rows, corpus.held_out
        if judged is None:
            learned, judged = parted(corpus.rows, config.data.validation_fraction, config.seed)
        self.cut = 0
        self.rows, self.judged = self._rows(learned), self._rows(judged)
        self.texts = [row.text for row in judged]
        self.sampler = EpochSampler(len(self.rows), config.data.batch_size * self.parts, config.seed)

    def _model(self) -> Any:
        """The model with a head for the labels, fresh or begun from a checkpoint."""
        V, eos = self.tokenizer.vocab_size, self.tokenizer.eos_id
        if not self.config.init:
            ends = () if eos is None else (eos,)
            return models.build(with_labels(self.config.model.config(V, ends), self.labels))

        def change(config: Config) -> Config:
            labelled: Config = with_labels(with_ids(V, config), self.labels)
            return labelled

        return begun_from(self.config.init, change)[0]

    def _rows(self, texts: Sequence[Any]) -> list[Any]:
        """Texts as tokens; of one that is longer than the context the last are left out, save what it ends with."""
        numbers = {name: i for i, name in enumerate(self.labels)}
        ends, rows = len(self.tokenizer.end_ids), []
        for text in texts:
            ids, types = self.tokenizer.encode_typed(text.text, text.other)
            if len(ids) > self.context:
                self.cut += 1
                kept, after = self.context - ends, len(ids) - ends
                ids, types = [*ids[:kept], *ids[after:]], [*types[:kept], *types[after:]]
            rows.append(Row(ids, types, numbers[text.label]))
        return rows

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads, on average."""
        total = sum(len(row.ids) for row in self.rows)
        return max(1, total // self.sampler.steps_per_epoch)

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and data, and how many held-out texts have their most frequent label."""
        return {
            "vocab_size": self.model.config.vocab_size,
            "labels": len(self.labels),
            "train_texts": len(self.rows),
            "held_out_texts": len(self.judged),
            "held_out_of_one_label": max(Counter(row.label for row in self.judged).values()),
            "texts_cut": self.cut,
            "steps_per_epoch": self.sampler.steps_per_epoch,
        }

    def batches(self) -> Sequence[Part]:
        """Return texts of this epoch that were not seen yet, in at most as many parts as the settings say."""
        chosen = [self.rows[i] for i in next(self.sampler).tolist()]
        size = self.config.data.batch_size
        tokens = sum(len(row.ids) - 1 for row in chosen)
        return [self._part(chosen[i : i + size], len(chosen), tokens) for i in range(0, len(chosen), size)]

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the texts of a part, weighted by their share in the batch, and what lm_coef adds."""
        if self.encoder or not self.config.lm_coef:
            return F.cross_entropy(self._logits(batch), batch.labels) * batch.share
        y = self.model.encode(batch.ids)
        logits = self.model.apply_head(CLASSIFY, last_of(y, batch.mask))
        following = torch.where(batch.mask[:, 1:] == 1, batch.ids[:, 1:], IGNORE)
        predicted = self.model.loss(y, F.pad(following, (0, 1), value=IGNORE))
        said = F.cross_entropy(logits, batch.labels) * batch.share
        loss: Tensor = said + self.config.lm_coef * predicted * batch.token_share
        return loss

    def metrics(self) -> dict[str, float]:
        """Return nothing further."""
        return {}

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per label, and the share of labels that are right."""
        total, right = 0.0, 0
        with evaluating(self.model), torch.no_grad():
            for part in self._held_out():
                if stop():
                    return None
                logits = self._logits(part).float()
                total += F.cross_entropy(logits, part.labels, reduction="sum").item()
                right += int((logits.argmax(-1) == part.labels).sum())
        return {"loss": total / len(self.judged), "accuracy": right / len(self.judged)}

    def sample(self, stop: Stop) -> str | None:
        """Return the beginning of a held-out text, its label, and what the model says."""
        if not self.config.evaluation.sample_tokens or stop():
            return None
        row = self.judged[0]
        with evaluating(self.model), torch.no_grad():
            shares = self._logits(self._part([row], 1, 1)).float().softmax(-1)[0]
        guess = int(shares.argmax())
        shown = self.texts[0][: self.config.evaluation.sample_tokens]
        return f"{shown}\n{self.labels[row.label]}; said: {self.labels[guess]} ({shares[guess]:.2f})"

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer."""
        models.save_model(folder, self.model, self.tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return where the sampler stands, and what identifies the texts."""
        return {"step": self.sampler.step, "data": self.corpus.digest}, {}

    def restore(self, folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Raises:
            FormatError: The state is damaged.
            ConfigError: It was trained on other texts, or is another model.
        """
        if type(state.get("step")) is not int or state["step"] < 0:
            raise FormatError(f"the state in {folder} says nothing of the sampler of batches")
        if state.get("data") != self.corpus.digest:
            raise ConfigError(
                "the texts are not those of the checkpoint: resume with the same files and tokenizer"
            )
        found = models.load_model(folder)
        if models.expected_shapes(found.config) != models.expected_shapes(self.model.config):
            raise ConfigError(f"{folder} is another model than {self.config.init}: resume with the same init")
        self.model.load_state_dict(found.state_dict())
        self.sampler.step = state["step"]

    def _logits(self, batch: Part) -> Tensor:
        logits: Tensor = self.model.answer(CLASSIFY, batch.ids, batch.mask, batch.types)
        return logits

    def _held_out(self) -> Iterator[Part]:
        """Yield the texts to judge by in batches of like length."""
        order = sorted(range(len(self.judged)), key=lambda i: len(self.judged[i].ids))
        size = self.config.data.batch_size
        for begin in range(0, len(order), size):
            yield self._part([self.judged[i] for i in order[begin : begin + size]], 1, 1)

    def _part(self, rows: Sequence[Row], total: int, tokens: int) -> Part:
        ids, types = padded([row.ids for row in rows], 0), padded([row.types for row in rows], 0)
        lengths = np.array([len(row.ids) for row in rows])
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        arrays = ids, mask, types, np.array([row.label for row in rows], np.int64)
        read, shown, kinds, labels = (torch.from_numpy(array).to(self.device) for array in arrays)
        return Part(read, shown, kinds, labels, len(rows) / total, int(lengths.sum() - len(rows)) / tokens)
