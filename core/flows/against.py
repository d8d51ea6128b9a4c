"""`portlm bench --against`: a user's own model on portlm's engines and on those of others, in one race."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from portlm.artifact import read_manifest
from portlm.errors import UsageError
from portlm.flows.bench import check_counts
from portlm.flows.race.contender import Entry
from portlm.flows.race.gate import BYTE_CACHE
from portlm.flows.race.race import Rules, run
from portlm.flows.race.rivals import ours
from portlm.flows.race.rounds import Pass
from portlm.flows.targets import Target


def compare(
    model: Path,
    targets: Sequence[Target],
    rivals: Sequence[Entry],
    *,
    prompt: int = 128,
    tokens: int = 64,
    rounds: int = 7,
    threads: int | None = None,
    keep: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Race portlm's engines and rivals on the weights of an artifact, which are converted for each of them.

    Args:
        model: artifact folder.
        targets: of portlm.
        rivals: see portlm.flows.race.rivals.
        prompt: tokens of the prefill, and of the cache that decoding starts behind.
        tokens: greedy single-token steps per sample.
        rounds: samples per contender, after one that is not counted.
        threads: of each contender; None leaves portlm its own choice and gives the others one per core.
        keep: a folder for the converted files; None for one that is removed at the end.
        progress: called with a line before each step.

    Returns:
        What portlm.flows.race.race.run returns.

    Raises:
        UsageError: the artifact has quantized weights, a count is below 1, prompt + tokens are beyond the context, or
            a target is not on the CPU.
        PortlmError: see portlm.flows.race.race.run.
    """
    check_counts(model, prompt, tokens, rounds)
    manifest = read_manifest(model)
    if manifest.quantization is not None:
        raise UsageError(
            f"{model} has quantized weights alone, and rivals are given float32 ones: race an artifact of the "
            "checkpoint, made by portlm export without --quantize"
        )
    for target in targets:
        if target.device != "cpu":
            raise UsageError(f"rivals run on the CPU, so {target} has nobody to race: name targets on cpu")
    entries = [*ours(targets, "" if manifest.cache is None else BYTE_CACHE), *rivals]
    rules = Rules((Pass(prompt, prompt, tokens),), rounds=rounds, loads=1, threads=threads)
    if keep is not None:
        return run(model, entries, keep, rules, progress)
    with tempfile.TemporaryDirectory(prefix="portlm-race-") as work:
        return run(model, entries, Path(work), rules, progress)
