"""What a model learns from a step, one file per objective. The loop around it (:mod:`portlm.train.loop`) is the same.

An objective owns the models, the batches, the loss, how progress is judged, what there is to look at, and its part of
a checkpoint. Nothing here imports PyTorch until an objective is asked for.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Stop = Callable[[], bool]
"""Asked in the middle of long work whether somebody is waiting for it to end."""

# The objectives over texts, which `objective` of a pretraining run may name. Each class is called with the
# PretrainConfig, the Corpus and the device; one that reads something else than plain text has an `open_corpus` of its
# own. Objectives with data of another kind bring their own entry point.
OBJECTIVES = {
    "causal": "portlm.train.objectives.causal:CausalObjective",
    "masked": "portlm.train.objectives.masked:MaskedObjective",
    "bidirectional": "portlm.train.objectives.bidirectional:BidirectionalObjective",
    "span": "portlm.train.objectives.span:SpanObjective",
    "skipgram": "portlm.train.objectives.skipgram:SkipgramObjective",
    "glove": "portlm.train.objectives.glove:GloveObjective",
    "seq2seq": "portlm.train.objectives.seq2seq:Seq2SeqObjective",
    "classify": "portlm.train.objectives.classify:ClassifyObjective",
    "answer": "portlm.train.objectives.answer:AnswerObjective",
    "denoise": "portlm.train.objectives.denoise:DenoiseObjective",
    "mass": "portlm.train.objectives.mass:MassObjective",
    "bert": "portlm.train.objectives.bert:BertObjective",
    "prefix": "portlm.train.objectives.prefix:PrefixObjective",
    "caption": "portlm.train.objectives.caption:CaptionObjective",
}

# The kinds of families that can learn an objective (portlm.models.Family), where it is not for all that read one text.
LEARNERS = {
    "bidirectional": ("bidirectional",),
    "span": ("encoder-decoder",),
    "skipgram": ("vectors",),
    "glove": ("vectors",),
    "seq2seq": ("encoder-decoder",),
    "denoise": ("encoder-decoder",),
    "mass": ("encoder-decoder",),
    "bert": ("encoder",),
    "answer": ("encoder",),
    "prefix": ("prefix",),
    "caption": ("picture",),
}


def learns(kind: str, objective: str) -> bool:
    """Say whether families of a kind can learn an objective by its name in OBJECTIVES.

    One that LEARNERS does not name is for all that LEARNERS names nothing of its own for; it refuses single
    families itself.
    """
    if objective in LEARNERS:
        return kind in LEARNERS[objective]
    return kind not in ("encoder-decoder", "prefix", "bidirectional", "vectors", "picture")


def objective_class(name: str) -> Any:
    """Import and return the class of an objective by its name in OBJECTIVES."""
    module, _, attribute = OBJECTIVES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


class Objective(Protocol):
    """What the loop asks of an objective.

    All randomness comes from the run's seed and step or from PyTorch's generators, which each checkpoint holds; all
    else that decides the steps to come is part of :meth:`state`. Then a resumed run repeats the uninterrupted one.

    An objective that learns from its own samples generates them in :meth:`batches` and hands them out over several
    steps; what is not yet used up is part of its tensors. Models that are not trained (a reference, a reward) are the
    objective's own business: the loop never sees them.

    Attributes:
        kind: Its name in checkpoints.
        model: Everything that the optimiser trains, on its device. Several models are one ``nn.ModuleDict``.
        tokens_per_step: For the speed that is reported: how many tokens a step learns from.
    """

    kind: ClassVar[str]

    @property
    def model(self) -> "nn.Module":
        """The same object for the whole run."""

    @property
    def tokens_per_step(self) -> int:
        """On average, where it varies."""

    def facts(self) -> dict[str, int]:
        """Return figures about the data for the first line of the metrics."""

    def batches(self) -> Sequence[Any]:
        """Return the parts of the next step, at least one; they add up to its batch."""

    def loss(self, batch: Any) -> "Tensor":
        """Return the share of one part in the step's loss: a scalar with a gradient. The loop adds the parts up."""

    def metrics(self) -> dict[str, float]:
        """Return further figures over the steps since the last call, for the metrics. Called where a line is due."""

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return how good the model is by now, with ``loss`` among the figures, or None if told to stop.

        Draws no random number from PyTorch's generators.
        """

    def sample(self, stop: Stop) -> str | None:
        """Return something to look at, or None if there is nothing. Draws no random number either."""

    def save(self, folder: Path) -> None:
        """Write the trained model as a checkpoint folder that can be used by itself."""

    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]":
        """Return what a resumed run needs besides the model, as JSON and as tensors."""

    def restore(self, folder: Path, state: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> None:
        """Take the model that :meth:`save` wrote and what :meth:`state` returned.

        Raises:
            FormatError: They are damaged, or do not fit this model.
            ConfigError: They belong to other data.
        """
