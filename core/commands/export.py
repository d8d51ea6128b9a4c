"""``portlm export``: a checkpoint as ONNX, as a Hugging Face folder, or as a file of another program."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click

from portlm.errors import UsageError


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["onnx", "hf", "gguf", "word2vec", "arpa"]),
    default="onnx",
    show_default=True,
    help="onnx: an artifact for 'portlm compile' and portlm.load; hf: a folder that transformers opens; gguf: a "
    "file that llama.cpp opens; word2vec: a text file of word vectors that gensim opens; arpa: an n-gram model that "
    "KenLM opens, compressed if OUT ends with .gz.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    type=click.Choice(["portable", "fused"]),
    help="Which graphs to write (default: both).",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What matrices and the token table are in the graphs: as in CHECKPOINT, widened, or rounded to 16 bits. "
    "Arithmetic is float32.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Keep matrices and the token table in so many bits; the artifact then holds no float32 checkpoint.",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale, with --quantize (default: 64).",
)
@click.option("--asymmetric", is_flag=True, help="With --quantize: each group has a zero point, too.")
@click.option(
    "--calibrate",
    metavar="TEXT",
    type=click.Path(path_type=Path),
    help="With --quantize: a text file like what the model will read. Weights are rounded for it, and what that costs "
    "on its last tenth is measured. With --cache int8 alone, only the latter.",
)
@click.option(
    "--cache",
    multiple=True,
    type=click.Choice(["float32", "int8"]),
    help="What keys and values are kept in while a text is written (default: float32, or as in CHECKPOINT if that is "
    "an artifact).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(
    checkpoint: Path, out: Path, form: str, profiles: tuple[str, ...], weights: str, quantize: str | None,
    group: str | None, asymmetric: bool, calibrate: Path | None, cache: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Export CHECKPOINT (from pretrain or import) to the folder or file OUT, and print OUT.

    The same checkpoint always gives the same bytes.
    """
    if len(cache) > 1:
        raise UsageError("--cache says once what keys and values are kept in: give it once")
    kept = cache[0] if cache else None
    if quantize is None and (group is not None or asymmetric):
        raise UsageError("--group and --asymmetric say how to quantize: give --quantize int8 or int4 as well")
    if form != "onnx":
        from portlm.hub import export_hf
        from portlm.hub_arpa import export_arpa
        from portlm.hub_gguf import export_gguf
        from portlm.hub_word2vec import export_word2vec

        if profiles:
            raise UsageError(f"--profile chooses ONNX graphs, and --to {form} writes none: leave it out")
        if quantize is not None:
            raise UsageError(
                f"--quantize is for ONNX graphs, and --to {form} writes plain numbers: leave it out"
            )
        if calibrate is not None:
            raise UsageError(
                f"--calibrate is for ONNX graphs, and --to {form} copies the weights: leave it out"
            )
        if weights != "auto":
            raise UsageError(
                f"--weights is for ONNX graphs, and --to {form} copies the weights: leave it out"
            )
        if kept is not None:
            raise UsageError(f"--cache is for ONNX graphs, and --to {form} writes none: leave it out")
        write = {"hf": export_hf, "gguf": export_gguf, "word2vec": export_word2vec, "arpa": export_arpa}[form]
        for note in write(checkpoint, out).notes:
            click.echo(f"export: {note}", err=True)
    else:
        from portlm.artifact import read_manifest
        from portlm.flows.export import export_checkpoint
        from portlm.quantization import described, described_cache

        with warnings.catch_warnings(record=True, action="always", category=UserWarning) as caught:
            export_checkpoint(
                checkpoint,
                out,
                profiles=profiles or ("portable", "fused"),
                weights=weights,
                quantize=quantize,
                group=None if group is None else int(group),
                asymmetric=asymmetric,
                calibrate=calibrate,
                cache=kept,
            )
        for warning in caught:
            click.echo(f"export: {warning.message}", err=True)
        manifest = read_manifest(out)
        for line in (
            *(described(manifest.quantization) if manifest.quantization else ()),
            *(described_cache(manifest.cache) if manifest.cache else ()),
        ):
            click.echo(f"export: {line}", err=True)
    click.echo(json.dumps({"path": str(out), "form": form}) if as_json else out)
