"""What kernels for GPUs are written with: TVM's own intermediate code, of which it makes WGSL, OpenCL C or CUDA.

A kernel is written for a group of threads, as in any of these languages, and once for all of them. It is a function of
tensors, on the host, which launches one grid or several.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

THREADS = 256  # of a group: what every device has
LOWEST = -3.0e38  # a score that no softmax sees; WGSL has no infinity
NAME = "portlm.kernel"  # attribute of a function: what messages call it
FOLD = 16  # threads that add up the group's numbers first


@contextmanager
def function(name: str) -> Iterator["Builder"]:
    """Write one function; it is builder.function when the block ends."""
    from tvm.script.ir_builder import IRBuilder, tirx

    with IRBuilder() as script:
        builder = Builder()
        with tirx.prim_func(is_private=True):
            tirx.func_name(name)
            # Schedules leave it alone, and so does fusion: 8 is an opaque function to it.
            tirx.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8, NAME: name})
            yield builder
    builder.function = script.get()


class Builder:
    """Statements of the function that is being written."""

    function: "tvm.tirx.PrimFunc"

    def __init__(self) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as script

        self._tir, self._script = tirx, script

    def tensor(self, name: str, shape: Sequence[Any], dtype: str = "float32") -> Any:
        """The next argument."""
        script = self._script
        return script.match_buffer(script.arg(name, script.handle()), tuple(shape), dtype)

    def size(self, name: str) -> Any:
        """A size that the arguments' shapes say."""
        return self._tir.Var(name, "int64")

    @contextmanager
    def grid(
        self, x: Any, y: Any = 1, threads: int = THREADS, only: Any = None
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Launch x * y groups: their two numbers, and that of a thread in its group.

        Where `only` does not hold, there are none. It is no condition around the launch, in which TVM does not look for
        barriers that are missing, and raises.
        """
        script, const = self._script, self._tir.const
        if only is not None:
            y = self._tir.Select(only, const(y, "int64") if isinstance(y, int) else y, const(0, "int64"))
        extents = (const(n, "int64") if isinstance(n, int) else n for n in (x, y, threads))
        names = ("blockIdx.x", "blockIdx.y", "threadIdx.x")
        frames = [script.launch_thread(name, extent) for name, extent in zip(names, extents, strict=True)]
        with frames[0] as column, frames[1] as row, frames[2] as thread:
            yield column, row, thread

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Statements for where a condition holds."""
        with self._script.If(condition), self._script.Then():
            yield

    def loop(self, count: Any) -> Any:
        """A block that is run so many times, and the number of the turn."""
        return self._script.serial(0, count)

    def shared(self, count: int, dtype: str = "float32") -> Any:
        """Memory of the group."""
        return self._script.alloc_buffer((count,), dtype, scope="shared")

    def local(self, count: int, dtype: str = "float32", fill: float | None = None) -> Any:
        """Variables of a thread."""
        made = self._script.alloc_buffer((count,), dtype, scope="local")
        if fill is not None:
            for place in range(count):
                self.set(made, [place], self._tir.const(fill, dtype))
        return made

    def set(self, tensor: Any, index: Sequence[Any], value: Any) -> None:
        """Write one element."""
        self._script.buffer_store(tensor, value, list(index))

    def barrier(self) -> None:
        """Wait for the group, whose writes to shared memory are seen then."""
        self._script.evaluate(self._script.tvm_storage_sync("shared"))

    def group_sum(self, partial: Any, folded: Any, thread: Any, value: Any) -> Any:
        """The sum of a number of every thread of a group, which every thread gets.

        Args:
            partial: shared, THREADS numbers, free for this.
            folded: shared, FOLD numbers, free for this; memory of its own, since TVM wants a barrier between any
                reading and any writing of the same.
            thread: its number.
            value: its number to be added.
        """
        self.set(partial, [thread], value)
        self.barrier()
        total = self.local(1, fill=0)
        with self.when(thread < FOLD):
            with self.loop(THREADS // FOLD) as i:
                self.set(total, [0], total[0] + partial[thread * (THREADS // FOLD) + i])
            self.set(folded, [thread], total[0])
        self.barrier()
        self.set(total, [0], self.real(0))
        with self.loop(FOLD) as i:
            self.set(total, [0], total[0] + folded[i])
        return total[0]

    def real(self, value: float) -> Any:
        """A float32 number."""
        return self._tir.const(value, "float32")

    def long(self, value: int) -> Any:
        """A number as sizes are."""
        return self._tir.const(value, "int64")

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        """One of two values, of which the other is not computed."""
        return self._script.if_then_else(condition, yes, no)

    def both(self, *conditions: Any) -> Any:
        """Whether all conditions hold."""
        return self._tir.all(*conditions)

    def call(self, name: str, *values: Any) -> Any:
        """A function of TVM's: exp, tanh, max, rsqrt, ..."""
        return getattr(self._tir, name)(*values)


def activation(k: Builder, name: str, x: Any) -> Any:
    """An activation by its name in portlm.ops.narrow.ACTIVATIONS."""
    if name == "none":
        return x
    if name == "gelu_tanh":
        inner = k.real(0.7978845608028654) * (x + k.real(0.044715) * x * x * x)
        # 1 + tanh(z) = 2 / (1 + e^-2z), which overflows to the right limits
        return x / (k.real(1) + k.call("exp", k.real(-2) * inner))
    if name == "gelu":
        return k.real(0.5) * x * (k.real(1) + k.call("erf", x * k.real(0.7071067811865476)))
    positive = k.call("max", x, k.real(0))
    return positive if name == "relu" else positive * positive
