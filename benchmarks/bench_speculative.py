"""What reading guesses gains and costs: lookup and draft models against plain decoding, in interleaved pairs.

A model with random weights copies nothing, so its text is dictated: the engine computes every pass, and then the logits
are made to say the next token of a given text. The times are those of the model, the tokens those of the text, and a
guess is right as often as the text repeats itself. Texts are of four kinds: an edit (a text once more with words
replaced), source code, prose, and random tokens, of which none can be guessed. Plain decoding runs in the engine's own
loop where it has one, as without guesses.

With --model and --draft, trained models write what they say themselves, greedily and sampled: acceptance is real there.

    python benchmarks/bench_speculative.py --engine packed --engine ort --quantize int4
    python benchmarks/bench_speculative.py --model run/final --draft small/final --prompts text.txt
    python benchmarks/bench_speculative.py --smoke    # to see that it runs
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from random_model import export_random

from portlm.flows.measuring import paired_ratio

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, CONTEXT = 4096, 1024
SIZES = {"30M": (8, 8, 512), "tiny": (2, 2, 32)}  # layers, heads, width


def make_model(folder: Path, size: str, quantize: str | None, engines: list[str]) -> Path:
    """Export and compile a random model; return the artifact."""
    from portlm.compile.build import build

    artifact = export_random(folder, VOCABULARY, *SIZES[size], context=CONTEXT, quantize=quantize)
    build(artifact, [(engine, "cpu", "fused") for engine in engines if engine != "torch"])
    return artifact


def texts(prompt: int, count: int) -> dict[str, list[int]]:
    """Texts of prompt + count tokens: what is dictated begins behind the prompt."""
    from portlm.tokenizer import train_bpe

    code = "".join(path.read_text() for path in sorted((ROOT / "runtimes").glob("*.py")))
    prose = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    tokenizer = train_bpe([code, prose], vocab_size=VOCABULARY)
    source = tokenizer.encode(code)
    edited = tokenizer.encode(
        tokenizer.decode(source[:prompt]).replace("self", "this").replace("rows", "items")
    )
    noise = np.random.default_rng(0).integers(0, VOCABULARY, prompt + count).tolist()
    found = {
        "edit": [*source[:prompt], *edited],
        "code": source,
        "prose": tokenizer.encode(prose),
        "random": noise,
    }
    return {name: (text * 4)[: prompt + count] for name, text in found.items()}


@contextmanager
def dictated(session: Any, text: list[int]) -> Iterator[None]:
    """Let the session's engine say the tokens of a text, in the time that its own take."""
    engine = session.engine
    run, advance = engine.run, getattr(engine, "advance", None)

    def saying(role: str, inputs: Any, state: Any) -> Any:
        outputs, state = run(role, inputs, state)
        places = inputs["position_ids"][0][inputs["logits_to_keep"]] + 1
        for answer, place in zip(outputs["logits"][0], places, strict=True):
            answer[text[place % len(text)]] = 1e6
        return outputs, state

    def writing(state: Any, asked: Any) -> Any:
        place = int(asked.lengths[0]) + 1
        found = advance(state, asked)  # type: ignore[misc]
        if found is None:
            return None
        ids, state = found
        said = [text[(place + i) % len(text)] for i in range(len(ids))]
        return np.array(said, np.int64)[:, None], state

    engine.run = saying
    if advance is not None:
        engine.advance = writing
    try:
        yield
    finally:
        del engine.run
        if advance is not None:
            del engine.advance


def compare(session: Any, prompts: list[Any], rounds: int, options: dict[str, Any], **guesses: Any) -> str:
    """Plain decoding and guesses in turns; the ratio of their speeds, and what became of the guesses."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    drafted = accepted = passes = tokens = differ = 0
    for i in range(rounds):
        for prompt in prompts:
            said = {}
            for guess in (False, True) if i % 2 else (True, False):
                result = session.generate(prompt, **options, **(guesses if guess else {}))
                rates[guess].append(result.stats.tokens_per_second)
                said[guess] = result.token_ids
                if guess:
                    drafted, accepted = drafted + result.stats.drafted, accepted + result.stats.accepted
                    passes, tokens = passes + result.stats.passes, tokens + result.new_tokens - 1
            differ += said[False] != said[True]
    ratio, (low, high) = paired_ratio(rates[True], rates[False])
    plain = float(np.median(rates[False]))
    return (
        f"{plain:7.0f} tokens/s plain, guesses {ratio:.2f} times ({low:.2f} to {high:.2f}), "
        f"{tokens / passes:.2f} tokens per pass, {accepted} of {drafted} guessed tokens right, "
        f"{differ} of {rounds * len(prompts)} texts differ"
    )


def pass_times(session: Any, rounds: int = 20) -> str:
    """How many times as long as a pass over one token those over several take: CPU time, the least of some rounds."""
    import time

    from portlm.rows import Rows

    rows = Rows(session.engine, 1)
    rows.read_texts([list(range(200))])
    least: dict[int, float] = {}
    for _ in range(rounds):
        for T in (1, 2, 3, 5, 9, 17):
            began = time.process_time()
            rows.read(np.ones((1, T), np.int64), every=True)
            least[T] = min(least.get(T, 1e9), time.process_time() - began)
            rows.crop([200])
    others = ", ".join(f"{T}: {least[T] / least[1]:.2f}" for T in least if T > 1)
    return f"a pass over 1 token takes {least[1] * 1e3:.2f} ms of CPU time, times as much over {others}"


def random_models(arguments: argparse.Namespace) -> None:
    """Dictate texts to random models."""
    import portlm

    size = "tiny" if arguments.smoke else "30M"
    prompt, count = (64, 24) if arguments.smoke else (400, arguments.tokens)
    dictations = texts(prompt, count)
    with tempfile.TemporaryDirectory() as scratch:
        for quantize in arguments.quantize or [None]:
            artifact = make_model(Path(scratch) / f"{quantize}", size, quantize, arguments.engine)
            for engine in arguments.engine:
                with portlm.load(artifact, engine, threads=arguments.threads) as session:
                    print(f"{size} {quantize or 'fp32'} {engine}: {pass_times(session)}", flush=True)
                    for name, text in dictations.items():
                        options = {"max_new_tokens": count, "ignore_eos": True}
                        with dictated(session, text):
                            found = compare(session, [text[:prompt]], arguments.rounds, options, lookup=True)
                        print(f"  {name:>7}: {found}", flush=True)


def trained_models(arguments: argparse.Namespace) -> None:
    """Let trained models write what they say themselves."""
    import portlm

    pieces = arguments.prompts.read_text().split("\n\n")
    prompts = [piece.rpartition("\n")[0] + "\n" for piece in random.Random(0).sample(pieces, arguments.texts)]
    for engine in arguments.engine:
        with portlm.load(arguments.model, engine, threads=arguments.threads) as session:
            print(f"{session!r}: {pass_times(session) if session.engine.context_length > 217 else ''}")
            small = (
                portlm.load(arguments.draft, engine, threads=arguments.threads) if arguments.draft else None
            )
            for name, settings in {"greedy": {}, "sampled": {"temperature": 1.0, "seed": 1}}.items():
                options = {"max_new_tokens": 64, "ignore_eos": True, **settings}
                print(
                    f"  lookup, {name}: {compare(session, prompts, arguments.rounds, options, lookup=True)}"
                )
                if small is not None:
                    print(
                        f"  draft, {name}: {compare(session, prompts, arguments.rounds, options, draft=small)}"
                    )


def main() -> None:
    """Measure, and print a line for each text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", action="append", help="packed and ort by default")
    parser.add_argument("--quantize", action="append", default=[], help="int4 or int8; fp32 without")
    parser.add_argument(
        "--model", type=Path, help="a trained checkpoint or artifact, in place of random ones"
    )
    parser.add_argument("--draft", type=Path, help="a smaller one of the same tokenizer")
    parser.add_argument("--prompts", type=Path, help="a text of pieces between empty lines")
    parser.add_argument("--texts", type=int, default=8, help="pieces of it that are continued")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    arguments.engine = arguments.engine or (["packed"] if arguments.smoke else ["packed", "ort"])
    arguments.rounds = 1 if arguments.smoke else arguments.rounds
    if arguments.model is None:
        random_models(arguments)
    else:
        trained_models(arguments)


if __name__ == "__main__":
    main()
