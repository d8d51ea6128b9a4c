"""The weights of a module as its graphs have them: their names, their orientation, and each tensor once."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from portlm.compile import aten
from portlm.compile.trace import Recording, alive, arguments_of, output_nodes
from portlm.errors import FormatError
from portlm.ops.registry import captured

EXACT = 2**24
"""float32 holds every whole number up to here."""


class Weights:
    """The parameters and buffers of a module, under their names in graphs and in the orientation that graphs use.

    Tables of whole numbers (int32) are float32 in a graph.

    Args:
        module: the model.
        recordings: of all its roles: a matrix that any of them uses otherwise than by a product keeps its orientation.

    Raises:
        FormatError: two parameters overlap in memory without being equal.
    """

    def __init__(self, module: nn.Module, recordings: Iterable[Recording]):
        self.rename = renaming(module)
        tensors: dict[str, Tensor] = {}
        tensors |= dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        self._tensors = {path: tensor.detach() for path, tensor in tensors.items()}
        self._first = _aliases(self._tensors)
        turned: dict[str, bool] = {}
        for recording in recordings:
            for use in uses(recording):
                path = self._first[use.path]
                turned[path] = turned.get(path, True) and use.kind == "matrix"
        self.turned = {path for path, products_only in turned.items() if products_only}
        self.arrays: dict[str, np.ndarray] = {self.name(path): self._array(path) for path in turned}

    def name(self, path: str) -> str:
        """The name in the graph; parameters that are the same tensor share the first one's."""
        return self.rename(self._first[path])

    def first(self, path: str) -> str:
        """The first path of the tensor that a path leads to."""
        return self._first[path]

    def is_turned(self, path: str) -> bool:
        """Whether the graph keeps this matrix (in, out)."""
        return self._first[path] in self.turned

    def _array(self, path: str) -> np.ndarray:
        tensor = self._tensors[path]
        if tensor.is_complex():
            raise FormatError(
                f"{path} is complex: a graph has real numbers only, keep both parts as parameters"
            )
        if tensor.dtype == torch.int32:
            return self._whole(path, tensor)
        if tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise FormatError(f"{path} has dtype {kind}, export needs float32: call module.float() first")
        array: np.ndarray = tensor.cpu().numpy()
        return array.T if path in self.turned else array

    def _whole(self, path: str, tensor: Tensor) -> np.ndarray:
        """A table of whole numbers as float32, in which graphs compute."""
        whole: np.ndarray = tensor.cpu().numpy()
        if whole.size and not -EXACT <= int(whole.min()) <= int(whole.max()) <= EXACT:
            raise FormatError(f"{path} holds whole numbers beyond {EXACT}, which float32 does not tell apart")
        return whole.astype(np.float32)


class Use(NamedTuple):
    """One use of a weight.

    Attributes:
        path: of the weight in the module.
        kind: "matrix" of a linear map, "table" of which rows are looked up, or "" for any other.
        node: that reads it.
    """

    path: str
    kind: str
    node: fx.Node


def uses(recording: Recording) -> Iterator[Use]:
    """Yield every use of a weight."""
    living = alive(output_nodes(recording.graph))
    paths: dict[fx.Node, str] = {}
    for node in recording.graph.nodes:
        if node not in living:
            continue
        if node.op == "placeholder":
            if node.name in recording.weights:
                paths[node] = recording.weights[node.name]
            continue
        operator = getattr(getattr(node.target, "_schema", None), "name", "")
        if operator in aten.IDENTITIES and node.args[0] in paths:
            paths[node] = paths[node.args[0]]
            continue
        spec = captured().get(operator)
        matrices = {i.name for i in spec.inputs if i.matrix} if spec else set()
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            for key, operand in arguments_of(node).items():
                for one in operand if isinstance(operand, list | tuple) else (operand,):
                    if isinstance(one, fx.Node) and one in paths:
                        kind = "matrix" if key in matrices else ""
                        if operator == "portlm::embedding" and key == "weight":
                            kind = "table"
                        yield Use(paths[one], kind, node)


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Path -> the first path of the same tensor; FormatError where tensors overlap without being the same."""
    first: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    known: dict[tuple[Any, ...], str] = {}
    for path, tensor in tensors.items():
        if tensor.device.type == "meta" or not tensor.numel():
            first[path] = path
            continue
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        first[path] = known.setdefault(key, path)
        if first[path] == path:
            reach = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            spans.append((start, start + (reach + 1) * tensor.element_size(), path))
    spans.sort()
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        one, other = sorted((one, other), key=list(tensors).index)
        if start < end:
            raise FormatError(
                f"{one} and {other} share a part of their memory, which the weight file cannot say: make them the same "
                "parameter, or copy one"
            )
    return first


def renaming(module: nn.Module) -> Callable[[str], str]:
    """Return path in the module -> name in the graph: that of Hugging Face's files where the model has them."""
    hf_name = getattr(module, "hf_name", None)
    return (lambda path: hf_name(path)[0]) if hf_name else (lambda path: path)
