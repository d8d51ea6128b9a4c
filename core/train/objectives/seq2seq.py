"""Write the target of a source: how translation is learned (Sutskever et al., 2014, arXiv:1409.3215).

A source is read as sessions read it, with what the tokenizer puts around a text. The decoder reads a start token and
the target, and predicts the target and the end of text behind it. The start token is an id of its own behind those of
the tokenizer, or that of the checkpoint that a run begins with, and pads what is short.

B pairs, S source tokens, T target tokens, V vocabulary of the tokenizer.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portlm import models
from portlm.data.pairs import read_pairs
from portlm.errors import ConfigError, UsageError
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe
from portlm.train.bleu import check_sacrebleu, corpus_bleu
from portlm.train.config import DataSettings, PretrainConfig
from portlm.train.evaluation import evaluating
from portlm.train.initial import begun_from
from portlm.train.objectives import Stop, sides
from portlm.train.objectives.pairs import PairObjective
from portlm.train.objectives.sides import Part

_TRANSLATED = 64  # sources that are translated together
Tokens = tuple[list[int], list[int]]  # of a source and of its target, which has no end of text yet


@dataclasses.dataclass(frozen=True)
class PairCorpus:
    """Pairs to learn from and pairs to judge by, as tokens.

    Attributes:
        tokenizer: What made the tokens.
        end: The id that ends a target: the tokenizer's end of text or, without one, what it puts behind a text.
        train: The first pairs.
        validation: The last ones.
        digest: What identifies all tokens, for comparison with a checkpoint.
    """

    tokenizer: Tokenizer
    end: int
    train: list[Tokens]
    validation: list[Tokens]
    digest: dict[str, str]


def open_pairs(data: DataSettings, folder: Path, *, fresh: bool, note: Callable[[str], None]) -> PairCorpus:
    """Return the pairs of a run; a resumed one reads them again, with the tokenizer that it was begun with.

    Args:
        data: Where they are, and the tokenizer.
        folder: Where the run keeps its tokenizer.
        fresh: Whether the run begins.
        note: Told what is being done.

    Raises:
        UsageError: No pairs, too few, or a tokenizer without an end of text.
        FormatError: A file is missing or holds something else.
    """
    files = [data.source, data.target] if data.source else [*data.texts]
    if not files or len(files) > 2:
        raise UsageError(
            "pairs are learned from two files (--source and --target), or from one .tsv or .jsonl"
        )
    note(f"reading pairs from {' and '.join(filter(None, files))}")
    pairs = read_pairs(*files)
    kept = max(1, round(data.validation_fraction * len(pairs)))
    if len(pairs) - kept < 1:
        raise UsageError(f"{len(pairs)} pairs are too few: one must be left to judge by")
    learned = pairs[:-kept]
    if not fresh and (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
    else:
        tokenizer = tokenizer_for(data.tokenizer, (side for pair in learned for side in pair), note)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    ends = [*tokenizer.end_ids[-1:]] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if not ends:
        raise UsageError(f"{data.tokenizer} has no token that ends a text, by which a target would end")
    tokens = [
        (tokenizer.encode(source), tokenizer.encode(target, add_special_tokens=False))
        for source, target in pairs
    ]
    digest = hashlib.sha256(repr(tokens).encode()).hexdigest()
    return PairCorpus(tokenizer, ends[0], tokens[:-kept], tokens[-kept:], {"pairs": digest})


def tokenizer_for(name: str, texts: Iterable[str], note: Callable[[str], None]) -> Tokenizer:
    """Return the tokenizer that settings name, learned from texts where they ask for one."""
    kind, _, size = name.partition(":")
    if kind == "bpe":
        note(f"training a byte-pair tokenizer of {size} tokens")
        return train_bpe(list(texts), int(size))
    return byte_tokenizer(eos=END_OF_TEXT) if name == "byte" else Tokenizer.load(Path(name))


def _writing(corpus: PairCorpus, config: models.Config) -> models.Config:
    """Return what begins as a checkpoint: the same again, or what writes behind it and starts as its texts do."""
    writers = [family for family in models.FAMILIES.values() if family.begins_as == config.family]
    if not writers:
        return config
    kind: Any = writers[0].config_class()
    start = next(iter(corpus.tokenizer.begin_ids), corpus.end)
    written: models.Config = dataclasses.replace(
        kind.of(config), decoder_start_token_id=start, eos_token_ids=(corpus.end,)
    )
    return written


class Seq2SeqObjective(PairObjective):
    """Cross-entropy of the target's tokens, with smoothed labels; judged without, on pairs that were not learned from.

    Args:
        config: The settings of the run.
        corpus: The pairs.
        device: Where the model trains.
    """

    kind = "seq2seq"
    open_corpus = staticmethod(open_pairs)

    def __init__(self, config: PretrainConfig, corpus: PairCorpus, device: torch.device):
        V, self.end = corpus.tokenizer.vocab_size, corpus.end
        model = begun_from(config.init, partial(_writing, corpus))[0] if config.init else None
        shape: Any = config.model.config(V + 1, (self.end,)) if model is None else model.config
        if models.FAMILIES[shape.family].kind != "encoder-decoder":
            raise ConfigError(f"model.family {shape.family} has no encoder that could read a source")
        if model is None:
            shape = dataclasses.replace(shape, decoder_start_token_id=V, pad_token_id=V)
        self.start = shape.decoder_start_token_id
        if config.evaluation.translations:
            check_sacrebleu()
        super().__init__(config, corpus, device, models.build(shape) if model is None else model)

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per target token, of the held-out pairs, and ``bleu`` if asked for."""
        found = super().evaluate(stop)
        wanted = self.config.evaluation.translations
        if found is not None and wanted:
            score = self._bleu(self.judged[:wanted], stop)
            if score is None:
                return None
            found["bleu"] = score
        return found

    def _bleu(self, pairs: Sequence[Tokens], stop: Stop) -> float | None:
        """Return BLEU of greedy translations, each of which may have twice the tokens of its source and a few."""
        decode, longest = self.corpus.tokenizer.decode, self.model.config.context_length - 1
        pairs, written = sorted(pairs, key=lambda pair: len(pair[0])), []
        with evaluating(self.model):
            session = self._session()
            for begin in range(0, len(pairs), _TRANSLATED):
                if stop():
                    return None
                sources = [source for source, _ in pairs[begin : begin + _TRANSLATED]]
                limits = [min(longest, 2 * len(source) + 8) for source in sources]
                found = session.translate(sources, max_new_tokens=limits, batch_size=_TRANSLATED)
                written += [each.text.strip() for each in found]
        return corpus_bleu(written, [decode(target) for _, target in pairs]).score

    def _session(self) -> Any:
        """The model as it stands, on the torch engine."""
        from portlm.runtimes.eager import TorchEngine
        from portlm.runtimes.session import Session

        engine = TorchEngine.of(self.model, str(self.device))
        return Session(engine, self.corpus.tokenizer, (self.end,), start_ids=(self.start,))

    def sample(self, stop: Stop) -> str | None:
        """Return the first pair that was not learned from, and below it what the model writes for its source."""
        limit = min(self.config.evaluation.sample_tokens, self.model.config.context_length - 1)
        if not limit or stop():
            return None
        (source, target), decode = self.judged[0], self.corpus.tokenizer.decode
        with evaluating(self.model):
            written = self._session().generate(source, max_new_tokens=limit).text
        return f"{decode(source)}\n{decode(target)}\n{written}"

    def fits(self, pair: Tokens, shape: Any) -> bool:
        """Say whether source, and target with its end, are no longer than the context."""
        return bool(max(len(pair[0]), len(pair[1]) + 1) <= shape.context_length)

    def lengths(self, pair: Tokens) -> tuple[int, int]:
        """Return the tokens of both sides."""
        return len(pair[0]), len(pair[1])

    def targets_of(self, pair: Tokens) -> int:
        """Return the tokens of the target and its end."""
        return len(pair[1]) + 1

    def part(self, pairs: Sequence[Tokens], total: int) -> Part:
        """Return pairs as tensors, of a batch with so many targets."""
        sources = [source for source, _ in pairs]
        targets = [[*target, self.end] for _, target in pairs]
        read = [[self.start, *target] for _, target in pairs]
        return sides.part(sources, read, targets, pad=self.start, total=total, device=self.device)

    def mean(self, part: Part, label_smoothing: float) -> Tensor:
        """Return the mean cross-entropy over the targets of a part."""
        loss: Tensor = self.model(part.source, part.read, part.targets, part.mask, label_smoothing)
        return loss
