"""How much of reading a text must wait for something else: T steps in a recurrent layer, one in a layer of attention.

What is counted follows from the models' own graphs, as they are recorded for export. A role says how many tokens a call
reads and which of its outputs are the next call's inputs, so a text of T tokens is a chain of calls. Through all of
them goes the longest path, and the cells or attentions on it are the steps that no number of processors takes at once.
The backward pass walks the same path again.

The times of a training step on 2048 tokens, in rows of T, are told without a bar: they are this machine's, and on one
thread what could be computed at once is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fresh, parameters, seeded
from portlm.models import Config
from portlm.models.llama import LlamaConfig
from portlm.models.recurrent import RecurrentConfig
from portlm.models.roles import Role

if TYPE_CHECKING:
    from portlm.compile.trace import Recording

_VOCAB, _LENGTHS = 64, (64, 128, 256, 512, 1024)
_TOKENS = 2048  # of a step that is timed
_SIZES: dict[str, Any] = {"vocab_size": _VOCAB, "context_length": _LENGTHS[-1], "n_layer": 2}
_MODELS: dict[str, Config] = {
    "lstm": RecurrentConfig(**_SIZES, cell="lstm", width=116),
    "transformer": LlamaConfig(**_SIZES, n_head=4, n_kv_head=4, width=96, hidden=256),
}
# The operators of a graph that take something from one token to another.
MIXERS = ("portlm::lstm_cell", "portlm::gru_cell", "portlm::rnn_cell", "portlm::cached_attention")


def layers_of(recording: Recording) -> list[str]:
    """Return the paths of the modules that mix tokens, in order, one for each such operator."""
    return [node.meta["module"] for node in recording.graph.nodes if _name(node) in MIXERS]


def calls_for(role: Role, tokens: int) -> int:
    """Return how many calls of a role read so many tokens of a row, one after the other."""
    extent = next(spec.shape[1] for spec in role.inputs if spec.name == "input_ids")
    return -(-tokens // extent) if isinstance(extent, int) else 1


def longest_path(recording: Recording, role: Role, calls: int, layers: Iterable[str]) -> int:
    """Return the most operators of some layers that wait for one another, over calls that follow each other.

    Args:
        recording: Of the role.
        role: What says which outputs are the next call's states.
        calls: How many.
        layers: Paths of their modules, of :func:`layers_of`.
    """
    counted = {*layers}
    nodes = [*recording.graph.nodes]
    (output,) = (node for node in nodes if node.op == "output")
    (results,) = output.args
    assert isinstance(results, tuple)
    states = recording.inputs[len(role.inputs) :]
    carried = [name for name, spec in zip(states, role.state, strict=True) if spec.output]
    depths, deepest = dict.fromkeys(carried, 0), 0
    for _ in range(calls):
        found: dict[Any, int] = {}
        for node in nodes:
            before = max((found[each] for each in node.all_input_nodes), default=depths.get(node.name, 0))
            found[node] = before + (_name(node) in MIXERS and node.meta["module"] in counted)
        deepest = max(deepest, found[output])
        depths = {name: found[node] for name, node in zip(carried, results[len(role.outputs) :], strict=True)}
    return deepest


def _name(node: Any) -> str:
    """Return the name of a node's operator, "" for one that is none."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name)


def training_seconds(model: Any, ids: torch.Tensor, times: int = 3) -> float:
    """Return processor seconds of a model's forward and backward pass on ids (B, T), the fastest of a few."""
    found = []
    for _ in range(times):
        begin = time.process_time()
        model(ids, ids).backward()
        found.append(time.process_time() - begin)
        model.zero_grad(set_to_none=True)
    return min(found)


class ParallelDepth:
    """An LSTM and a LLaMA of two layers and as many parameters, on texts of 64 to 1024 tokens."""

    name: ClassVar[str] = "parallel-depth"
    shows: ClassVar[str] = (
        "A recurrent layer reads T tokens in T steps that wait for each other, attention in one."
    )
    source: ClassVar[str] = "Vaswani et al., 2017, table 1"
    seeds: ClassVar[tuple[int, ...]] = (0,)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("least_lstm_depth_per_token", "==", 1.0),  # of a layer; and the most
        Bar("most_lstm_depth_per_token", "==", 1.0),
        Bar("most_transformer_depth", "==", 1.0),
        Bar("largest_size_over_smallest", "<=", 1.05),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Count the steps of each layer and of all, and time training steps."""
        from portlm.compile.trace import record

        seeded(seed)
        figures: dict[str, Any] = {"parameters": {}, "layer": {}, "all_layers": {}, "milliseconds": {}}
        for name, config in _MODELS.items():
            model: Any = fresh(config, seed)
            role = model.roles()["decoder"]
            recording = record(model, "decoder", role)
            layers = layers_of(recording)
            figures["parameters"][name] = parameters(model)
            for what in ("layer", "all_layers", "milliseconds"):
                figures[what][name] = {}
            for tokens in _LENGTHS:
                calls = calls_for(role, tokens)
                each = [longest_path(recording, role, calls, [layer]) for layer in layers]
                figures["layer"][name][str(tokens)] = each
                figures["all_layers"][name][str(tokens)] = longest_path(recording, role, calls, layers)
                ids = torch.randint(0, _VOCAB, (_TOKENS // tokens, tokens))
                figures["milliseconds"][name][str(tokens)] = 1e3 * training_seconds(model, ids)
                tell(f"{name}, {tokens} tokens: {each} steps in its layers")
        sizes = figures["parameters"].values()
        shares = [steps / int(tokens) for tokens, each in figures["layer"]["lstm"].items() for steps in each]
        return figures | {
            "least_lstm_depth_per_token": min(shares),
            "most_lstm_depth_per_token": max(shares),
            "most_transformer_depth": max(
                steps for each in figures["layer"]["transformer"].values() for steps in each
            ),
            "largest_size_over_smallest": max(sizes) / min(sizes),
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw steps that wait for each other, and times, by the length of a text."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        depth, times = figure.subplots(1, 2)
        for number, name in enumerate(_MODELS):
            for place, result in enumerate(results.values()):
                label = name if place == 0 else None
                steps = [result["all_layers"][name][str(tokens)] for tokens in _LENGTHS]
                depth.plot(_LENGTHS, steps, "o-", color=f"C{number}", label=label)
                spent = [result["milliseconds"][name][str(tokens)] for tokens in _LENGTHS]
                times.plot(_LENGTHS, spent, "o-", color=f"C{number}", label=label)
        depth.set_yscale("log")
        depth.set_ylabel("steps that wait for one another")
        times.set_ylabel(f"ms of a training step on {_TOKENS} tokens, one thread")
        for axes in (depth, times):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("tokens of a row")
            axes.legend()
        figure.savefig(path, dpi=120)
