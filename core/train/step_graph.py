"""Forward and backward of a whole step as one CUDA graph: small kernels take less time than starting them does.

The graph has the addresses of parameters, parts and gradients, so those stay where they are. The optimiser is not in
it: it reads the norm of the gradients on the host, where it decides whether the step counts, and the learning rate
comes from there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from portlm.errors import ConfigError, PortlmError
from portlm.runtimes.torch_graphs import CudaGraph, Graph

__all__ = ["StepGraph"]

Part = tuple[Tensor, ...]


class StepGraph:
    """Gradients of steps whose parts have one shape, recorded at the first.

    Args:
        gradients: Adds the gradients of parts to the parameters and returns the loss, as
            :func:`portlm.train.loop.accumulate_gradients` does. It draws random numbers from PyTorch alone, and nothing
            in it depends on the step but the parts.
        model: Whose parameters they are.
        make: What records.
    """

    def __init__(
        self,
        gradients: Callable[[Sequence[Part]], Tensor],
        model: nn.Module,
        make: Callable[[], Graph] = CudaGraph,
    ):
        self._gradients, self._parameters, self._graph = gradients, list(model.parameters()), make()
        self._parts: list[Part] = []
        self._loss: Tensor | None = None

    def __call__(self, parts: Sequence[Part]) -> Tensor:
        """Write the gradients of a step, in the place of those of the last one, and return its loss, likewise.

        Raises:
            ConfigError: The step waits for the device, so it cannot be recorded.
            PortlmError: The parts are not those that were recorded, in number or shape.
        """
        if self._loss is None:
            self._record(parts)
        shapes = [[tensor.shape for tensor in part] for part in parts]
        if shapes != [[tensor.shape for tensor in part] for part in self._parts]:
            raise PortlmError(
                "the parts of a step changed their shapes after it was recorded: set cuda_graph = false"
            )
        for kept, given in zip(self._parts, parts, strict=True):
            for to, tensor in zip(kept, given, strict=True):
                to.copy_(tensor)
        self._graph.replay()
        assert self._loss is not None
        return self._loss

    def _record(self, parts: Sequence[Part]) -> None:
        self._parts = [tuple(tensor.clone() for tensor in part) for part in parts]
        device = parts[0][0].device

        def work() -> tuple[Tensor, ...]:
            for p in self._parameters:
                p.grad = None  # so that the graph writes the first gradient of a step and adds the others
            return (self._gradients(self._parts),)

        try:
            # Steps that only prepare the recording draw random numbers that no step is to miss.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                (self._loss,) = self._graph.capture(work)
        except RuntimeError as error:
            raise ConfigError(
                f"cuda_graph = true: a step of this model cannot be recorded ({str(error).splitlines()[0]}): "
                "leave it out"
            ) from error
