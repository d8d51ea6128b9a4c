"""``portlm bench``: every engine on one model, beside the machine's limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from portlm.commands.engines import engine_options
from portlm.errors import UsageError


@click.command("bench")
@click.argument("model", type=click.Path(path_type=Path))
@engine_options("Measure", "everything available here")
@click.option("--prompt", default=128, show_default=True, help="Prompt length in tokens.")
@click.option("--tokens", "-n", default=64, show_default=True, help="Decoded tokens per sample.")
@click.option(
    "--rounds", "-r", default=5, show_default=True, help="Samples per engine, after one to warm up."
)
@click.option("--threads", type=int, help="Threads per engine (default: the engine's own choice).")
@click.option(
    "--against",
    metavar="RIVAL[,RIVAL...]",
    help="Race other engines on the same weights, on the CPU: llama.cpp, ort-genai, transformers.",
)
@click.option(
    "--keep", type=click.Path(path_type=Path), help="With --against: keep the converted files in this folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: Path, engines: tuple[str, ...], device: str | None, profile: str | None, prompt: int, tokens: int,
    rounds: int, threads: int | None, against: str | None, keep: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure prefill, decode, load time and memory of the artifact MODEL on every engine.

    Engines run interleaved, each in its own process. "of limit" is the share of what this machine's memory
    bandwidth (decode) or multiply-add rate (prefill) allows, probed in the same run.

    With --against, engines of others run the same weights, converted for them; nobody is timed before its logits
    agree with eager PyTorch. What is missing is said with pip's command.
    """
    if keep is not None and against is None:
        raise UsageError("--keep is for the files that --against makes: name rivals with --against")
    if against is not None:
        _race(model, engines, device, profile, prompt, tokens, rounds, threads, against, keep, as_json)
        return
    from portlm.flows.bench import measure
    from portlm.flows.targets import default_targets, read_targets

    targets = read_targets(engines, device, profile, [] if engines else default_targets(model))
    result = measure(
        model, targets, prompt=prompt, tokens=tokens, rounds=rounds, threads=threads,
        progress=lambda message: click.echo(f"bench: {message}", err=True),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    print_table(result)


def _race(
    model: Path, engines: tuple[str, ...], device: str | None, profile: str | None, prompt: int, tokens: int,
    rounds: int, threads: int | None, against: str, keep: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from portlm.flows.against import compare
    from portlm.flows.race.rivals import read_rivals
    from portlm.flows.targets import default_targets, read_targets

    rivals = read_rivals(against)
    targets = read_targets(engines, device or "cpu", profile, [] if engines else default_targets(model))
    result = compare(
        model, targets, rivals, prompt=prompt, tokens=tokens, rounds=rounds, threads=threads, keep=keep,
        progress=lambda message: click.echo(f"bench: {message}", err=True),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    print_race(result)


def print_race(result: dict[str, Any]) -> None:
    """Print the rows of a race as a table, and beneath it the limits, who is absent, and what was not quiet."""
    from rich.console import Console

    from portlm.commands.tables import figures

    (turn,) = result["rules"]["passes"]
    prefill, decode = f"quiet/prefill@{turn['prompt']}", f"quiet/decode@{turn['context']}"
    table = figures(
        f"{result['model']['artifact']}: prompt {turn['prompt']}, {turn['tokens']} tokens decoded",
        ("engine", "weights"),
        ("prefill\ntok/s", "x best\nrival", "decode\ntok/s", "x best\nrival", "of\nlimit", "MB per\ntoken",
         "top-1"),
        gap=1,
    )  # fmt: skip

    def rate(row: dict[str, Any], measure: str) -> tuple[str, str]:
        found = row["measures"].get(measure)
        if found is None:
            return "", ""
        ratio = found.get("against_same")
        return f"{found['rate']:,.0f}", "" if ratio is None else f"{ratio['ratio']:.2f}"

    for row in result["rows"]:
        table.add_row(
            row["name"], row["precision"], *rate(row, prefill), *rate(row, decode),
            f"{row['measures'][decode].get('of_limit', 0):.0%}", f"{row['weight_bytes'] / 1e6:,.1f}",
            f"{row['agreement']['top1']:.0%}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    noise = result["rounds"]["quiet"]
    console.print(
        f"{result['environment']['cpu']}; limit in this run: {result['limits']['read_gb_s']:.1f} GB/s read, "
        f"{result['limits']['fp32_gflop_s']:.0f} GFLOP/s fp32; x is the median of ratios of the same round against the "
        "fastest engine of others with weights of as many bits; top-1 is the agreement with the model itself",
        soft_wrap=True,
    )
    for name, reason in result["absent"].items():
        console.print(f"not measured: {name}: {reason}", highlight=False, soft_wrap=True)
    if noise["noisy"]:
        console.print(
            f"{noise['noisy']} of {len(noise['rounds'])} rounds were not quiet: close other programs and repeat"
        )


def print_table(result: dict[str, Any]) -> None:
    """Print the rows as a table, and beneath it the limits and what failed."""
    from rich.console import Console

    from portlm.commands.tables import figures

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    def spread(row: dict[str, Any], name: str) -> str:
        return share(row[f"{name}_spread"] / row[f"{name}_tok_s"])

    settings = result["settings"]
    table = figures(
        f"{result['model']}: prompt {settings['prompt']}, {settings['tokens']} tokens decoded",
        ("engine", "profile"),
        (
            "prefill\ntok/s", "±", "of\nlimit", "decode\ntok/s", "±", "of\nlimit", "load\ns", "model\nMiB",
            "peak\nMiB",
        ),
        gap=1,
    )  # fmt: skip
    for row in result["rows"]:
        table.add_row(
            f"{row['engine']}:{row['device']}", row["profile"],
            f"{row['prefill_tok_s']:,.0f}", spread(row, "prefill"), share(row["prefill_of_limit"]),
            f"{row['decode_tok_s']:,.0f}", spread(row, "decode"), share(row["decode_of_limit"]),
            f"{row['load_s']:.2f}", f"{row['model_mib']:.0f}", f"{row['peak_rss_mib']:.0f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    limits = result["limits"]
    console.print(
        f"limit in this run: {limits['read_bandwidth_gb_s']:.1f} GB/s read, "
        f"{limits['fp32_gflop_s']:.0f} GFLOP/s fp32; ± is the interquartile range, as a share of the median",
        soft_wrap=True,
    )
    for failure in result["failed"]:
        console.print(f"not measured: {failure['reason']}", highlight=False, soft_wrap=True)
