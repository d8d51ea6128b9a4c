"""``portlm compile``: an exported model for an engine and a device."""

from __future__ import annotations

import json
from pathlib import Path

import click

from portlm.commands.engines import engine_options


@click.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@engine_options("Compile for", "every engine and device that can be compiled for here")
@click.option(
    "--activations",
    type=click.Choice(["float32", "int8"]),
    help="What fused profiles multiply quantized weights with: int8 is faster, less exact; float32 means 15 bits for "
    "packed and tvm (default: float32, or what PORTLM_ACTIVATIONS says).",
)
@click.option(
    "--arch",
    metavar="SM",
    help="For tvm on cuda: the GPUs to make machine code for, such as sm_90 or sm_80,sm_90, which need not be here "
    "(default: the one that is).",
)
@click.option(
    "--dump",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the graph after each pass below this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the written paths.")
def command(
    model: Path, engines: tuple[str, ...], device: str | None, profile: str | None, activations: str | None,
    arch: str | None, dump: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compile the artifact MODEL (made by 'portlm export') and record the result in its manifest.

    ONNX Runtime runs the portable graph as it is, so only its fused graph is lowered; TVM compiles both, for CUDA and
    Vulkan the portable one, and packed the fused one. PyTorch gets the graphs as plain data where there is no
    checkpoint of a known family that it could run.
    Prints the files written.
    """
    import msgspec

    from portlm.artifact import read_manifest
    from portlm.compile.build import build_choice
    from portlm.errors import UsageError
    from portlm.flows.targets import read_choices
    from portlm.quantization import at_activations
    from portlm.tvm_cuda import at_architectures, read_architectures

    if activations is not None and read_manifest(model).quantization is None:
        raise UsageError(
            f"{model} has no quantized weights, which --activations is for: "
            "leave it out, or export with --quantize"
        )
    choices, architectures = read_choices(engines, device, profile), read_architectures(arch) if arch else ()
    if arch and not any(c.engine in ("tvm", None) and c.device in ("cuda", None) for c in choices):
        raise UsageError("--arch is for tvm on cuda: add --engine tvm --device cuda, or leave it out")
    entries = []
    with at_activations(activations), at_architectures(architectures):
        for choice in choices:
            entries += build_choice(
                model, choice.engine, choice.device, None if choice.profile == "auto" else choice.profile,
                note=lambda message: click.echo(f"compile: {message}", err=True), dump=dump,
            )  # fmt: skip
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        for file in entry.files:
            click.echo(model / file)
