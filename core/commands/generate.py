"""``portlm generate``: continue a prompt."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import numpy as np

from portlm.arguments import shown
from portlm.engines import DEVICES, ENGINES
from portlm.errors import FormatError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from portlm.runtimes.decoding import Decoding
    from portlm.runtimes.results import Generation
    from portlm.runtimes.session import Session

HARMLESS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}
MAX_PROMPT_BYTES = 16 * 2**20  # no context is that long; it is a file given by mistake
OWN = "[default: the model's, or "  # of an option that generation_config.json may set, too
TOKEN_ID = re.compile(r"-?\d{1,18}")


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
@click.option(
    "--image", type=click.Path(path_type=Path),
    help="Show the model this picture, where the prompt has its token, such as <image>.",
)  # fmt: skip
@click.option(
    "--engine", "-e", default="auto", show_default=True, metavar="ENGINE[:DEVICE[:PROFILE]]",
    help=f"{', '.join(ENGINES)} or auto.",
)  # fmt: skip
@click.option("--device", "-d", default="auto", show_default=True, help=f"{', '.join(DEVICES)} or auto.")
@click.option("--profile", "-p", default="auto", show_default=True, help="portable, fused, native or auto.")
@click.option(
    "--ids", is_flag=True, help="The prompt is token ids, with spaces or commas between; print ids, too."
)
@click.option(
    "--no-special-tokens", is_flag=True, help="Leave off what the tokenizer puts around every text."
)
@click.option(
    "--max-new-tokens",
    "-n",
    type=int,
    help=f"Tokens to generate at most  {OWN}128, or what the context holds]",
)
@click.option("--temperature", "-t", type=float, help=f"0 is greedy, 1 the model as it is  {OWN}0]")
@click.option("--top-k", type=int, help=f"Sample among this many tokens; 0 for all  {OWN}0]")
@click.option("--top-p", type=float, help=f"Sample from this much probability; 1 for all  {OWN}1]")
@click.option("--min-p", type=float, help=f"Least probability, relative to the largest  {OWN}0]")
@click.option("--seed", default=0, show_default=True, help="Of the random numbers, 0 to 2^64 - 1.")
@click.option("--stop", multiple=True, help="End before this text; repeat for several.")
@click.option("--repetition-penalty", type=float, help=f"For tokens that were said; 1 is none  {OWN}1]")
@click.option(
    "--no-repeat-ngram-size", type=int, help=f"Say no sequence of this many tokens twice; 0: may  {OWN}0]"
)
@click.option("--num-beams", type=int, help=f"Search with this many beams; 1 for no search  {OWN}1]")
@click.option("--length-penalty", type=float, help=f"Of a beam: divide by its length to this power  {OWN}1]")
@click.option(
    "--early-stopping",
    type=click.Choice(list(EARLY_STOPPING)),
    help=f"End a search when enough beams have ended (yes), by estimate (no), or only by proof (never)  {OWN}no]",
)
@click.option(
    "--lookup", is_flag=True, help="Guess what comes next by what the text says already; same tokens."
)
@click.option(
    "--draft",
    type=click.Path(path_type=Path),
    help="Guess with this smaller model; same tokens.",
)
@click.option(
    "--draft-engine",
    metavar="ENGINE[:DEVICE[:PROFILE]]",
    help="Of the smaller model (default: where the model runs).",
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
    image: Path | None,
    engine: str,
    device: str,
    profile: str,
    ids: bool,
    no_special_tokens: bool,
    lookup: bool,
    draft: Path | None,
    draft_engine: str | None,
    stream: bool,
    threads: int | None,
    allow_fallback: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Continue PROMPT with MODEL, an artifact or (for the torch engine) a checkpoint folder.

    Without PROMPT, or with "-", the prompt is read from stdin; one newline at its end is not part of it. Only the new
    text goes to stdout. What no option says is as generation_config.json of the model has it.
    """
    text = read_prompt(prompt, prompt_file)
    given = read_ids(text) if ids else text
    options = {name: value for name, value in settings.items() if value is not None and value != ()}
    if "early_stopping" in options:
        options["early_stopping"] = EARLY_STOPPING[options["early_stopping"]]
    import portlm
    from portlm.flows.targets import Choice

    if ":" in engine:  # as the other verbs take it
        choice = Choice.parse(engine).narrowed(_said(device), _said(profile))
        engine, device, profile = choice.engine or "auto", choice.device or "auto", choice.profile or "auto"
    how = engine, device, profile, allow_fallback, threads
    where = how
    if draft_engine is not None:
        other = Choice.parse(draft_engine)
        where = other.engine or "auto", other.device or "auto", other.profile or "auto", *how[3:]
    with (
        portlm.load(model, *how) as session,
        nullcontext() if draft is None else portlm.load(draft, *where) as small,
    ):
        decoding = session.decoding(**options)
        note = session.placement().note
        if note:
            click.echo(f"generate: {session.engine.name}:{session.engine.device}: {note}", err=True)
        if sys.stderr.isatty() and (own := defaults_in_use(session, options)):
            click.echo(f"generate: {own} (generation_config.json; options change it)", err=True)
        options |= {"add_special_tokens": not no_special_tokens, "lookup": lookup, "draft": small}
        options |= {"image": image}
        if as_json:
            result = session.generate(given, **options)
            click.echo(json.dumps(describe(session, decoding, result), ensure_ascii=False))
            return
        # A search has nothing to show before its end.
        result = write(session, given, stream and decoding.num_beams == 1, options, sys.stdout.buffer)
    if sys.stderr.isatty():
        stats = result.stats
        passes = f", {stats.tokens_per_pass:.2f} per pass" if stats.drafted else ""
        click.echo(
            f"generate: {stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s, {stats.new_tokens} "
            f"written at {stats.tokens_per_second:.1f}/s{passes} ({result.finish_reason}), {session!r}",
            err=True,
        )


def _said(option: str) -> str | None:
    return None if option == "auto" else option


def defaults_in_use(session: Session, options: dict[str, Any]) -> str:
    """Say which settings come from the model and change what is written."""
    found = {name: value for name, value in session.defaults.items() if name not in options}
    if not session.decoding(**options).temperature:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            found.pop(name, None)
    if "max_new_tokens" in options or "max_new_tokens" in found:
        found.pop("max_length", None)
    plain = {field.name: field.default for field in dataclasses.fields(session.decoding())}
    return ", ".join(f"{name} = {value}" for name, value in found.items() if value != plain.get(name))


def read_ids(text: str) -> npt.NDArray[np.int64]:
    """Return the token ids of a prompt: whole numbers with spaces, commas or lines between, in brackets or not.

    Raises:
        UsageError: something in it is no whole number.
    """
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    for word in words:
        if not TOKEN_ID.fullmatch(word):
            raise UsageError(f"--ids: {shown(word)} is no token id: give whole numbers, with spaces between")
    return np.array(words, np.int64)


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


def write(
    session: Session, given: str | npt.NDArray[np.int64], stream: bool, options: dict[str, Any], out: BinaryIO
) -> Generation:
    """Write the continuation of a text as UTF-8, or that of token ids as ids, with a newline behind it."""
    # A model can write the sequences that move a terminal's cursor or set its title; a file gets what it wrote.
    safe = HARMLESS if out.isatty() else {}

    def put(piece: object, before: str = "") -> None:
        out.write(f"{before}{piece}".translate(safe).encode())
        out.flush()

    if not stream:
        result = session.generate(given, **options)
        put(result.text if isinstance(given, str) else " ".join(map(str, result.token_ids)))
    else:
        pieces = session.stream(given, **options)
        if isinstance(given, str):
            for piece in pieces:
                put(piece)
        else:
            for i, token in enumerate(pieces.ids()):
                put(token, " " if i else "")
        assert pieces.generation is not None  # the stream has ended
        result = pieces.generation
    out.write(b"\n")
    out.flush()
    return result


def describe(session: Session, decoding: Decoding, result: Generation) -> dict[str, Any]:
    """Return what --json prints; the text of a model without a tokenizer is null."""
    engine, placement, stats = session.engine, session.placement(), result.stats
    return {
        "text": result.text if session.textless == "" else None,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "decoding": dataclasses.asdict(decoding),
        "defaults": session.defaults,
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
        "passes": stats.passes,
        "tokens_per_pass": stats.tokens_per_pass,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
    }
