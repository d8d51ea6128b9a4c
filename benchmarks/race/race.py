"""The race: portlm's engines against the best CPU rivals on the same weights.

    benchmarks/race/install.sh FOLDER                  # the rivals, outside the project's environment
    FOLDER/bin/python benchmarks/race/race.py 30M 254M
    FOLDER/bin/python benchmarks/race/race.py 254M --only "portlm tvm f32" "llama.cpp F32" --rounds 9
    python benchmarks/race/race.py --smoke             # a minute, without rivals: does it run?

The protocol is portlm.flows.race: a process per contender, blocked while another is measured; logits against eager
transformers before anything is timed; rounds that alternate and rotate; limits probed in each; a disturbed round is
repeated; medians of paired ratios with bootstrapped 95 % intervals. Each model leaves report.md, race.json and pictures
in --out. What is missing is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, EXTRAS, SMOKE, WHOLE_LOOP
from models import CONTEXT, SHAPES, make
from plots import draw
from report import markdown

from portlm.flows.race.race import Rules, run
from portlm.flows.race.rounds import Pass

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SMALL = "0.6M"  # the model that the whole loop is raced on


def passes(tokens: int, contexts: list[int]) -> tuple[Pass, ...]:
    """What a visit measures: decoding behind one token, behind 128 as they are read, and behind the end of 1024."""
    found = [Pass(1, 1, tokens)]
    for context in contexts:
        found.append(Pass(min(context, 512), context, tokens))
    return tuple(found)


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def main() -> None:
    """Read the command line and race model by model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"of {', '.join(SHAPES)} (default: all but 125M)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders")
    parser.add_argument("--extra", nargs="+", default=[], metavar="NAME", help="these, too")
    parser.add_argument("--list", action="store_true", help="list the contenders")
    parser.add_argument("--rounds", type=positive, default=7, help="that count (default: %(default)s)")
    parser.add_argument(
        "--loads",
        type=positive,
        default=3,
        help="processes per contender for the load time (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=positive, help="default: portlm's own choice, one per core for the others"
    )
    parser.add_argument(
        "--tokens", type=positive, default=64, help="decoded per sample (default: %(default)s)"
    )
    parser.add_argument(
        "--contexts", type=positive, nargs="+", default=[128, 1024], help="(default: 128 1024)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.02,
        help="share of the machine others may have (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="noisy rounds that are repeated (default: %(default)s)"
    )
    parser.add_argument(
        "--busy-rounds", type=int, default=5, help="beside a busy thread, 0 for none (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="keep models and converted files here (default: removed)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "race", help="(default: %(default)s)")
    parser.add_argument(
        "--smoke", action="store_true", help="one short round of portlm alone on the smallest model"
    )
    options = parser.parse_args()
    everyone = CONTENDERS | EXTRAS
    if options.list:
        for name, entry in everyone.items():
            print(f"{name:<26} {entry.precision:<4} {entry.note}")
        return
    if options.smoke:
        options.models, options.only = [SMALL], options.only or list(SMOKE)
        options.rounds, options.loads, options.repeats, options.busy_rounds = 1, 1, 0, 1
        options.tokens, options.contexts = 8, [32]
    for given, known, what in (
        (options.models, SHAPES, "model"),
        ([*(options.only or []), *options.extra], everyone, "contender"),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"there is no {what} {', '.join(sorted(unknown))}: choose among {', '.join(known)}")
    if max(options.contexts) + options.tokens > CONTEXT:
        parser.error(f"--contexts and --tokens must fit into {CONTEXT}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="portlm-race-") as scratch:
        for name in options.models or ["0.6M", "30M", "254M"]:
            race(name, (options.work or Path(scratch)) / name, options)


def race(name: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Race one model and write what came out."""
    everyone = CONTENDERS | EXTRAS
    names = options.only or [*CONTENDERS, *(WHOLE_LOOP if name == SMALL else ())]
    entries = [everyone[n] for n in dict.fromkeys([*names, *options.extra])]
    out = options.out / name
    out.mkdir(parents=True, exist_ok=True)
    say(f"{name}: make the model")
    artifact = make(name, work)
    rules = Rules(
        passes(options.tokens, options.contexts), options.rounds, options.loads, options.threads, options.noise,
        options.repeats, busy=min(options.busy_rounds, 1), busy_rounds=options.busy_rounds,
    )  # fmt: skip
    title = f"LLaMA shape {name}, random weights"

    def write(result: dict[str, Any]) -> None:
        (out / "race.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "report.md").write_text(markdown(result, title))
        draw(result, title, out)
        say(f"{name}: written to {out}")

    result = run(artifact, entries, work / "files", rules, lambda message: say(f"{name}: {message}"), write)
    write(result)
    print(markdown(result, title), flush=True)
    return result


def say(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
