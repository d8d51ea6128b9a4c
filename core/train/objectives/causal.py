"""Predict the next token from all before it: how every decoder is pretrained."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from portlm.data.batches import IGNORE
from portlm.data.documents import DocumentSampler, Rows, end_of_text, pieces_of, rows_of
from portlm.data.packing import first_fit
from portlm.errors import ConfigError
from portlm.models import FAMILIES
from portlm.runtimes.decoding import Decoding
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.evaluation import evaluate, evaluating, prompt_ids, sample
from portlm.train.objectives import Stop
from portlm.train.objectives.text import Batch, TextObjective


class Part(NamedTuple):
    """Rows of documents.

    Attributes:
        inputs: What the model is given: ids, targets and positions (B, T) int64, and the bias (B, 1, T, T).
        share: Of the step's predicted tokens that are in these rows.
    """

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    share: float


class CausalObjective(TextObjective):
    """Cross-entropy of the next token; judged on held-out text in nats per token and in bits per byte."""

    kind = "causal"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        if self.packed and not self.model.packs:
            raise ConfigError(
                f"data.packing = documents hides other texts by a bias on scores, and attention of {self.family} with "
                "a soft cap takes none: set data.packing = stream"
            )

    @property
    def packed(self) -> bool:
        """Whether rows are whole documents."""
        return self.config.data.packing == "documents"

    def check(self) -> None:
        """Refuse a family that does not continue texts, and a prompt of the samples that is longer than the context."""
        family = self.family
        if FAMILIES[family].kind == "encoder":
            raise ConfigError(
                f"objective causal is for models that continue a text, and a {family} reads whole ones: set "
                "objective = masked"
            )
        if self.packed and FAMILIES[family].kind != "decoder":
            raise ConfigError(
                f"data.packing = documents is for decoders with attention, and {family} is none: set "
                "data.packing = stream"
            )
        prompt_ids(self.corpus.tokenizer, self.config.evaluation.prompt, self.context)

    def sampled(self, rows: int) -> Any:
        """Return what a step reads."""
        if not self.packed:
            return super().sampled(rows)
        end = end_of_text(self.corpus.tokenizer)
        return DocumentSampler(self.corpus.train, end, rows, self.context, self.config.seed)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads, of documents on average."""
        return self.sampler.tokens_per_step if self.packed else super().tokens_per_step

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and text, and of documents how many rows they are packed into."""
        if not self.packed:
            return super().facts()
        rows = {"rows": len(self.sampler.rows), "steps_per_epoch": self.sampler.epochs.steps_per_epoch}
        return super().facts() | rows | {"percent_filled": round(100 * self.sampler.filled)}

    def batches(self) -> Sequence[Any]:
        """Return windows, or rows of documents, in parts."""
        return self._parts(next(self.sampler)) if self.packed else super().batches()

    def loss(self, batch: Batch | Part) -> Tensor:
        """Return the mean over the tokens of a part, times its share in the tokens of the step."""
        if isinstance(batch, Part):
            return self.model(*batch.inputs) * batch.share
        loss: Tensor = self.model(*batch)
        return loss if self.parts == 1 else loss / self.parts

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` and ``bits_per_byte`` of the held-out text."""
        if self.packed:
            return self._evaluate_documents(stop)
        held_out = self.corpus.held_out(self.config.evaluation.max_tokens)
        found = evaluate(self.model, held_out, self.config.data.batch_size, self.device, stop)
        return None if found is None else asdict(found)

    def _parts(self, rows: Rows) -> list[Part]:
        """Return rows as parts of at most as many as fit a pass."""
        size, total = self.config.data.batch_size, int((rows.targets != IGNORE).sum())
        parts = []
        for begin in range(0, len(rows.targets), size):
            inside = slice(begin, begin + size)
            packed = type(rows.packed)(*(array[inside] for array in rows.packed))
            arrays = packed.ids, rows.targets[inside], packed.positions, packed.bias(causal=True)
            ids, targets, positions, bias = (torch.from_numpy(array).to(self.device) for array in arrays)
            share = int((rows.targets[inside] != IGNORE).sum()) / total
            parts.append(Part((ids, targets, positions, bias), share))
        return parts

    def _evaluate_documents(self, stop: Stop) -> dict[str, float] | None:
        """Return the figures of ``evaluate``, of documents; bytes are those of the tokens that are predicted."""
        tokenizer, size = self.corpus.tokenizer, self.config.data.batch_size
        tokens = np.asarray(self.corpus.held_out(self.config.evaluation.max_tokens).tokens[:])
        end = end_of_text(tokenizer)
        pieces = pieces_of(tokens, end, self.context)
        order = first_fit(pieces.lengths.tolist(), self.context)
        if not order:
            raise ConfigError(f"evaluation.max_tokens {len(tokens)} holds nothing to predict: give more")
        total, count, text_bytes = 0.0, 0, 0
        with evaluating(self.model), torch.no_grad():
            for begin in range(0, len(order), size):
                if stop():
                    return None
                rows = rows_of(tokens, pieces, order[begin : begin + size], self.context, end)
                (part,) = self._parts(rows)
                predicted = rows.targets[rows.targets != IGNORE]
                total += self.model(*part.inputs).item() * len(predicted)
                count += len(predicted)
                text_bytes += len(tokenizer.decode_bytes(predicted[predicted != end].tolist()))
        return {"loss": total / count, "bits_per_byte": total / math.log(2) / max(text_bytes, 1)}

    def sample(self, stop: Stop) -> str | None:
        """Return what the model writes after the prompt of the settings."""
        settings = self.config.evaluation
        if not settings.sample_tokens:
            return None
        tokenizer = self.corpus.tokenizer
        decoding = Decoding(
            max_new_tokens=settings.sample_tokens,
            temperature=settings.temperature,
            top_k=min(settings.top_k, tokenizer.vocab_size),
            seed=self.config.seed,
        )
        return sample(self.model, tokenizer, settings.prompt, decoding, device=self.device, stop=stop)
