"""Write the target of a source: how translation is learned (Sutskever et al., 2014, arXiv:1409.3215).

A source is read as sessions read it, with what the tokenizer puts around a text. The decoder reads a start token and
the target, and predicts the target and the end of text behind it. The start token is an id of its own behind those of
the tokenizer, and pads what is short.

B pairs, S source tokens, T target tokens, V vocabulary of the tokenizer.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from portlm import models
from portlm.data.batches import IGNORE
from portlm.data.pairs import PairSampler, padded, read_pairs
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe
from portlm.train.bleu import check_sacrebleu, corpus_bleu
from portlm.train.config import DataSettings, PretrainConfig
from portlm.train.evaluation import evaluating
from portlm.train.objectives import Stop

_TRANSLATED = 64  # sources that are translated together
Tokens = tuple[list[int], list[int]]  # of a source and of its target, which has no end of text yet


@dataclasses.dataclass(frozen=True)
class PairCorpus:
    """Pairs to learn from and pairs to judge by, as tokens.

    Attributes:
        tokenizer: What made the tokens; it has an end of text.
        train: The first pairs.
        validation: The last ones.
        digest: What identifies all tokens, for comparison with a checkpoint.
    """

    tokenizer: Tokenizer
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
        tokenizer = _tokenizer(data.tokenizer, learned, note)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    if tokenizer.eos_id is None:
        raise UsageError(f"{data.tokenizer} has no token that ends a text, by which a target would end")
    tokens = [
        (tokenizer.encode(source), tokenizer.encode(target, add_special_tokens=False))
        for source, target in pairs
    ]
    digest = hashlib.sha256(repr(tokens).encode()).hexdigest()
    return PairCorpus(tokenizer.without_template(), tokens[:-kept], tokens[-kept:], {"pairs": digest})


def _tokenizer(name: str, pairs: Sequence[tuple[str, str]], note: Callable[[str], None]) -> Tokenizer:
    kind, _, size = name.partition(":")
    if kind == "bpe":
        note(f"training a byte-pair tokenizer of {size} tokens")
        return train_bpe([side for pair in pairs for side in pair], int(size))
    return byte_tokenizer(eos=END_OF_TEXT) if name == "byte" else Tokenizer.load(Path(name))


class Part(NamedTuple):
    """Some pairs of a step's batch.

    Attributes:
        source: (B, S) int64.
        mask: (B, S) int64, 0 on padding.
        read: (B, T) int64, the start token and the target.
        targets: (B, T) int64, the target and the end of text; -100 behind that.
        share: Of the batch's targets that are in these rows.
    """

    source: Tensor
    mask: Tensor
    read: Tensor
    targets: Tensor
    share: float


class Seq2SeqObjective:
    """Cross-entropy of the target's tokens, with smoothed labels; judged without, on pairs that were not learned from.

    Args:
        config: The settings of the run.
        corpus: The pairs.
        device: Where the model trains.
    """

    kind = "seq2seq"
    open_corpus = staticmethod(open_pairs)

    def __init__(self, config: PretrainConfig, corpus: PairCorpus, device: torch.device):
        self.config, self.corpus, self.device = config, corpus, device
        V, eos = corpus.tokenizer.vocab_size, corpus.tokenizer.eos_id
        assert eos is not None  # open_pairs saw to it
        self.start, self.end, self.parts = V, eos, config.data.accumulate
        shape: Any = config.model.config(V + 1, (eos,))
        if models.FAMILIES[shape.family].kind != "encoder-decoder":
            raise ConfigError(f"model.family {shape.family} has no encoder that could read a source")
        shape = dataclasses.replace(shape, decoder_start_token_id=self.start, pad_token_id=self.start)
        self.pairs, self.judged = (
            [pair for pair in pairs if max(len(pair[0]), len(pair[1]) + 1) <= shape.context_length]
            for pairs in (corpus.train, corpus.validation)
        )
        if not self.judged:
            raise UsageError(f"no pair to judge by fits the context of {shape.context_length} tokens")
        self.model: Any = models.build(shape).to(device)
        lengths = np.array([(len(source), len(target)) for source, target in self.pairs]).reshape(-1, 2)
        self.sampler = PairSampler(lengths, config.data.batch_size * self.parts, config.seed)
        self._tokens = float(lengths.sum(axis=1).mean()) + 1
        if config.evaluation.translations:
            check_sacrebleu()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of sources and targets that a step reads, on average."""
        return round(self._tokens * self.sampler.batch_size)

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and data, and how many pairs do not fit the context."""
        every = len(self.corpus.train) + len(self.corpus.validation)
        return {
            "vocab_size": self.model.config.vocab_size,
            "train_pairs": len(self.pairs),
            "held_out_pairs": len(self.judged),
            "pairs_left_out": every - len(self.pairs) - len(self.judged),
        }

    def batches(self) -> Sequence[Part]:
        """Return pairs of like length, in as many parts as the settings say."""
        chosen = [self.pairs[i] for i in next(self.sampler).tolist()]
        total = sum(len(target) + 1 for _, target in chosen)
        rows = len(chosen) // self.parts
        return [self._part(chosen[i : i + rows], total) for i in range(0, len(chosen), rows)]

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the targets of a part, weighted by how many of the batch they are."""
        smoothing = self.config.label_smoothing
        loss: Tensor = self.model(batch.source, batch.read, batch.targets, batch.mask, smoothing)
        return loss * batch.share

    def metrics(self) -> dict[str, float]:
        """Return nothing further."""
        return {}

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per target token, of the held-out pairs, and ``bleu`` if asked for."""
        total, count = 0.0, 0
        with evaluating(self.model), torch.no_grad():
            for part in self._judged():
                if stop():
                    return None
                n = int((part.targets != IGNORE).sum())
                total += self.model(part.source, part.read, part.targets, part.mask).item() * n
                count += n
        found = {"loss": total / count}
        if wanted := self.config.evaluation.translations:
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
        return Session(engine, self.corpus.tokenizer, start_ids=(self.start,))

    def sample(self, stop: Stop) -> str | None:
        """Return the first pair that was not learned from, and below it what the model writes for its source."""
        limit = min(self.config.evaluation.sample_tokens, self.model.config.context_length - 1)
        if not limit or stop():
            return None
        (source, target), decode = self.judged[0], self.corpus.tokenizer.decode
        with evaluating(self.model):
            written = self._session().generate(source, max_new_tokens=limit).text
        return f"{decode(source)}\n{decode(target)}\n{written}"

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer."""
        models.save_model(folder, self.model, self.corpus.tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return where the sampler of batches stands, and what identifies the pairs."""
        return {"step": self.sampler.step, "data": self.corpus.digest}, {}

    def restore(self, folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Raises:
            FormatError: The state is damaged, or the weights do not fit this model.
            ConfigError: It was trained on other pairs.
        """
        if type(state.get("step")) is not int or state["step"] < 0:
            raise FormatError(f"the state in {folder} says nothing of the sampler of batches")
        if state.get("data") != self.corpus.digest:
            raise ConfigError(
                "the pairs are not those of the checkpoint: resume with the same files and tokenizer"
            )
        self.model.load_state_dict(models.load_model(folder).state_dict())
        self.sampler.step = state["step"]

    def _judged(self) -> Iterator[Part]:
        """Yield the pairs to judge by in batches of like length."""
        order = sorted(range(len(self.judged)), key=lambda i: tuple(map(len, self.judged[i])))
        size = self.config.data.batch_size
        for begin in range(0, len(order), size):
            yield self._part([self.judged[i] for i in order[begin : begin + size]], 1)

    def _part(self, pairs: Sequence[Tokens], total: int) -> Part:
        sources = [source for source, _ in pairs]
        targets = [[*target, self.end] for _, target in pairs]
        source = padded(sources, self.start)
        mask = (np.arange(source.shape[1]) < np.array([len(row) for row in sources])[:, None]).astype(
            np.int64
        )
        read = padded([[self.start, *target] for _, target in pairs], self.start)
        arrays = source, mask, read, padded(targets, IGNORE)
        text, there, begun, wanted = (torch.from_numpy(array).to(self.device) for array in arrays)
        return Part(text, there, begun, wanted, sum(map(len, targets)) / total)
