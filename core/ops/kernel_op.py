"""How a kernel becomes a PyTorch operator: one call per op, two ways in, the same code behind both.

`torch.library.custom_op` makes an op visible to autograd, `torch.compile` and `torch.export`, at about 20 µs of
Python per call. A training step of a small model makes a hundred such calls, so plain eager tensors take the short
way, an `autograd.Function` around the same functions, and everything that traces takes the registered op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.compiled import available, kernels, without_kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = [
    "KernelOp",
    "address",
    "available",
    "contiguous",
    "exporting",
    "has_kernel",
    "is_exporting",
    "is_traced",
    "kernels",
    "needs_gradient",
    "without_kernels",
]

_PLAIN: tuple[type, ...] = ()
_exporting = False


def _note_types() -> None:
    global _PLAIN
    _PLAIN = (torch.Tensor, torch.nn.Parameter)


lazy.when_loaded(_note_types)


@contextmanager
def exporting() -> Iterator[None]:
    """Make every op appear as itself, `portlm::<name>`, in what is recorded inside the block.

    Elsewhere a recording holds the references, PyTorch's own operators, so that others can run it.
    """
    global _exporting
    before, _exporting = _exporting, True
    try:
        yield
    finally:
        _exporting = before


def is_exporting() -> bool:
    """Say whether ops are being recorded as themselves, whatever computes them."""
    return _exporting


def has_kernel(*tensors: Tensor | None) -> bool:
    """Say whether the compiled CPU kernels take these tensors: available, float32, on the CPU, not being exported.

    Inside `exporting()` they take everything: it is the op that is recorded, and nothing runs.
    """
    if _exporting:
        return True
    if not available() or torch.compiler.is_exporting():
        return False
    for t in tensors:  # noqa: SIM110 - a generator expression would double the cost of this check
        if t is not None and not (t.is_cpu and t.dtype is torch.float32):
            return False
    return True


def is_traced(first: Tensor) -> bool:
    """Say whether a call with this tensor is being recorded or intercepted, so that it must use registered ops."""
    return (
        type(first) not in _PLAIN or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    )


def needs_gradient(*args: Any) -> bool:
    """Say whether autograd wants to differentiate what is made of these, tensors among them."""
    if torch.is_grad_enabled():
        for a in args:
            if getattr(a, "requires_grad", False):
                return True
    return False


def address(tensor: Tensor | None) -> int:
    """Return where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return tensors as a kernel takes them; one that is absent stays so."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


class KernelOp:
    """One operator ``portlm::<name>``, callable like the function it wraps.

    Args:
        forward: typed function (its annotations become the operator's schema) that calls kernels. All its tensors
            must be contiguous; its first argument is a tensor; it mutates nothing and returns new tensors.
        fake: same signature, returns empty tensors of the right shape and dtype.
        backward: ``backward(ctx, *grads) -> gradients of every input``, or None for an op without gradient.
        setup_context: ``setup_context(ctx, inputs, output)`` stores what backward needs.
        mutates_args: names of the arguments that are written in place.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
        mutates_args: tuple[str, ...] = (),
    ):
        self.forward = forward
        self.differentiable = backward is not None
        self.op: Any = None
        self.direct: Callable[..., Any] = forward
        lazy.when_loaded(lambda: self._register(name, fake, backward, setup_context, mutates_args))

    def _register(
        self,
        name: str,
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None,
        setup_context: Callable[..., None] | None,
        mutates_args: tuple[str, ...],
    ) -> None:
        forward = self.forward
        self.op = torch.library.custom_op(f"portlm::{name}", forward, mutates_args=mutates_args)
        self.op.register_fake(fake)
        if backward is not None:
            assert setup_context is not None
            self.op.register_autograd(backward, setup_context=setup_context)
            self.direct = _function(name, forward, backward, setup_context).apply

    def __call__(self, *args: Any) -> Any:
        """Run the op on contiguous tensors, by the short way if nothing traces."""
        if is_traced(args[0]):
            return self.op(*args)
        if needs_gradient(*args):
            # Without a backward the short way would drop the gradient in silence; the registered op refuses it.
            return self.direct(*args) if self.differentiable else self.op(*args)
        return self.forward(*args)


def _function(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> Any:
    def run(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    return type(
        f"{name}_function",
        (torch.autograd.Function,),
        {"forward": staticmethod(run), "backward": staticmethod(backward)},
    )
