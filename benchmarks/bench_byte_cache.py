"""What a key/value cache of 8 bits costs trained models: perplexity, divergence and agreement beside one of float32.

One model is that of `portlm demo`, the other a LLaMA of the same size, with rotary embeddings and three query heads for
each key/value head. Both read the last tenth of the text, which training has not seen, alone and with weights of 4 bits
(groups of 32, rounded to nearest); behind nothing, behind 128 tokens, and over the last tokens of the context, since
what rounding costs might grow with what is in the cache. The models run in eager PyTorch with keys and values rounded
as they would be kept: by those every engine with such a cache is judged (docs/verify.md).

    python benchmarks/bench_byte_cache.py --run runs/demo       # trains into runs/demo, or takes what is there
    python benchmarks/bench_byte_cache.py --family llama --run runs/llama
    python benchmarks/bench_byte_cache.py --smoke               # a minute, to see that it runs
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_quantization import SMOKE_STEPS, trained, with_weights

from portlm.compile.calibrate import read
from portlm.compile.quantize import RoundToNearest, Scheme
from portlm.flows.measuring import environment
from portlm.flows.quality import MOST_TOKENS, Quality, quality
from portlm.models import Model
from portlm.runtimes.eager import TorchEngine
from portlm.tokenizer import Tokenizer

LAST = 16  # tokens of the context that stand for all of it
LLAMA: dict[str, Any] = {
    "steps": 600,
    "model": {
        "family": "llama", "n_layer": 4, "n_head": 6, "n_kv_head": 2, "width": 192, "context_length": 512,
    },
    "data": {"tokenizer": "bpe:2048", "batch_size": 2},
}  # fmt: skip
"""What differs from the demonstration's settings: the same tokens in a step, and a longer context."""


def engine(model: Model, cache: str) -> TorchEngine:
    """Return a model in eager PyTorch, its keys and values kept in "float32" or "int8"."""
    made = TorchEngine.of(model, "cpu")
    made.rounds_cache = cache == "int8"
    return made


def main() -> None:
    """Train, read the text with every form, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder; trained into if it does not exist")
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2", help="(default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=MOST_TOKENS, help="of the held-out text (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="few steps, few tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or Path(scratch) / "run"
        changes = LLAMA if arguments.family == "llama" else {}
        model, path = trained(run, SMOKE_STEPS if arguments.smoke else None, changes)
        context = model.config.context_length
        text = read(path, Tokenizer.load(run / "final"), model.config.vocab_size)
        small = with_weights(model, RoundToNearest(Scheme(4, 32)))
        forms = [  # weights and cache, beside what
            ("float32, int8", engine(model, "float32"), engine(model, "int8"), "float32, float32"),
            ("int4, float32", engine(model, "float32"), engine(small, "float32"), "float32, float32"),
            ("int4, int8", engine(model, "float32"), engine(small, "int8"), "float32, float32"),
            ("int4, int8", engine(small, "float32"), engine(small, "int8"), "int4, float32"),
        ]
        tokens = text.held_out[: 2 * context if arguments.smoke else arguments.tokens]
        print(f"{arguments.family}, {model.num_parameters():,} parameters, context {context}")
        print(
            "\n| weights, cache | beside | behind | tokens | perplexity | ratio | KL, nats | same top token |"
        )
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, own, other, beside in forms:
            for behind in (0, 128, context - LAST):
                found = quality(own, other, tokens, before=text.before, behind=behind)
                print(row(name, beside, behind, found), flush=True)
    env = environment()
    print(f"\n{env['cpu']}, kernels for {env['isa']}, {env['system']}.", file=sys.stderr)


def row(name: str, beside: str, behind: int, q: Quality) -> str:
    """Return a line of the table."""
    return (
        f"| {name} | {beside} | {behind} | {q.tokens:,} | {q.perplexity:.3f} | {q.ratio:.5f} | {q.kl:.6f} | "
        f"{100 * q.top1:.2f} % |"
    )


if __name__ == "__main__":
    main()
