"""One contender in a process of its own: the far side of portlm.flows.race.process.

Reads one JSON object per line on stdin and answers with one on stdout. Between commands it is blocked in read(). Run
as ``python -m portlm.flows.race.worker``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from portlm.errors import PortlmError
from portlm.flows.race import gate
from portlm.flows.race.contender import Array, Entry, Source
from portlm.threads import bound_spinning

TRIALS, TRIAL_TOKENS = 3, 24  # of each setting that is tried
CHUNK = 512  # tokens of a call that fills a cache


def memory() -> dict[str, float]:
    """Resident memory in MiB: now, and the most there was."""
    found = dict.fromkeys(("VmRSS", "VmHWM"), 0.0)
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) / 1024
    return {"now": found["VmRSS"], "peak": found["VmHWM"]}


class Worker:
    """Holds one contender; each public method is a command."""

    def enter(self, entry: dict[str, Any], artifact: str, hf: str, work: str, vocab: int) -> dict[str, Any]:
        """Say who this is. Nothing is imported yet."""
        self._entry = Entry(**entry)
        self._source = Source(Path(artifact), Path(hf), Path(work))
        self._vocab = vocab
        self._contender = self._entry.make()
        return {}

    def place(self, hf: str) -> dict[str, Any]:
        """Say where the weights are, to a worker that is no contender."""
        self._hf = Path(hf)
        return {}

    def reference(self, out: str) -> dict[str, Any]:
        """Compute what everybody is compared with, and write it to an .npz."""
        ids, logits, who = gate.reference(self._hf)
        with Path(out).open("wb") as file:
            np.savez(file, ids=ids, logits=logits)
        return {"who": who}

    def prepare(self) -> dict[str, Any]:
        """Make its files."""
        begin = time.perf_counter()
        self._contender.prepare(self._source)
        return {"seconds": time.perf_counter() - begin}

    def load(self, threads: int | None) -> dict[str, Any]:
        """Import the engine, open the model, and read one token, which is when some engines really load."""
        begin = time.perf_counter()
        self._contender.bring()
        imported = time.perf_counter()
        before = memory()["now"]
        start = time.perf_counter()
        self._contender.load(self._source, threads)
        self._contender.reset()
        np.argmax(self._contender.read(self._ids(1, 0)))
        end = time.perf_counter()
        after = memory()["now"]
        return {"import_s": imported - begin, "load_s": end - start, "model_mib": after - before}

    def tune(self, prompt: int) -> dict[str, Any]:
        """Try the contender's settings in turns, and keep the one that decodes fastest behind a prompt."""
        choices = self._contender.choices
        if not choices:
            return {"choice": None}
        best: dict[int, float] = {}
        refused = ""
        for trial in range(TRIALS):
            for i, choice in enumerate(choices):
                try:
                    self._contender.configure(choice)
                except PortlmError as error:  # not every model can have every cache
                    refused = str(error)
                    continue
                self._contender.reset()
                logits = self._contender.read(self._ids(prompt, trial))
                took = self._contender.decode(logits, TRIAL_TOKENS) / TRIAL_TOKENS
                best[i] = min(best.get(i, took), took)
        if not best:
            raise PortlmError(refused)
        chosen = min(best, key=lambda i: best[i])
        self._contender.configure(choices[chosen])
        return {"choice": choices[chosen], "tried": [{**choices[i], "ms": 1e3 * best[i]} for i in best]}

    def gate(self, reference: str) -> dict[str, Any]:
        """Compare with the reference's logits, in an .npz with `ids` and `logits`."""
        with np.load(reference) as file:
            ids, wanted = file["ids"], file["logits"]
        return asdict(gate.compare(gate.answer(self._contender, ids, len(wanted) - 1), wanted))

    def describe(self) -> dict[str, Any]:
        """What it reads for a token: bytes of weights, and of each number of its cache."""
        weights = self._contender.weight_bytes(self._source)
        return {"weight_bytes": weights, "cache_item": self._contender.cache_item}

    def visit(self, prompt: int, context: int, tokens: int, seed: int, least: float) -> dict[str, Any]:
        """Read a prompt, fill the cache up to a context, and decode; mean seconds of the first and the last.

        All of it is repeated until `least` seconds have passed, so that a small model does not finish within a tick of
        the kernel's clocks, by which others' share of the machine is known.
        """
        ids = self._ids(context, seed)
        contender = self._contender
        took = {"prefill": 0.0, "decode": 0.0}
        start, times = time.perf_counter(), 0
        while not times or time.perf_counter() - start < least:
            contender.reset()
            begin = time.perf_counter()
            logits = contender.read(ids[:prompt])
            np.argmax(logits)
            took["prefill"] += time.perf_counter() - begin
            for first in range(prompt, context, CHUNK):
                logits = contender.read(ids[first : first + CHUNK])
            took["decode"] += contender.decode(logits, tokens)
            times += 1
        return {name: seconds / times for name, seconds in took.items()}

    def memory(self) -> dict[str, Any]:
        """Report resident memory in MiB."""
        return dict(memory())

    def limits(self) -> dict[str, Any]:
        """Probe what all threads get: bytes/s read, float32 FLOP/s, and operations/s on bytes."""
        from portlm import _C
        from portlm.flows.measuring import Limits

        bound_spinning()
        found = Limits()
        found.probe()
        return {"read": found.read, "flops": found.flops, "byte_ops": _C.probe_int8(20_000_000)}

    def _ids(self, count: int, seed: int) -> Array:
        return np.random.default_rng(seed).integers(0, self._vocab, count)


def main() -> None:
    """Answer commands until stdin closes."""
    worker = Worker()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints, from C++ too, must not spoil the protocol
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("command"))(**request)
        except Exception as error:
            answer = {"error": " ".join(str(error).split())[:400] or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # some engines crash while they are taken down


if __name__ == "__main__":
    main()
