"""What stands for a CUDA graph where there is no GPU: PyTorch's operators, called again on the same memory.

As a graph it knows addresses and no Python: what a function computed from sizes, or put into a variable, stays as it
was when it was recorded. An operator whose result Python looks at raises RuntimeError, as the device would.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from portlm.ops.kernel_op import without_kernels


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (
            torch.Tag.data_dependent_output in function.tags
            or torch.Tag.dynamic_output_shape in function.tags
        ):
            raise RuntimeError(f"{function} waits for the device, which nobody may while a graph is recorded")
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result


class RecordedGraph:
    """A graph of PyTorch's operators on the CPU; portlm's kernels, of which PyTorch does not know, are left out.

    Attributes:
        replays: of all such graphs together.
    """

    replays = 0

    def capture(self, work):
        with without_kernels():
            work()
            with _Recorder() as recorder:
                results = work()
        self._calls = recorder.calls
        return results

    def replay(self):
        RecordedGraph.replays += 1
        with without_kernels(), torch._C._AutoDispatchBelowAutograd():  # a graph knows nothing of gradients
            for function, args, kwargs, results in self._calls:
                for old, new in zip(
                    tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, torch.Tensor) and _place(old) != _place(
                        new
                    ):  # no view, and not in place
                        old.copy_(new)


def _place(tensor):
    return tensor.untyped_storage().data_ptr()
