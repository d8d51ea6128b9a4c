"""Predict the next token from all before it: how every decoder is pretrained."""

from dataclasses import asdict

from torch import Tensor

from portlm.errors import ConfigError
from portlm.models import FAMILIES
from portlm.runtimes.decoding import Decoding
from portlm.train.evaluation import evaluate, prompt_ids, sample
from portlm.train.objectives import Stop
from portlm.train.objectives.text import Batch, TextObjective


class CausalObjective(TextObjective):
    """Cross-entropy of the next token; judged on held-out text in nats per token and in bits per byte."""

    kind = "causal"

    def check(self) -> None:
        """Refuse a family that does not continue texts, and a prompt of the samples that is longer than the context."""
        family = self.family
        if FAMILIES[family].kind == "encoder":
            raise ConfigError(
                f"objective causal is for models that continue a text, and a {family} reads whole ones: set "
                "objective = masked"
            )
        prompt_ids(self.corpus.tokenizer, self.config.evaluation.prompt, self.context)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean over the tokens of a part, divided by the number of parts, which are equally large."""
        loss: Tensor = self.model(*batch)
        return loss if self.parts == 1 else loss / self.parts

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` and ``bits_per_byte`` of the held-out text."""
        held_out = self.corpus.held_out(self.config.evaluation.max_tokens)
        found = evaluate(self.model, held_out, self.config.data.batch_size, self.device, stop)
        return None if found is None else asdict(found)

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
