"""The lab: what papers claim, repeated at a size that one core computes in minutes, each beside its bar."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from portlm.errors import UsageError
from portlm.files import shown

if TYPE_CHECKING:
    from portlm.flows.lab.experiment import Experiment

# name -> "module:class", in the order of history; modules load when their experiment is asked for
EXPERIMENTS = {
    "ngram-orders": "portlm.flows.lab.ngram_orders:NGramOrders",
    "word-vectors": "portlm.flows.lab.word_vectors:WordVectors",
    "unseen-pairs": "portlm.flows.lab.unseen_pairs:UnseenPairs",
    "brackets": "portlm.flows.lab.brackets:Brackets",
    "gradients": "portlm.flows.lab.gradients:Gradients",
    "source-reversal": "portlm.flows.lab.source_reversal:SourceReversal",
    "alignment": "portlm.flows.lab.alignment:Alignment",
    "retrieval": "portlm.flows.lab.retrieval:Retrieval",
    "parallel-depth": "portlm.flows.lab.parallel_depth:ParallelDepth",
    "hybrid": "portlm.flows.lab.hybrid:Hybrids",
    "contextual-sense": "portlm.flows.lab.contextual_sense:ContextualSense",
    "cove": "portlm.flows.lab.cove:Cove",
    "pretraining-pays": "portlm.flows.lab.pretraining:Pretraining",
    "transfer": "portlm.flows.lab.transfer:Transfer",
    "ladder": "portlm.flows.lab.ladder:Ladder",
    "cloze-needs-both-sides": "portlm.flows.lab.cloze:Cloze",
    "span-qa": "portlm.flows.lab.span_qa:SpanQA",
    "objectives": "portlm.flows.lab.objectives:Objectives",
    "translation": "portlm.flows.lab.translation:Translation",
    "pictures": "portlm.flows.lab.pictures:Pictures",
    "backends": "portlm.flows.lab.backends:Backends",
}


def find(name: str) -> Experiment:
    """Import and return an experiment.

    Raises:
        UsageError: There is none of this name. The message lists them.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {shown(name)}: choose one of {', '.join(EXPERIMENTS)}")
    module, _, attribute = EXPERIMENTS[name].partition(":")
    found: Experiment = getattr(importlib.import_module(module), attribute)()
    return found
