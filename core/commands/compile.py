"""``portlm compile``: an exported model for an engine and a device."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--engine", "-e", help="ort or tvm (default: those installed).")
@click.option("--device", "-d", help="cpu or vulkan (default: every one the engine compiles for).")
@click.option("--profile", "-p", help="portable or fused (default: those the artifact has).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the written paths.")
def command(model: Path, engine: str | None, device: str | None, profile: str | None, as_json: bool) -> None:
    """Compile the artifact MODEL (made by 'portlm export') and record the result in its manifest.

    ONNX Runtime runs the portable graph as it is, so only its fused graph is lowered; TVM compiles both. Prints the
    files written.
    """
    import msgspec

    from portlm.compile.build import build_choice

    entries = build_choice(
        model, engine, device, profile, note=lambda message: click.echo(f"compile: {message}", err=True)
    )
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        for file in entry.files:
            click.echo(model / file)
