"""``portlm pretrain``: text in, trained checkpoint out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from portlm import settings
from portlm.models import FAMILIES
from portlm.train import presets
from portlm.train.config import PretrainConfig
from portlm.train.objectives import OBJECTIVES
from portlm.train.presets import PRESETS, preset_settings

# flag: (setting it is short for, type, help)
_SHORT: dict[str, tuple[str, Any, str]] = {
    "tokenizer": (
        "data.tokenizer",
        str,
        "byte, bpe:SIZE or word:SIZE (trained on TEXT), or a tokenizer.json",
    ),
    "family": ("model.family", click.Choice(list(FAMILIES)), "Architecture"),
    "objective": ("objective", click.Choice(list(OBJECTIVES)), "What is learned"),
    "init": ("init", str, "A checkpoint to begin with, whose model and tokenizer are taken"),
    "source": ("data.source", str, "Of pairs, for objective seq2seq: a file of lines"),
    "target": ("data.target", str, "A file with as many lines"),
    "label-smoothing": (
        "label_smoothing",
        float,
        "Share of a target that all tokens have in equal parts, of seq2seq",
    ),
    "layers": ("model.n_layer", int, "Layers"),
    "heads": ("model.n_head", int, "Attention heads per layer"),
    "width": ("model.width", int, "Numbers per token inside the model"),
    "context": ("model.context_length", int, "Tokens seen at once"),
    "dropout": ("model.dropout", float, "Share of activations dropped while training"),
    "batch": ("data.batch_size", int, "Sequences per forward pass"),
    "accumulate": ("data.accumulate", int, "Forward passes per step"),
    "steps": ("steps", int, "Optimiser steps in all"),
    "optimizer": (
        "optimizer.name",
        click.Choice(["adamw", "muon", "adagrad", "nt-asgd"]),
        "muon is for the matrices inside the blocks, and all else takes adamw; nt-asgd averages weights at the end",
    ),
    "lr": ("optimizer.lr", float, "Peak learning rate"),
    "min-lr": ("schedule.min_lr", float, "Learning rate of the last step"),
    "warmup": ("schedule.warmup", float, "Warm-up: share of all steps if below 1, else steps"),
    "seed": ("seed", int, "Decides every random number"),
    "eval-interval": ("evaluation.interval", int, "Steps between evaluations"),
    "checkpoint-interval": ("checkpoint.interval", int, "Steps between checkpoints"),
    "threads": ("threads", int, "CPU threads; 0 lets PyTorch choose"),
    "device": ("device", str, "cpu or cuda"),
    "precision": (
        "precision",
        click.Choice(["fp32", "bf16"]),
        "Of matrix products; bf16 rounds what they take, on the CPU",
    ),
}


def _short_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of the table above, in its order.

    The defaults in the help are those of the classes, and of the default preset for the model, whose settings belong
    to the family: to ask it would load PyTorch.
    """
    model = PRESETS[presets.DEFAULT]["model"]
    for flag, (key, kind, text) in reversed(_SHORT.items()):
        section, _, name = key.partition(".")
        default = model[name] if section == "model" else settings.default(PretrainConfig, key)
        shown = f"{default:g}" if isinstance(default, float) else default
        function = click.option(f"--{flag}", type=kind, help=f"{text} (default: {shown}).")(function)
    return function


@click.command("pretrain")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("run"), show_default=True,
    help="Run folder: checkpoints, metrics, and the trained model in OUT/final.",
)  # fmt: skip
@click.option(
    "--resume", metavar="auto|PATH|none", default="none", show_default=True,
    help="Go on from the newest intact checkpoint of OUT, or from a checkpoint or run elsewhere.",
)  # fmt: skip
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), help=f"Settings to start from (default: {presets.DEFAULT})."
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML file of settings; wins over the preset."
)
@_short_options
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Any setting, such as optimizer.beta2=0.95; wins over all else, may be repeated.",
)  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="Report only warnings and errors on stderr.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON instead of the checkpoint's path."
)
def command(
    texts: tuple[str, ...], out: Path, resume: str, preset: str | None, config: Path | None,
    overrides: tuple[str, ...], quiet: bool, as_json: bool, **short: Any,
) -> None:  # fmt: skip
    """Train a language model on the UTF-8 files TEXT and print the path of the trained checkpoint.

    The last tenth of the text is held out to measure progress. TEXT may also be one folder of prepared token
    shards. Ctrl-C finishes the step, saves and leaves with code 130. The same command with --resume auto goes
    on from there, and after a crash; so does `portlm pretrain --out OUT --resume auto` alone.
    """
    from portlm.train.allocator import keep_freed_memory
    from portlm.train.pretrain import pretrain

    keep_freed_memory()  # here, where the process is ours, and not in pretrain()
    result = pretrain(
        resolve(texts, out, resume, preset, config, overrides, short), out, resume=resume, quiet=quiet
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), default=str, indent=2))
    else:
        click.echo(result.checkpoint)


def resolve(
    texts: tuple[str, ...], out: Path, resume: str, preset: str | None, config: Path | None,
    overrides: tuple[str, ...], short: dict[str, Any],
) -> PretrainConfig:  # fmt: skip
    """Return the settings that a command line asks for.

    Without --config and --preset, a resumed run begins with the settings it was started with.

    Raises:
        ConfigError: A setting is unknown, of the wrong type or out of range.
    """
    if resume == "auto" and config is None and preset is None and (out / "config.toml").exists():
        config = out / "config.toml"
    given = {flag: short.get(flag.replace("-", "_")) for flag in _SHORT}
    values = [(_SHORT[flag][0], value) for flag, value in given.items() if value is not None]
    for flag in ("init", "source", "target"):  # absolute, for the same reason
        if short.get(flag):
            values.append((_SHORT[flag][0], str(Path(short[flag]).absolute())))
    if texts:
        # Absolute, so that the config saved with the run works from any folder.
        values.append(("data.texts", [str(Path(text).absolute()) for text in texts]))
    return settings.load(
        PretrainConfig,
        preset=None if preset is None else preset_settings(preset),
        file=config,
        overrides=[*values, *overrides],
    )
