"""``portlm finetune``: texts with labels in, a trained classifier out; or questions, and what finds their answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portlm import settings
from portlm.models import FAMILIES

if TYPE_CHECKING:
    from portlm.train.config import PretrainConfig

# flag: (setting it is short for, type, help)
_SHORT: dict[str, tuple[str, Any, str]] = {
    "objective": (
        "objective",
        click.Choice(["classify", "answer"]),
        "classify learns labels, answer which part of a text answers a question (default: classify)",
    ),
    "lm-coef": ("lm_coef", float, "Of a decoder: what predicting the text counts beside its label"),
    "freeze": (
        "layers.freeze",
        click.Choice(["none", "backbone"]),
        "backbone trains the head alone, on what the model knows already",
    ),
    "layer-decay": (
        "layers.decay",
        float,
        "A layer learns at the rate of the one above it divided by this; 2.6 in ULMFiT",
    ),
    "schedule": (
        "schedule.shape",
        click.Choice(["linear", "cosine", "inverse-sqrt", "slanted"]),
        "How the learning rate falls; slanted is ULMFiT's triangle",
    ),
    "warmup": ("schedule.warmup", float, "Warm-up: share of all steps if below 1, else steps"),
    "lr": ("optimizer.lr", float, "Peak learning rate"),
    "batch": ("data.batch_size", int, "Texts per forward pass"),
    "accumulate": ("data.accumulate", int, "Forward passes per step"),
    "seed": ("seed", int, "Decides every random number, and which texts are held out"),
    "threads": ("threads", int, "CPU threads; 0 lets PyTorch choose"),
    "device": ("device", str, "cpu or cuda"),
    "family": ("model.family", click.Choice(list(FAMILIES)), "Without --init: architecture"),
    "layers": ("model.n_layer", int, "Without --init: layers"),
    "heads": ("model.n_head", int, "Without --init: attention heads per layer"),
    "width": ("model.width", int, "Without --init: numbers per token inside the model"),
    "context": ("model.context_length", int, "Without --init: tokens seen at once"),
    "tokenizer": ("data.tokenizer", str, "Without --init: byte, bpe:SIZE or a tokenizer.json"),
}


def _short_options(function: Any) -> Any:
    for flag, (_, kind, text) in reversed(_SHORT.items()):
        function = click.option(f"--{flag}", type=kind, help=f"{text}.")(function)
    return function


@click.command("finetune")
@click.argument("data", metavar="[DATA]...", nargs=-1)
@click.option(
    "--init", type=click.Path(path_type=Path),
    help="Checkpoint to begin with, an encoder or a decoder (default: a fresh model).",
)  # fmt: skip
@click.option(
    "--held-out", type=click.Path(path_type=Path),
    help="File of texts to judge by (default: a tenth of DATA, drawn by the seed).",
)  # fmt: skip
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("finetuned"), show_default=True,
    help="Run folder: checkpoints, metrics, and the trained model in OUT/final.",
)  # fmt: skip
@click.option(
    "--epochs", type=float, default=3, show_default=True, help="How often each text is learned from."
)
@click.option("--steps", type=int, help="Optimiser steps in all, instead of epochs.")
@click.option("--gradual", is_flag=True, help="Let one more layer learn in each epoch, from the top.")
@_short_options
@click.option(
    "--resume", metavar="auto|PATH|none", default="none", show_default=True,
    help="Go on from the newest intact checkpoint of OUT, or from a checkpoint or run elsewhere.",
)  # fmt: skip
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML file of settings, which says how many steps."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Any setting of pretraining, such as data.validation_fraction=0.2; may be repeated.",
)  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="Report only warnings and errors on stderr.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON instead of the checkpoint's path."
)
def command(
    data: tuple[str, ...], init: Path | None, held_out: Path | None, out: Path, epochs: float, steps: int | None,
    gradual: bool, resume: str, config: Path | None, overrides: tuple[str, ...], quiet: bool, as_json: bool,
    **short: Any,
) -> None:  # fmt: skip
    """Train a model with a head on DATA and print the path of its checkpoint.

    DATA are texts with labels: .tsv files of a label, a tab and a text (for pairs another tab and text), or .jsonl with
    "label", "text" and "text_pair". With --objective answer they are questions: .jsonl with "question", "text",
    "answer" and, where the text holds it more than once, "start". Settings not given are those that GPT-1 was
    fine-tuned with.
    For example: portlm finetune reviews.tsv --init gpt --out sentiment
    """
    from portlm.train.allocator import keep_freed_memory
    from portlm.train.finetune import finetune

    keep_freed_memory()  # here, where the process is ours, and not in finetune()
    values = [
        (_SHORT[flag][0], short[flag.replace("-", "_")])
        for flag in _SHORT
        if short[flag.replace("-", "_")] is not None
    ]
    # Absolute, so that the config saved with the run works from any folder.
    values += [("steps", steps)] if steps else []
    values += [("init", str(init.absolute()))] if init else []
    values += [("data.held_out", str(held_out.absolute()))] if held_out else []
    values += [("data.texts", [str(Path(file).absolute()) for file in data])] if data else []
    result = finetune(
        resolve([*values, *overrides], out, resume, config, epochs, gradual), out, resume=resume, quiet=quiet
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), default=str, indent=2))
    else:
        click.echo(result.checkpoint)


def resolve(
    given: list[Any], out: Path, resume: str, config: Path | None, epochs: float, gradual: bool
) -> PretrainConfig:
    """Return the settings that a command line asks for.

    A resumed run begins with the settings it was started with, and takes as many steps.

    Raises:
        ConfigError: A setting is unknown, of the wrong type or out of range.
        UsageError: There is no file to count the steps of an epoch from.
        FormatError: A file is missing or holds something else.
    """
    from portlm.train.config import PretrainConfig
    from portlm.train.finetune import in_epochs, preset_for

    if resume == "auto" and config is None and (out / "config.toml").exists():
        config = out / "config.toml"
    shape = settings.said(PretrainConfig, "schedule.shape", file=config, overrides=given)
    found = settings.load(PretrainConfig, preset=preset_for(shape), file=config, overrides=given)
    counted = config is not None or any(key_of(one) == "steps" for one in given)
    return found if counted else in_epochs(found, epochs, gradual)


def key_of(override: str | tuple[str, Any]) -> str:
    """Return which setting an override sets."""
    return override[0] if isinstance(override, tuple) else override.partition("=")[0].strip()
