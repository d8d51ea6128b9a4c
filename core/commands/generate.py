"""``portlm generate``: continue a prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from portlm.errors import FormatError, UsageError

if TYPE_CHECKING:
    from portlm.runtimes.results import Generation
    from portlm.runtimes.session import Session

HARMLESS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
DEFAULT_TOKENS = 128
EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}
MAX_PROMPT_BYTES = 16 * 2**20  # no context is that long; it is a file given by mistake


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
@click.option(
    "--engine", "-e", default="auto", show_default=True, metavar="ENGINE[:DEVICE[:PROFILE]]",
    help="torch, ort, tvm, null or auto.",
)  # fmt: skip
@click.option("--device", "-d", default="auto", show_default=True, help="cpu, cuda, vulkan or auto.")
@click.option("--profile", "-p", default="auto", show_default=True, help="portable, fused, native or auto.")
@click.option(
    "--max-new-tokens", "-n", type=int, help="Tokens to generate at most (default: 128, or what the context holds)."
)  # fmt: skip
@click.option("--temperature", "-t", default=0.0, show_default=True, help="0 is greedy, 1 the model's own.")
@click.option("--top-k", default=0, show_default=True, help="Sample among this many tokens; 0 for all.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from this much probability; 1 for all.")
@click.option("--min-p", default=0.0, show_default=True, help="Least probability, relative to the largest.")
@click.option("--seed", default=0, show_default=True, help="Of the random numbers, 0 to 2^64 - 1.")
@click.option("--stop", multiple=True, help="End before this text; repeat for several.")
@click.option(
    "--repetition-penalty", default=1.0, show_default=True, help="For tokens that were said; 1 is none."
)
@click.option(
    "--no-repeat-ngram-size",
    default=0,
    show_default=True,
    help="Say no sequence of this many tokens twice; 0: may.",
)
@click.option(
    "--num-beams", default=1, show_default=True, help="Search with this many beams; 1 for no search."
)
@click.option(
    "--length-penalty", default=1.0, show_default=True, help="Of a beam: divide by its length to this power."
)
@click.option(
    "--early-stopping",
    type=click.Choice(["no", "yes", "never"]),
    default="no",
    show_default=True,
    help="End a search when enough beams have ended (yes), by estimate (no), or only by proof (never).",
)
@click.option(
    "--stream/--no-stream", default=True, help="Print text as it comes, or at the end (default: as it comes)."
)
@click.option("--threads", type=int, help="CPU threads (default: what suits each step).")
@click.option("--allow-fallback", is_flag=True, help="Let the CPU run what the device cannot.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def command(
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    engine: str,
    device: str,
    profile: str,
    stream: bool,
    threads: int | None,
    allow_fallback: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with MODEL, an artifact or (for the torch engine) a checkpoint folder.

    Without PROMPT, or with "-", the prompt is read from stdin; one newline at its end is not part of it. Only the new
    text goes to stdout.
    """
    text = read_prompt(prompt, prompt_file)
    sampling["early_stopping"] = EARLY_STOPPING[sampling["early_stopping"]]
    import portlm
    from portlm.flows.targets import Choice

    if ":" in engine:  # as the other verbs take it
        choice = Choice.parse(engine).narrowed(_said(device), _said(profile))
        engine, device, profile = choice.engine or "auto", choice.device or "auto", choice.profile or "auto"
    with portlm.load(model, engine, device, profile, allow_fallback, threads) as session:
        if sampling["max_new_tokens"] is None:
            sampling["max_new_tokens"] = room(session, text)
        note = session.placement().note
        if note:
            click.echo(f"generate: {session.engine.name}:{session.engine.device}: {note}", err=True)
        if as_json:
            click.echo(json.dumps(describe(session, session.generate(text, **sampling)), ensure_ascii=False))
            return
        # A search has nothing to show before its end.
        stream = stream and sampling["num_beams"] == 1
        result = write_text(session, text, stream, sampling, sys.stdout.buffer)
    if sys.stderr.isatty():
        stats = result.stats
        click.echo(
            f"generate: {stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s, {stats.new_tokens} "
            f"written at {stats.tokens_per_second:.1f}/s ({result.finish_reason}), {session!r}",
            err=True,
        )


def _said(option: str) -> str | None:
    return None if option == "auto" else option


def room(session: Session, text: str) -> int:
    """Return how many tokens to generate when nobody said: DEFAULT_TOKENS, or what the context leaves."""
    used = len(session.tokenizer.encode(text)) or 1  # an empty text starts from the end-of-text token
    return max(1, min(DEFAULT_TOKENS, session.engine.context_length - used))


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, a file or stdin.

    Bytes that are not UTF-8 become lone surrogates, as in Python's own arguments: the tokenizer turns them back.

    Raises:
        UsageError: both an argument and a file were given.
        FormatError: the file cannot be read, or is larger than any prompt.
    """
    if prompt is not None and file is not None:
        raise UsageError("give the prompt or --prompt-file, not both")
    if file is not None:
        try:
            with file.open("rb") as source:
                raw = source.read(MAX_PROMPT_BYTES + 1)
        except OSError as error:
            raise FormatError(f"{file}: cannot be read: {error.strerror}") from error
    elif prompt is None or prompt == "-":
        if sys.stdin.isatty():
            click.echo("generate: reading the prompt from the terminal, end it with Ctrl-D", err=True)
        raw = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    else:
        return prompt
    if len(raw) > MAX_PROMPT_BYTES:
        raise FormatError(f"{file or 'stdin'}: more than {MAX_PROMPT_BYTES} bytes, which no prompt can have")
    return raw.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def write_text(
    session: Session, text: str, stream: bool, sampling: dict[str, Any], out: BinaryIO
) -> Generation:
    """Write the continuation as UTF-8, with a newline behind it."""
    # A model can write the sequences that move a terminal's cursor or set its title; a file gets what it wrote.
    shown = HARMLESS if out.isatty() else {}
    if not stream:
        result = session.generate(text, **sampling)
        out.write(result.text.translate(shown).encode() + b"\n")
        out.flush()
        return result
    pieces = session.stream(text, **sampling)
    for piece in pieces:
        out.write(piece.translate(shown).encode())
        out.flush()
    out.write(b"\n")
    out.flush()
    assert pieces.generation is not None  # the stream has ended
    return pieces.generation


def describe(session: Session, result: Generation) -> dict[str, Any]:
    """Return what --json prints."""
    engine, placement, stats = session.engine, session.placement(), result.stats
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "engine": engine.name,
        "device": engine.device,
        "profile": engine.profile,
        "precision": engine.precision,
        "placement": {
            "nodes": dict(placement.nodes),
            "fallback": placement.fallback,
            "note": placement.note,
        },
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "tokens_per_second": stats.tokens_per_second,
    }
