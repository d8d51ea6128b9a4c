"""``portlm translate``: write the target of every line of a text, with a model that has an encoder and a decoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portlm.commands.generate import EARLY_STOPPING, HARMLESS, OWN, read_prompt
from portlm.engines import DEVICES, ENGINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portlm.runtimes.results import Generation
    from portlm.runtimes.session import Session


@click.command("translate")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the sources from this file, one a line.")
@click.option("--prefix", default="", help='Put in front of every source: "translate English to German: ".')
@click.option(
    "--engine", "-e", default="auto", show_default=True, metavar="ENGINE[:DEVICE[:PROFILE]]",
    help=f"{', '.join(ENGINES)} or auto.",
)  # fmt: skip
@click.option("--device", "-d", default="auto", show_default=True, help=f"{', '.join(DEVICES)} or auto.")
@click.option("--profile", "-p", default="auto", show_default=True, help="portable, fused, native or auto.")
@click.option("--max-new-tokens", "-n", type=int, help=f"Tokens to write for each source at most  {OWN}128]")
@click.option("--num-beams", type=int, help=f"Search with this many beams; 1 for no search  {OWN}1]")
@click.option("--length-penalty", type=float, help=f"Of a beam: divide by its length to this power  {OWN}1]")
@click.option(
    "--early-stopping",
    type=click.Choice(list(EARLY_STOPPING)),
    help=f"End a search when enough beams have ended (yes), by estimate (no), or only by proof (never)  {OWN}no]",
)
@click.option("--no-repeat-ngram-size", type=int, help=f"Say no such sequence twice; 0: may  {OWN}0]")
@click.option("--batch-size", default=16, show_default=True, help="Sources that are computed together.")
@click.option("--threads", type=int, help="CPU threads (default: what suits each step).")
@click.option("--allow-fallback", is_flag=True, help="Let the CPU run what the device cannot.")
@click.option(
    "--attention",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PICTURE.png",
    help="Draw what of the source each token of the target looks at: PNG, SVG or PDF. --json has the figures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the texts.")
def command(
    model: Path,
    text: str | None,
    file: Path | None,
    prefix: str,
    engine: str,
    device: str,
    profile: str,
    batch_size: int,
    threads: int | None,
    allow_fallback: bool,
    attention: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Translate TEXT with MODEL, an artifact or (for the torch engine) a checkpoint folder.

    Without TEXT, or with "-", the sources are the lines of stdin. stdout has one line for each: what the model writes
    for it, in the same order. What no option says is as generation_config.json of the model has it.

    Example: portlm translate t5 "A house." --prefix "translate English to German: " --num-beams 4
    """
    sources = read_prompt(text, file).split("\n")
    options = {name: value for name, value in settings.items() if value is not None}
    if "early_stopping" in options:
        options["early_stopping"] = EARLY_STOPPING[options["early_stopping"]]
    import portlm
    from portlm.flows.alignment_picture import Drawn, check_kind, draw_alignments
    from portlm.flows.targets import Choice

    if attention is not None:
        check_kind(attention)  # before anything is computed

    if ":" in engine:  # as the other verbs take it
        said = (None if option == "auto" else option for option in (device, profile))
        choice = Choice.parse(engine).narrowed(*said)
        engine, device, profile = choice.engine or "auto", choice.device or "auto", choice.profile or "auto"
    with portlm.load(model, engine, device, profile, allow_fallback, threads) as session:
        found = session.translate(sources, prefix=prefix, batch_size=batch_size, **options)
        alignments = None
        if attention is not None:
            alignments = [
                session.align(prefix + source, result.token_ids)
                for source, result in zip(sources, found, strict=True)
            ]
            read = [session.tokenizer.encode(prefix + source) for source in sources]
            drawn = [
                Drawn(weights, tokens(session, ids), tokens(session, result.token_ids))
                for weights, ids, result in zip(alignments, read, found, strict=True)
            ]
            draw_alignments(drawn, attention)
        if as_json:
            click.echo(json.dumps(describe(session, sources, found, alignments), ensure_ascii=False))
            return
        safe = HARMLESS if sys.stdout.isatty() else {}
        for result in found:  # a target of several lines would shift all that follow
            line = " ".join(result.text.splitlines()) if len(found) > 1 else result.text
            sys.stdout.buffer.write(f"{line}\n".translate(safe).encode())
        sys.stdout.buffer.flush()


def tokens(session: Session, ids: Sequence[int]) -> list[str]:
    """Return each token as a text of its own, a part of a character as U+FFFD."""
    decoded = []
    for token in ids:
        decoder = session.tokenizer.stream_decoder()
        decoded.append(decoder.push(token) + decoder.finish())
    return decoded


def describe(
    session: Session,
    sources: Sequence[str],
    found: Sequence[Generation],
    alignments: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Return what --json prints; with alignments, each (T, S), a row for each token of the target."""
    engine, stats = session.engine, found[0].stats
    translations = [
        {
            "source": source,
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "source_tokens": result.prompt_tokens,
        }
        for source, result in zip(sources, found, strict=True)
    ]
    for translation, weights in zip(translations, alignments or (), strict=alignments is not None):
        translation["attention"] = weights.tolist()
    return {
        "translations": translations,
        "engine": engine.name,
        "device": engine.device,
        "profile": engine.profile,
        "precision": engine.precision,
        "seconds": stats.prefill_seconds + stats.decode_seconds,
    }
