"""What quantizing the weights costs the model of `portlm demo`, with and without calibration.

The model is trained as the demonstration trains it (about ten minutes on two cores), on text that every Python carries.
Its weights are quantized in every scheme, rounded to nearest and with GPTQ for the training text, and each form reads
the last tenth of the text, which neither training nor calibration has seen. Beside perplexity stand the divergence from
the float32 model and the share of tokens that both think likeliest. The dequantized weights run in eager PyTorch: by
those every engine with quantized weights is judged (docs/verify.md).

GPTQ depends on the text. How much, other draws of windows of the same text show, and windows of another text: source
code of the standard library.

    python benchmarks/bench_quantization.py --run runs/demo     # trains into runs/demo, or takes what is there
    python benchmarks/bench_quantization.py --smoke             # a minute, to see that it runs
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from portlm import settings
from portlm.compile.calibrate import MOST_TOKENS, Text, calibrated, read
from portlm.compile.quantize import GROUPS, Quantizer, RoundToNearest, Scheme, dequantize, quantize
from portlm.data.batches import BatchSampler
from portlm.errors import UsageError
from portlm.flows import demo
from portlm.flows.measuring import environment
from portlm.flows.quality import Quality, quality
from portlm.models import Model, build, load_model
from portlm.runtimes.eager import TorchEngine
from portlm.tokenizer import Tokenizer
from portlm.train.config import PretrainConfig
from portlm.train.pretrain import pretrain

SMOKE_STEPS = 30
DRAWS = (1, 2, 3)  # seeds of other windows of the same text


@dataclass(frozen=True)
class Row:
    """One form of the model."""

    bits: int
    group: int
    symmetric: bool
    method: str
    text: str
    problem: str = ""
    seconds: float = 0.0
    quality: Quality | None = None


def trained(run: Path, steps: int | None, changes: dict[str, Any] | None = None) -> tuple[Model, Path]:
    """Return the demonstration's model and its text, trained now unless the folder has it.

    Args:
        run: the folder.
        steps: instead of the usual number.
        changes: of the demonstration's settings, whole sections.
    """
    path = run.parent / f"{run.name}-{demo.CORPUS}"
    if not (run / "final").is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(demo.corpus(), encoding="utf-8", newline="")
        preset: dict[str, Any] = {**demo.SETTINGS, **(changes or {})}
        preset["data"] = {**preset["data"], "texts": (str(path),)}
        if steps is not None:
            preset |= {"steps": steps}
        pretrain(settings.load(PretrainConfig, preset=preset), run)
    return load_model(run / "final"), path


def source_code(most: int = 2_000_000) -> str:
    """Return source code of the standard library, which is in no training text of the demonstration."""
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:most]


def drawn(text: Text, context: int, tokens: int, seed: int) -> Text:
    """Return the same text with windows at random places, one behind the other, as what is seen of it."""
    count = min(tokens, len(text.seen)) // context
    inputs, _ = BatchSampler(text.seen, count, context, seed).batch(0)
    return Text(f"draw {seed}", inputs.reshape(-1), text.held_out, text.before)


def with_weights(model: Model, quantizer: Quantizer) -> Model:
    """Return a copy of the model that computes with dequantized weights."""
    other = build(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in other.named_parameters():
            if p.dim() == 2 and name != "wpe.weight":  # positions stay float32
                numbers = quantize(name, p.numpy(), quantizer)
                p.copy_(torch.from_numpy(dequantize(numbers, quantizer.scheme)))
    return other


def measured(model: Model, text: Text, scheme: Scheme, source: Text | None, limit: int | None) -> Row:
    """Quantize a model in one way and compare it with itself on the text that was held out."""
    method = "rounded" if source is None else "GPTQ"
    name = "" if source is None else source.name
    about = scheme.bits, scheme.group, scheme.symmetric, method, name
    begin = time.perf_counter()
    try:
        if source is None:
            quantizer: Quantizer = RoundToNearest(scheme)
        else:
            quantizer = calibrated(model, model.roles(), source, model.config.context_length, scheme)
        other = with_weights(model, quantizer)
    except UsageError as error:  # a group that does not divide
        return Row(*about, problem=str(error))
    seconds = time.perf_counter() - begin
    engines = (TorchEngine.of(each, "cpu") for each in (model, other))
    found = quality(*engines, text.held_out[:limit], before=text.before)
    return Row(*about, seconds=seconds, quality=found)


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """Return the table and what it was measured with."""
    lines = [
        f"{about['parameters']:,} parameters; {about['tokens']:,} tokens of held-out text; perplexity of the float32 "
        f"model {about['perplexity']:.3f}.",
        "",
        "| weights | group | zero points | method | calibrated with | perplexity, ratio | KL, nats | same top token |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        start = f"| int{row.bits} | {row.group} | {'no' if row.symmetric else 'yes'} | {row.method} | {row.text} |"
        if row.quality is None:
            lines.append(f"{start} {row.problem} | | |")
        else:
            q = row.quality
            lines.append(f"{start} {q.ratio:.4f} | {q.kl:.5f} | {100 * q.top1:.2f} % |")
    env = about["environment"]
    return "\n".join([*lines, "", f"{env['cpu']}, kernels for {env['isa']}, {env['system']}."]) + "\n"


def schemes(smoke: bool) -> list[Scheme]:
    """Return what is tried; groups that do not divide stay in the table."""
    if smoke:
        return [Scheme(8, 32), Scheme(4, 32)]
    int4 = [Scheme(4, group, symmetric) for symmetric in (True, False) for group in GROUPS]
    return [Scheme(8, 32), Scheme(8, 64), *int4]


def main() -> None:
    """Train, quantize, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder; trained into if it does not exist")
    parser.add_argument("--tokens", type=int, default=None, help="of the held-out text (default: all)")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    parser.add_argument("--smoke", action="store_true", help="few steps, few schemes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or Path(scratch) / "run"
        model, path = trained(run, SMOKE_STEPS if arguments.smoke else None)
        tokenizer, context = Tokenizer.load(run / "final"), model.config.context_length
        text = replace(read(path, tokenizer, model.config.vocab_size), name="its training text")
        limit = 2 * context if arguments.smoke else arguments.tokens
        rows = []
        for scheme in schemes(arguments.smoke):
            for source in (None, text):
                rows.append(measured(model, text, scheme, source, limit))
                print(rows[-1], file=sys.stderr)
        if not arguments.smoke:
            other = Path(scratch) / "source.txt"
            other.write_text(source_code(), encoding="utf-8", newline="")
            sources = [drawn(text, context, MOST_TOKENS, seed) for seed in DRAWS]
            sources.append(
                replace(read(other, tokenizer, model.config.vocab_size), name="Python source code")
            )
            for source in sources:
                rows.append(measured(model, text, Scheme(4, 32), source, limit))
                print(rows[-1], file=sys.stderr)
    found = [row.quality for row in rows if row.quality is not None]
    about = {
        "parameters": model.num_parameters(),
        "tokens": found[0].tokens,
        "perplexity": found[0].perplexity,
        "environment": environment(),
    }
    table = markdown(rows, about)
    print(table, end="")
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    if arguments.json:
        data = {"about": about, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
