"""Attention over a cache on GPUs: rotation, the grown cache and the attended values.

One new token takes one kernel: a group of threads for each head reads each key and value of the past once, which it
copies to the grown cache, too. Several new tokens take two: the cache is grown, then each query has a group. Scores are
those of the numerically stable softmax over blocks of keys (Milakov and Gimelshein 2018), so any number of them fits.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from portlm.compile.tvm_gpu import LOWEST, THREADS, Builder, function

if TYPE_CHECKING:
    import tvm

GROUP = 64  # threads, and keys of a block


@dataclass(frozen=True)
class Attention:
    """What a kernel computes; portlm.ops.cached_attention defines it.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        width: of a head.
        scale: of the scores.
        window: as there, 0 for none.
        softcap: as there, 0 for none.
        sources: width of the rows in which queries, keys and values lie, and the first column of each.
        tables: rows of the tables by which queries and keys are rotated, 0 if they are not.
    """

    heads: int
    kv_heads: int
    width: int
    scale: float
    window: int
    softcap: float
    sources: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    tables: int


@cache
def define(attention: Attention) -> "tvm.tirx.PrimFunc":
    """Return the function of q, k and v (rows), past keys and values, mask, out (B, T, H D), and grown keys and values.

    With tables, position_ids (B, T), cos and sin (tables, D / 2) come behind the mask.
    """
    with function("attention") as k:
        kernel = _Attention(k, attention)
        kernel.attend(one=True)
        kernel.append()
        kernel.attend(one=False)
    return k.function


class _Attention:
    """The kernels of an attention."""

    def __init__(self, k: Builder, it: Attention):
        self.k, self.it = k, it
        B, T, P, D = k.size("B"), k.size("T"), k.size("P"), it.width
        self.B, self.T, self.P, self.S = B, T, P, P + T
        names = ("q", "k", "v")
        self.q, self.fresh_keys, self.fresh_values = (
            k.tensor(name, (B * T, width)) for name, (width, _) in zip(names, it.sources, strict=True)
        )
        self.past = [k.tensor(f"past_{name}", (B, it.kv_heads, P, D)) for name in names[1:]]
        self.mask = k.tensor("mask", (B, P + T), "int64")
        if it.tables:
            self.positions = k.tensor("positions", (B, T), "int64")
            self.cos, self.sin = (k.tensor(name, (it.tables, D // 2)) for name in ("cos", "sin"))
        self.out = k.tensor("out", (B, T, it.heads * D))  # which says T
        self.present = [k.tensor(f"present_{name}", (B, it.kv_heads, P + T, D)) for name in names[1:]]

    def attend(self, one: bool) -> None:
        """A group for each query and head, which grows the cache, too, if there is one new token."""
        k, it, D = self.k, self.it, self.it.width
        shared = it.heads // it.kv_heads
        only = self.T == 1 if one else self.T != 1
        with k.grid(self.T * it.heads, self.B, GROUP, only) as (place, batch, thread):
            token, head = place // it.heads, place % it.heads
            row, kv_head = batch * self.T + token, head // shared
            query, scores, weights = k.shared(D), k.shared(GROUP), k.shared(GROUP)
            key = k.shared(D)
            writes = head % shared == 0
            with k.loop(-(-D // GROUP)) as i:
                d = i * GROUP + thread
                with k.when(d < D):
                    value = self._rotated(self.q, 0, row, batch, token, head, d)
                    k.set(query, [d], value * k.real(it.scale))
                    if one:
                        fresh = k.local(1)
                        k.set(fresh, [0], self._rotated(self.fresh_keys, 1, row, batch, token, kv_head, d))
                        k.set(key, [d], fresh[0])
                        with k.when(writes):
                            k.set(self.present[0], [batch, kv_head, self.P, d], fresh[0])
            k.barrier()
            best, total, score, scaled = (k.local(1, fill=fill) for fill in (LOWEST, 0, 0, 0))
            each = -(-D // GROUP)
            sums = k.local(each, fill=0)
            with k.loop((self.S + GROUP - 1) // GROUP) as block:
                j = block * GROUP + thread
                k.set(score, [0], k.real(0))
                old = self.past[0] if one else self.present[0]
                with k.when(j < (self.P if one else self.S)), k.loop(D) as d:
                    k.set(score, [0], score[0] + query[d] * old[batch, kv_head, j, d])
                    if one:
                        with k.when(writes):
                            k.set(self.present[0], [batch, kv_head, j, d], old[batch, kv_head, j, d])
                if one:
                    with k.when(j == self.P), k.loop(D) as d:
                        k.set(score, [0], score[0] + query[d] * key[d])
                if it.softcap:
                    cap = k.real(it.softcap)
                    k.set(score, [0], cap * k.call("tanh", score[0] / cap))
                seen = self._seen(batch, token, j)
                k.set(scores, [thread], k.where(seen, score[0], k.real(LOWEST)))
                k.barrier()
                k.set(scaled, [0], best[0])
                with k.loop(GROUP) as other:
                    k.set(best, [0], k.call("max", best[0], scores[other]))
                # What nobody sees has no weight, also where nothing was seen so far.
                weight = k.where(
                    scores[thread] > k.real(LOWEST), k.call("exp", scores[thread] - best[0]), k.real(0)
                )
                k.set(weights, [thread], weight)
                k.set(scaled, [0], k.call("exp", scaled[0] - best[0]))
                k.barrier()
                k.set(total, [0], total[0] * scaled[0])
                with k.loop(GROUP) as other:
                    k.set(total, [0], total[0] + weights[other])
                for i in range(each):
                    d = i * GROUP + thread
                    k.set(sums, [i], sums[i] * scaled[0])
                    with k.when(d < D):
                        self._add_values(one, sums, i, weights, block, batch, kv_head, d, row, writes)
                k.barrier()
            for i in range(each):
                d = i * GROUP + thread
                with k.when(d < D):
                    value = k.where(total[0] > k.real(0), sums[i] / total[0], k.real(0))
                    k.set(self.out, [batch, token, head * D + d], value)

    def _add_values(
        self,
        one: bool,
        sums: Any,
        i: int,
        weights: Any,
        block: Any,
        batch: Any,
        kv_head: Any,
        d: Any,
        row: Any,
        writes: Any,
    ) -> None:
        k = self.k
        first, old = block * GROUP, self.past[1] if one else self.present[1]
        with k.loop(k.call("min", k.long(GROUP), (self.P if one else self.S) - first)) as j:
            value = old[batch, kv_head, first + j, d]
            k.set(sums, [i], sums[i] + weights[j] * value)
            if one:
                with k.when(writes):
                    k.set(self.present[1], [batch, kv_head, first + j, d], value)
        if not one:
            return
        with k.when(k.both(first <= self.P, first + GROUP > self.P)):
            _, begin = self.it.sources[2]
            value = self.fresh_values[row, begin + kv_head * self.it.width + d]
            k.set(sums, [i], sums[i] + weights[self.P - first] * value)
            with k.when(writes):
                k.set(self.present[1], [batch, kv_head, self.P, d], value)

    def append(self) -> None:
        """Copy the past, and behind it the new tokens: a thread for each element of both."""
        k, it, D = self.k, self.it, self.it.width
        rows = self.B * it.kv_heads
        with k.grid((self.S * D + THREADS - 1) // THREADS, rows, only=self.T != 1) as (block, row, thread):
            place = block * THREADS + thread
            batch, head, j, d = row // it.kv_heads, row % it.kv_heads, place // D, place % D
            with k.when(j < self.P):
                for past, present in zip(self.past, self.present, strict=True):
                    k.set(present, [batch, head, j, d], past[batch, head, j, d])
            with k.when(k.both(j >= self.P, j < self.S)):
                token = j - self.P
                at = batch * self.T + token
                value = self._rotated(self.fresh_keys, 1, at, batch, token, head, d)
                k.set(self.present[0], [batch, head, j, d], value)
                _, begin = it.sources[2]
                k.set(self.present[1], [batch, head, j, d], self.fresh_values[at, begin + head * D + d])

    def _rotated(self, source: Any, which: int, row: Any, batch: Any, token: Any, head: Any, d: Any) -> Any:
        """Column d of a head of queries or keys, rotated if there are tables."""
        k, it, D = self.k, self.it, self.it.width
        first = it.sources[which][1] + head * D
        value = source[row, first + d]
        if not it.tables:
            return value
        half = D // 2
        position = k.call("max", k.call("min", self.positions[batch, token], it.tables - 1), 0)
        other = k.where(d < half, -source[row, first + (d + half) % D], source[row, first + (d + half) % D])
        return value * self.cos[position, d % half] + other * self.sin[position, d % half]

    def _seen(self, batch: Any, token: Any, j: Any) -> Any:
        k, it = self.k, self.it
        last = self.P + token
        conditions = [j <= last]
        if it.window:
            conditions.append(j > last - it.window)
        # Slots beyond the last one have no mask.
        masked = self.mask[batch, k.call("min", j, self.S - 1)]
        return k.both(*conditions, masked != 0)
