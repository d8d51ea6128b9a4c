"""Compare two source trees of portlm, this one and an earlier one, through the public interface alone.

    python benchmarks/compare_trees.py ../portlm-before --rounds 9

Each tree runs in processes of its own, parked in read() while the other is measured. A round visits both, the next in
the opposite order; the figures are medians of paired ratios (this tree's time / the other's) with bootstrapped 95 %
intervals. Both trees must have been built (``pip install -e .`` or ``make setup``). Do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SMALL = {
    "vocab_size": 50257,
    "context_length": 1024,
    "n_layer": 12,
    "n_head": 12,
    "width": 768,
}  # GPT-2, 124 M
TINY = {"vocab_size": 8192, "context_length": 512, "n_layer": 6, "n_head": 6, "width": 384}  # 14 M
ENGINES = (("tvm", "cpu", "fused"), ("ort", "cpu", "fused"), ("ort", "cpu", "portable"))


# ---------------------------------------------------------------------------------------------- one tree's process


class Worker:
    """Commands of one tree's process; each returns plain data."""

    def make(self, folder: str, sizes: dict[str, int]) -> dict[str, Any]:
        """Save a random GPT-2 checkpoint."""
        import torch

        from portlm.models import build, save_model
        from portlm.models.gpt2 import GPT2Config

        torch.manual_seed(0)
        save_model(folder, build(GPT2Config(**sizes)))
        return {}

    def export(self, checkpoint: str, out: str) -> dict[str, Any]:
        """Export a checkpoint: seconds, imports included, and the process's peak memory afterwards."""
        begin = time.perf_counter()
        from portlm.compile.export import export

        export(checkpoint, out)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def compile(self, artifact: str) -> dict[str, Any]:
        """Compile for the engines compared here."""
        from portlm.compile.build import build

        build(artifact, [("tvm", "cpu", "fused"), ("ort", "cpu", "fused")])
        return {}

    def load(self, artifact: str, engine: str, device: str, profile: str) -> dict[str, Any]:
        """Open a session."""
        import portlm

        self.session = portlm.load(artifact, engine=engine, device=device, profile=profile)
        return {}

    def decode(self, prompt: int, tokens: int) -> dict[str, Any]:
        """Seconds per token behind a prompt, one row."""
        options: Any = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        stats = self.session.generate([range_ids(prompt)], **options)[0].stats
        return {"seconds": stats.decode_seconds / (tokens - 1)}

    def prefill(self, prompt: int) -> dict[str, Any]:
        """Seconds to the first token of a prompt."""
        options: Any = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        stats = self.session.generate([range_ids(prompt)], **options)[0].stats
        return {"seconds": stats.prefill_seconds}

    def ragged(self, lengths: list[int], new: list[int]) -> dict[str, Any]:
        """Seconds per token of a batch whose rows stop at very different lengths, by a token that ends each."""
        prompts = [range_ids(n, i) for i, n in enumerate(lengths)]
        options: Any = {"max_new_tokens": max(new), "batch_size": len(lengths), "temperature": 1.0, "seed": 1}
        if not self.session.eos_ids:
            rows = self.session.generate(prompts, ignore_eos=True, **options)
            ends = (row.token_ids[n - 1] for row, n in zip(rows, new, strict=True) if n < max(new))
            self.session.eos_ids = frozenset(ends)
        begin = time.perf_counter()
        rows = self.session.generate(prompts, **options)
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds / sum(row.new_tokens for row in rows),
            "tokens": [row.new_tokens for row in rows],
        }

    def train(self, text: str, out: str, steps: int) -> dict[str, Any]:
        """Seconds per training step, nanoGPT's CPU setting, evaluation and saving not counted."""
        from portlm import settings
        from portlm.train.config import PretrainConfig
        from portlm.train.pretrain import pretrain

        preset = {"steps": steps, "data": {"texts": (text,)}, "evaluation": {"interval": steps, "sample_tokens": 0},
                  "checkpoint": {"interval": steps}}  # fmt: skip
        result = pretrain(settings.load(PretrainConfig, preset=preset), out, quiet=True, plot=False)
        return {"seconds": result.seconds / result.steps}


def range_ids(n: int, seed: int = 0) -> list[int]:
    """The same random ids in both trees."""
    return [random.Random(seed * 1000 + i).randrange(8000) for i in range(n)]


def serve() -> None:
    """Answer one JSON command per line."""
    from portlm.threads import bound_spinning

    bound_spinning()
    worker, answers, sys.stdout = Worker(), sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("command"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


# ---------------------------------------------------------------------------------------------------- the comparison


class Tree:
    """One process that imports portlm from a source tree."""

    def __init__(self, root: Path, home: Path):
        view = root / "build" / "compare" / "portlm"
        view.mkdir(parents=True, exist_ok=True)
        wanted = {entry.name: entry for entry in (root / "core").iterdir() if entry.name != "__pycache__"}
        wanted |= {"compile": root / "compile", "runtimes": root / "runtimes"}
        for link in view.iterdir():
            link.unlink()
        for name, entry in wanted.items():
            (view / name).symlink_to(entry)
        environment = {**os.environ, "PYTHONPATH": str(view.parent), "PORTLM_HOME": str(home)}
        self.pipe = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self.pipe.stdin is not None
        assert self.pipe.stdout is not None
        self.pipe.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.pipe.stdin.flush()
        answer: dict[str, Any] = json.loads(self.pipe.stdout.readline())
        if "error" in answer:
            raise SystemExit(f"{command}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.pipe.stdin is not None
        self.pipe.stdin.close()
        self.pipe.wait()


class Comparison:
    """This tree against another, in a scratch folder."""

    def __init__(self, other: Path, scratch: Path, rounds: int):
        self.roots = {"this": HERE, "other": other.resolve()}
        self.scratch, self.rounds = scratch, rounds
        self.rows: list[dict[str, Any]] = []

    def open(self) -> dict[str, Tree]:
        """A fresh process of each tree."""
        return {name: Tree(root, self.scratch / f"home-{name}") for name, root in self.roots.items()}

    def pair(self, what: str, measure: Any, fresh: bool = False, key: str = "seconds") -> None:
        """Measure both trees in turns; `measure(name, tree)` returns a dictionary with `key`."""
        trees = {} if fresh else self.open()
        samples: dict[str, list[float]] = {"this": [], "other": []}
        for turn in range(-1, self.rounds):
            for name in ("this", "other") if turn % 2 else ("other", "this"):
                tree = Tree(self.roots[name], self.scratch / f"home-{name}") if fresh else trees[name]
                value = measure(name, tree)[key]
                if turn >= 0:
                    samples[name].append(value)
                if fresh:
                    tree.close()
        for tree in trees.values():
            tree.close()
        self.report(what, samples)

    def report(self, what: str, samples: dict[str, list[float]]) -> None:
        """Print the median of the paired ratios with its interval."""
        from portlm.flows.measuring import paired_ratio  # not above: the other tree runs this file, too

        ratio, (low, high) = paired_ratio(samples["this"], samples["other"])
        row = {
            "what": what, "this": statistics.median(samples["this"]), "other": statistics.median(samples["other"]),
            "ratio": ratio, "low": low, "high": high,
        }  # fmt: skip
        self.rows.append(row)
        print(
            f"{what:48} {row['this']:12.5g} {row['other']:12.5g}  {row['ratio']:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )

    def engines(self, label: str, sizes: dict[str, int], measures: dict[str, Any]) -> None:
        """Make, export and compile one model with both trees, then compare each engine."""
        checkpoint = self.scratch / label
        trees = self.open()
        trees["other"].call("make", folder=str(checkpoint), sizes=sizes)
        for name, tree in trees.items():
            tree.call("export", checkpoint=str(checkpoint), out=str(self.scratch / f"{label}-{name}"))
            tree.call("compile", artifact=str(self.scratch / f"{label}-{name}"))
            tree.close()
        for engine, device, profile in ENGINES:
            for what, (command, arguments) in measures.items():
                loaded: set[int] = set()

                def measure(
                    name: str, tree: Tree, command: str = command, arguments: Any = arguments,
                    loaded: set[int] = loaded, target: tuple[str, str, str] = (engine, device, profile),
                ) -> dict[str, Any]:  # fmt: skip
                    if id(tree) not in loaded:
                        loaded.add(id(tree))
                        folder = str(self.scratch / f"{label}-{name}")
                        engine, device, profile = target
                        tree.call("load", artifact=folder, engine=engine, device=device, profile=profile)
                    return tree.call(command, **arguments)

                self.pair(f"{engine}:{device}:{profile} {what}", measure)


def main() -> None:
    """Compare everything, or what --only names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", nargs="?", type=Path, help="the other source tree, built")
    parser.add_argument("--rounds", type=int, default=9, help="pairs per figure (default: %(default)s)")
    parser.add_argument("--only", default="train,decode,prefill,ragged,export", help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.other is None or not (options.other / "core").is_dir():
        parser.error("name the other source tree")
    wanted = set(options.only.split(","))
    print(f"{'':48} {'this, s':>12} {'other, s':>12}  this / other (95 %)")
    with tempfile.TemporaryDirectory() as folder:
        run = Comparison(options.other, Path(folder), options.rounds)
        if "train" in wanted:
            text = run.scratch / "text.txt"
            text.write_text(letters(400_000))
            run.pair(
                "training step, nanoGPT's CPU setting",
                lambda name, tree: tree.call(
                    "train",
                    text=str(text),
                    out=str(run.scratch / f"run-{name}-{time.monotonic_ns()}"),
                    steps=150,
                ),
            )
        measures: dict[str, Any] = {}
        if "decode" in wanted:
            measures["decode behind 128, 14 M"] = ("decode", {"prompt": 128, "tokens": 96})
        if "ragged" in wanted:
            lengths = [8, 12, 20, 30, 45, 60, 80, 100, 16, 24, 40, 64, 90, 10, 128, 200]
            new = [8, 16, 200, 12, 24, 32, 10, 40, 20, 64, 16, 8, 96, 12, 30, 24]
            measures["16 ragged rows, per token, 14 M"] = ("ragged", {"lengths": lengths, "new": new})
        if measures:
            run.engines("tiny", TINY, measures)
        if "prefill" in wanted:
            run.engines("small", SMALL, {"prefill 512, 124 M": ("prefill", {"prompt": 512})})
        if "export" in wanted:
            checkpoint = run.scratch / "export"
            maker = Tree(options.other, run.scratch / "home-maker")
            maker.call("make", folder=str(checkpoint), sizes=SMALL)
            maker.close()
            for key in ("seconds", "peak_rss"):
                run.pair(
                    f"export 124 M, {key}",
                    lambda name, tree: tree.call(
                        "export", checkpoint=str(checkpoint), out=str(run.scratch / f"export-{name}")
                    ),
                    fresh=True,
                    key=key,
                )
    if options.json:
        options.json.write_text(json.dumps(run.rows, indent=1) + "\n")


def letters(n: int) -> str:
    """A text to train on."""
    draw = random.Random(0)
    return "".join(chr(97 + draw.randrange(26)) for _ in range(n))


if __name__ == "__main__":
    main()
