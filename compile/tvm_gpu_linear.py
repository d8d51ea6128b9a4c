"""Linear maps on GPUs: what comes before the product and what comes after it in the same kernel.

y (M, N) = activation(norm(x) (M, K) W^T + bias) + residual, for one matrix or for several that read the same x, whose
results lie side by side; or silu(norm(x) G^T) * (norm(x) U^T) for two. Matrices are in panels of 64 rows
(portlm.panels). Few rows of x are a product of each with the matrix, for which a group of threads takes a panel and its
threads parts of K; many rows are tiles of 32 by 64 results. No barrier is inside a branch, not even in one that a whole
group takes: TVM could not place its own there, and a driver that was tried makes wrong code of it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from portlm.compile.tvm_gpu import FOLD, THREADS, Builder, activation, function
from portlm.panels import PANEL

if TYPE_CHECKING:
    import tvm

FEW = 8  # rows of x; from so many on there are tiles
CHUNK = 2048  # columns of x that a group keeps at most; half of them beside sums of four columns a thread
ROWS, DEPTH = 32, 16  # of a tile: rows of x, and columns of it at a time
WORD = 4  # numbers of one byte in a word, or four pairs of half a byte


@dataclass(frozen=True)
class Matrix:
    """A matrix (N, K) in panels.

    Attributes:
        rows: N.
        columns: K.
        bits: of a number, 32 for float32.
        group: numbers that share a scale; 0 for float32.
        zeros: whether there are zero points.
    """

    rows: int
    columns: int
    bits: int = 32
    group: int = 0
    zeros: bool = False

    @property
    def panels(self) -> int:
        """How many there are."""
        return -(-self.rows // PANEL)

    def parts(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and type of each tensor that it consists of; bytes come in words of four."""
        if self.bits == 32:
            return [((self.panels, self.columns, PANEL), "float32")]
        groups, words = self.columns // self.group, PANEL // WORD
        found = [
            ((self.panels, groups, self.group * self.bits // 8, words), "int32"),
            ((self.panels, groups, PANEL), "float32"),
            ((self.panels, groups, words), "int32"),
        ]
        return found if self.zeros else found[:2]


@dataclass(frozen=True)
class Product:
    """What a kernel computes.

    Attributes:
        matrices: those that read x.
        biases: of each matrix, whether it has one.
        norm: "none", "layer" (with a weight and a bias) or "rms" (with a weight).
        epsilon: of the norm.
        activation: of portlm.ops.narrow.ACTIVATIONS, or "swiglu" for two matrices of one shape, the gate's first.
        residual: whether something is added.
    """

    matrices: tuple[Matrix, ...]
    biases: tuple[bool, ...]
    norm: str = "none"
    epsilon: float = 0.0
    activation: str = "none"
    residual: bool = False

    @property
    def pairs(self) -> bool:
        """Whether two matrices give one result."""
        return self.activation == "swiglu"

    @property
    def width(self) -> int:
        """Columns of y."""
        return self.matrices[0].rows if self.pairs else sum(matrix.rows for matrix in self.matrices)


@cache
def define(product: Product) -> "tvm.tirx.PrimFunc":
    """Return the function of x (M, K), the norm's parameters, the matrices' parts, the biases, the residual, and y."""
    with function("linear") as k:
        kernel = _Linear(k, product)
        kernel.few()
        kernel.many()
    return k.function


class _Linear:
    """The two kernels of a product."""

    def __init__(self, k: Builder, product: Product):
        self.k, self.product = k, product
        self.K = product.matrices[0].columns
        self.chunk = _chunk(product.matrices[0])
        self.M = k.size("M")
        self.x = k.tensor("x", (self.M, self.K))
        norms = {"none": 0, "rms": 1, "layer": 2}[product.norm]
        self.norm = [k.tensor(f"norm{i}", (self.K,)) for i in range(norms)]
        self.parts = [
            [k.tensor(f"w{i}_{j}", *part) for j, part in enumerate(matrix.parts())]
            for i, matrix in enumerate(product.matrices)
        ]
        self.biases = [
            k.tensor(f"b{i}", (matrix.rows,)) if has else None
            for i, (matrix, has) in enumerate(zip(product.matrices, product.biases, strict=True))
        ]
        self.residual = k.tensor("residual", (self.M, product.width)) if product.residual else None
        self.y = k.tensor("y", (self.M, product.width))

    def few(self) -> None:
        """A group for each row of x and each panel."""
        k, product, columns = self.k, self.product, self._columns()
        count = 2 if product.pairs else 1
        with k.grid(self._tiles(), self.M, only=self.M < FEW) as (tile, row, thread):
            xs, partial, folded = k.shared(self.chunk), k.shared(count * THREADS * columns), k.shared(FOLD)
            normed = self._row_norm(row, thread, partial, folded)
            sums = [k.local(columns, fill=0) for _ in range(count)]
            with k.loop(self.K // self.chunk) as turn:
                begin = turn * self.chunk
                with k.loop(-(-self.chunk // THREADS)) as i:
                    place = i * THREADS + thread
                    with k.when(place < self.chunk):
                        k.set(xs, [place], normed(begin + place))
                k.barrier()
                for matrices, first, _ in self._results():
                    with self._for_tiles(tile, matrices, first):
                        for total, number in zip(sums, matrices, strict=True):
                            self._add(number, total, tile - first, begin, thread, xs)
                k.barrier()
            for which, total in enumerate(sums):
                for column in range(columns):
                    k.set(partial, [(which * columns + column) * THREADS + thread], total[column])
            k.barrier()
            totals, lanes = k.local(count, fill=0), PANEL // columns
            with k.when(thread < PANEL):
                for which in range(count):
                    with k.loop(THREADS // lanes) as part:
                        place = (
                            (which * columns + thread % columns) * THREADS + part * lanes + thread // columns
                        )
                        k.set(totals, [which], totals[which] + partial[place])
                for matrices, first, offset in self._results():
                    column = (tile - first) * PANEL + thread
                    inside = column < product.matrices[matrices[0]].rows
                    with self._for_tiles(tile, matrices, first), k.when(inside):
                        self._finish(matrices, row, column, offset, [totals[which] for which in range(count)])

    def _add(self, number: int, total: Any, panel: Any, begin: Any, thread: Any, xs: Any) -> None:
        matrix = self.product.matrices[number]
        add = self._add_floats if matrix.bits == 32 else self._add_numbers
        add(matrix, self.parts[number], total, panel, begin, thread, xs)

    def _add_floats(
        self, matrix: Matrix, parts: Sequence[Any], total: Any, panel: Any, begin: Any, thread: Any, xs: Any
    ) -> None:
        """A thread for each of 64 columns and each fourth k."""
        k, (weight,) = self.k, parts
        slices = THREADS // PANEL
        lane, part = thread % PANEL, thread // PANEL
        turns, together = self.chunk // slices, 4
        with k.loop(turns // together) as i:
            for j in range(together):
                at = (i * together + j) * slices + part
                k.set(total, [0], total[0] + xs[at] * weight[panel, begin + at, lane])
        for j in range(turns // together * together, -(-self.chunk // slices)):
            at = j * slices + part
            with k.when(at < self.chunk):
                k.set(total, [0], total[0] + xs[at] * weight[panel, begin + at, lane])

    def _add_numbers(
        self, matrix: Matrix, parts: Sequence[Any], total: Any, panel: Any, begin: Any, thread: Any, xs: Any
    ) -> None:
        """A thread for each word of four columns and each sixteenth byte of a group."""
        k, bits, each = self.k, matrix.bits, 8 // matrix.bits
        words, scales, *zeros = parts
        lanes = PANEL // WORD
        slices = THREADS // lanes
        lane, part = thread % lanes, thread // lanes
        first, count = begin // matrix.group, self.chunk // matrix.group
        depth = matrix.group * bits // 8  # bytes of a group: 16, 32, 64 or 128
        sums = k.local(WORD)
        with k.loop(count) as i:
            group = first + i
            for column in range(WORD):
                k.set(sums, [column], k.real(0))
            for turn in range(depth // slices):
                byte = turn * slices + part
                word = words[panel, group, byte, lane]
                for half in range(each):
                    value = xs[i * matrix.group + byte * each + half]
                    for column in range(WORD):
                        number = signed(word, 8 * column + bits * half, bits)
                        if zeros:
                            number = number - signed(zeros[0][panel, group, lane], 8 * column, 8)
                        k.set(sums, [column], sums[column] + value * number.astype("float32"))
            for column in range(WORD):
                scale = scales[panel, group, lane * WORD + column]
                k.set(total, [column], total[column] + sums[column] * scale)

    def many(self) -> None:
        """A group for 32 rows of x and a panel."""
        k, product, K = self.k, self.product, self.K
        count = 2 if product.pairs else 1
        side, rows = 4, ROWS // 16  # a thread's results are 2 rows by 4 columns
        blocks = (self.M + ROWS - 1) // ROWS
        with k.grid(self._tiles(), blocks, only=self.M >= FEW) as (tile, block, thread):
            xs, ws = k.shared(ROWS * DEPTH), k.shared(count * DEPTH * PANEL)
            normed = self._tile_norm(block, thread)
            left, top = thread % (PANEL // side) * side, thread // (PANEL // side) * rows
            sums = [k.local(rows * side, fill=0) for _ in range(count)]
            with k.loop(-(-K // DEPTH)) as turn:
                for i in range(ROWS * DEPTH // THREADS):
                    place = i * THREADS + thread
                    row, at = block * ROWS + place // DEPTH, turn * DEPTH + place % DEPTH
                    inside = k.both(row < self.M, at < K)
                    k.set(xs, [place], k.where(inside, normed(row, place // DEPTH, at), k.real(0)))
                for matrices, first, _ in self._results():
                    with self._for_tiles(tile, matrices, first):
                        for which, number in enumerate(matrices):
                            self._load_weights(number, ws, which * DEPTH * PANEL, tile - first, turn, thread)
                k.barrier()
                with k.loop(DEPTH) as depth:
                    for which, total in enumerate(sums):
                        for r in range(rows):
                            for c in range(side):
                                weight = ws[which * DEPTH * PANEL + depth * PANEL + left + c]
                                i = r * side + c
                                k.set(total, [i], total[i] + xs[(top + r) * DEPTH + depth] * weight)
                k.barrier()
            for matrices, first, offset in self._results():
                with self._for_tiles(tile, matrices, first):
                    for r in range(rows):
                        for c in range(side):
                            row, column = block * ROWS + top + r, (tile - first) * PANEL + left + c
                            inside = k.both(row < self.M, column < product.matrices[matrices[0]].rows)
                            with k.when(inside):
                                self._finish(
                                    matrices, row, column, offset, [total[r * side + c] for total in sums]
                                )

    def _load_weights(self, number: int, ws: Any, to: int, panel: Any, turn: Any, thread: Any) -> None:
        """A matrix's part of a tile, as float32."""
        k, matrix = self.k, self.product.matrices[number]
        for i in range(DEPTH * PANEL // THREADS):
            place = i * THREADS + thread
            at, column = turn * DEPTH + place // PANEL, place % PANEL
            value = _element(matrix, self.parts[number], panel, at, column)
            if self.K % DEPTH:
                value = k.where(at < self.K, value, k.real(0))
            k.set(ws, [to + place], value)

    def _finish(
        self, matrices: Sequence[int], row: Any, column: Any, offset: int, totals: Sequence[Any]
    ) -> None:
        """Write one result."""
        k, product = self.k, self.product
        values = list(totals)
        for i, number in enumerate(matrices):
            if (bias := self.biases[number]) is not None:
                values[i] = values[i] + bias[column]
        if product.pairs:
            gate, up = values
            value = gate * k.call("sigmoid", gate) * up
        else:
            value = activation(k, product.activation, values[0])
        if self.residual is not None:
            value = value + self.residual[row, offset + column]
        k.set(self.y, [row, offset + column], value)

    def _results(self) -> list[tuple[tuple[int, ...], int, int]]:
        """Matrices that give one result, its first tile and its first column."""
        if self.product.pairs:
            return [((0, 1), 0, 0)]
        found: list[tuple[tuple[int, ...], int, int]] = []
        tile = column = 0
        for number, matrix in enumerate(self.product.matrices):
            found.append(((number,), tile, column))
            tile, column = tile + matrix.panels, column + matrix.rows
        return found

    def _for_tiles(self, tile: Any, matrices: Sequence[int], first: int) -> Any:
        last = first + self.product.matrices[matrices[0]].panels
        if last - first == self._tiles():
            return nullcontext()
        return self.k.when(self.k.both(tile >= first, tile < last))

    def _tiles(self) -> int:
        matrices = self.product.matrices[:1] if self.product.pairs else self.product.matrices
        return sum(matrix.panels for matrix in matrices)

    def _columns(self) -> int:
        """Columns of a thread where rows are few."""
        return 1 if self.product.matrices[0].bits == 32 else WORD

    def _row_norm(self, row: Any, thread: Any, partial: Any, folded: Any) -> Any:
        """Function of a column: x there, normalised."""
        k, x, K = self.k, self.x, self.K
        if self.product.norm == "none":
            return lambda column: x[row, column]
        mean, scale = row_statistics(
            k, self.product.norm, self.product.epsilon, K, thread, (partial, folded), lambda c: x[row, c]
        )
        return lambda column: self._normed(x[row, column], mean, scale, column)

    def _tile_norm(self, block: Any, thread: Any) -> Any:
        """Function of a row of x, its place in the tile and a column: x there, normalised."""
        k, x, K, norm = self.k, self.x, self.K, self.product.norm
        if norm == "none":
            return lambda row, place, column: x[row, column]
        together = THREADS // ROWS  # threads of a row
        partial, means, scales = k.shared(THREADS), k.shared(ROWS), k.shared(ROWS)
        row = k.call("min", block * ROWS + thread // together, self.M - 1)
        total = k.local(1)

        def summed(value: Any, to: Any, finish: Any) -> None:
            k.set(total, [0], k.real(0))
            with k.loop(-(-K // together)) as i:
                column = i * together + thread % together
                with k.when(column < K):
                    k.set(total, [0], total[0] + value(column))
            k.set(partial, [thread], total[0])
            k.barrier()
            with k.when(thread < ROWS):
                k.set(total, [0], k.real(0))
                for i in range(together):
                    k.set(total, [0], total[0] + partial[thread * together + i])
                k.set(to, [thread], finish(total[0]))
            k.barrier()

        if norm == "layer":
            summed(lambda column: x[row, column], means, lambda value: value / k.real(K))
        else:
            with k.when(thread < ROWS):
                k.set(means, [thread], k.real(0))
            k.barrier()

        def square(column: Any) -> Any:
            off = x[row, column] - means[thread // together]
            return off * off

        summed(
            square, scales, lambda value: k.call("rsqrt", value / k.real(K) + k.real(self.product.epsilon))
        )
        return lambda row, place, column: self._normed(x[row, column], means[place], scales[place], column)

    def _normed(self, value: Any, mean: Any, scale: Any, column: Any) -> Any:
        weight, *bias = self.norm
        value = (value - mean) * scale * weight[column] if bias else value * scale * weight[column]
        return value + bias[0][column] if bias else value


def row_statistics(
    k: Builder, norm: str, epsilon: float, width: int, thread: Any, shared: tuple[Any, Any], value: Any
) -> tuple[Any, Any]:
    """The mean (0 for "rms") and the inverse deviation of a row, whose columns are a function's values."""
    total = k.local(1)

    def summed(each: Any) -> Any:
        k.set(total, [0], k.real(0))
        with k.loop(-(-width // THREADS)) as i:
            column = i * THREADS + thread
            with k.when(column < width):
                k.set(total, [0], total[0] + each(column))
        return k.group_sum(*shared, thread, total[0])

    kept = k.local(2, fill=0)
    if norm == "layer":
        k.set(kept, [0], summed(value) / k.real(width))
    squares = summed(lambda column: (value(column) - kept[0]) * (value(column) - kept[0]))
    k.set(kept, [1], k.call("rsqrt", squares / k.real(width) + k.real(epsilon)))
    return kept[0], kept[1]


def _chunk(matrix: Matrix) -> int:
    """How many columns of x a group keeps at a time: K in equal parts of whole groups."""
    K, group = matrix.columns, max(matrix.group, 1)
    most = CHUNK if matrix.bits == 32 else CHUNK // 2
    count = next(n for n in range(-(-K // most), K + 1) if K % n == 0 and K // n % group == 0)
    return K // count


def signed(word: Any, first: int | Any, bits: int) -> Any:
    """The number of so many bits from a bit of a word on, with its sign."""
    return (word << (32 - bits - first)) >> (32 - bits)


def _element(matrix: Matrix, parts: Sequence[Any], panel: Any, at: Any, column: Any) -> Any:
    """What a matrix has in row `column` of a panel and column `at`, as float32."""
    if matrix.bits == 32:
        return parts[0][panel, at, column]
    words, scales, *zeros = parts
    each, group = 8 // matrix.bits, at // matrix.group
    word = words[panel, group, at % matrix.group // each, column // WORD]
    first = (column % WORD * 8 + at % each * matrix.bits).astype("int32")
    number = (word << (32 - matrix.bits - first)) >> (32 - matrix.bits)
    if zeros:
        zero = zeros[0][panel, group, column // WORD]
        number = number - ((zero << (24 - (column % WORD * 8).astype("int32"))) >> 24)
    return number.astype("float32") * scales[panel, group, column]


@cache
def define_rows(matrix: Matrix) -> "tvm.tirx.PrimFunc":
    """Return the function of ids (n) int64, a matrix's parts and y (n, K): its rows, those of ids outside clamped."""
    with function("rows") as k:
        n = k.size("n")
        ids = k.tensor("ids", (n,), "int64")
        parts = [k.tensor(f"w{i}", *part) for i, part in enumerate(matrix.parts())]
        y = k.tensor("y", (n, matrix.columns))
        with k.grid(-(-matrix.columns // THREADS), n) as (block, row, thread):
            column = block * THREADS + thread
            with k.when(column < matrix.columns):
                wanted = k.call("max", k.call("min", ids[row], matrix.rows - 1), 0)
                k.set(y, [row, column], _element(matrix, parts, wanted // PANEL, column, wanted % PANEL))
    return k.function
