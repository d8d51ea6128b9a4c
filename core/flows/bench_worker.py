"""One engine in a process of its own, measured on command: the far side of portlm.flows.bench.

Reads one JSON object per line on stdin and answers with one on stdout. Between commands the process blocks in
read(), so that it takes no processor from the engine that is being measured. Run as
``python -m portlm.flows.bench_worker``.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import numpy as np

from portlm.threads import bound_spinning


def _memory() -> dict[str, int]:
    """Return the resident set size now and at its highest, in bytes."""
    resident = 0
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 - a kernel file
        for line in status:
            if line.startswith("VmRSS:"):
                resident = int(line.split()[1]) * 1024
    return {"rss": resident, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class Worker:
    """Holds a session; each public method is a command."""

    def load(self, path: str, engine: str, device: str, profile: str, threads: int | None) -> dict[str, Any]:
        """Load the model and run one token, which is when some engines do their real loading."""
        begin = time.perf_counter()
        import portlm
        from portlm.rows import Rows

        self._rows = Rows
        imported = time.perf_counter()
        before = _memory()["rss"]
        self.session = portlm.load(path, engine=engine, device=device, profile=profile, threads=threads)
        self.engine = self.session.engine
        self._rows(self.engine, 1).read(np.zeros((1, 1), np.int64))
        loaded = time.perf_counter()
        return {
            "import_s": imported - begin,
            "load_s": loaded - imported,
            "model_bytes": _memory()["rss"] - before,
            "profile": self.engine.profile,
            "vocab_size": self.engine.vocab_size,
            "context_length": self.engine.context_length,
        }

    def _ids(self, tokens: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.engine.vocab_size, (1, tokens), dtype=np.int64)

    def prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        """Time one pass over a prompt of random tokens."""
        ids, rows = self._ids(tokens, seed), self._rows(self.engine, 1)
        begin = time.perf_counter()
        rows.read(ids)
        return {"seconds": time.perf_counter() - begin}

    def decode(self, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        """Time greedy single-token steps behind a prompt, selection included, prompt excluded."""
        rows = self._rows(self.engine, 1)
        logits = rows.read(self._ids(prompt, seed))[:, -1]
        begin = time.perf_counter()
        for _ in range(tokens):
            logits = rows.next(np.argmax(logits, axis=1))
        return {"seconds": time.perf_counter() - begin}

    def limits(self) -> dict[str, Any]:
        """Probe what the hardware gives: read bandwidth in B/s and float32 multiply-adds in FLOP/s, all threads."""
        from portlm.flows.measuring import Limits

        found = Limits()
        found.probe(steps=50_000_000)
        return {"bandwidth": found.read, "flops": found.flops}

    def memory(self) -> dict[str, Any]:
        """Report resident memory."""
        return dict(_memory())


def main() -> None:
    """Answer commands until stdin closes."""
    bound_spinning()
    worker = Worker()
    answers = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not spoil the protocol
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("command")
        try:
            answer = getattr(worker, name)(**request)
        except Exception as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
