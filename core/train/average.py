"""The mean of several checkpoints of one model, weight by weight.

Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), section 6.1, translate with the mean of the last 5
checkpoints of a run, 20 for the big model. Of runs that went on from the same checkpoint it is the uniform soup of
Wortsman et al., 2022 (arXiv:2203.05482). Weights that were drawn independently have no meaningful mean, and nothing
here can tell: score the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from portlm.errors import ConfigError, UsageError
from portlm.hub import new_result
from portlm.hub_files import TOKENIZER
from portlm.models import CONFIG, WEIGHTS, Model, load_config, load_model, save_model, whole_tables
from portlm.train.checkpoint import MANIFEST, check_checkpoint, is_checkpoint, list_checkpoints
from portlm.train.loop import OBJECTIVE, OPTIMIZER, RNG
from portlm.train.run_folder import RunFolder

# What the mean does not get from the last checkpoint.
_OF_THE_RUN = (MANIFEST, OBJECTIVE, OPTIMIZER, RNG, WEIGHTS)


def last_checkpoints(run: str | Path, count: int) -> list[Path]:
    """Return the newest checkpoints of a run, oldest first.

    Raises:
        UsageError: There are fewer.
    """
    found = [path for _, path in list_checkpoints(RunFolder(run).checkpoints)]
    if len(found) < count:
        raise UsageError(
            f"{run} has {len(found)} checkpoints, not {count}: train with --set checkpoint.keep={count}, "
            "or ask for fewer with --last"
        )
    return found[len(found) - count :]


def average(checkpoints: Sequence[str | Path], out: str | Path) -> Path:
    """Write the mean of the weights of some checkpoints as a checkpoint.

    Args:
        checkpoints: At least two folders, of one configuration and one tokenizer. All but weights is as in the last.
        out: A folder that does not exist or is empty.

    Returns:
        ``out``.

    Raises:
        UsageError: Fewer than two, one of them twice, or ``out`` holds something, which is left alone.
        ConfigError: They are not of one model, or have no weights that can be averaged.
        FormatError: A file is missing or damaged.
        StorageError: The disk is full or refuses.
    """
    folders = [Path(folder) for folder in checkpoints]
    if len(folders) < 2:
        raise UsageError(f"a mean needs at least two checkpoints, got {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("a checkpoint is named twice: each counts once")
    with new_result(Path(out)) as result:
        model = _mean(folders)
        save_model(result, model)
        for path in sorted(folders[-1].iterdir()):
            if path.is_file() and path.name not in _OF_THE_RUN:
                shutil.copyfile(path, result / path.name)
    return Path(out)


def _mean(folders: Sequence[Path]) -> Model:
    """The last of some models with the mean of the weights of all."""
    import torch

    for folder in folders:
        if is_checkpoint(folder):
            check_checkpoint(folder)
    last = folders[-1]
    config = load_config(last)
    for folder in folders[:-1]:
        if load_config(folder) != config:
            raise ConfigError(f"{folder} and {last} are not of one model: their {CONFIG} say other things")
        if _bytes(folder / TOKENIZER) != _bytes(last / TOKENIZER):
            raise ConfigError(f"{folder} and {last} have not the same tokenizer")
    model = load_model(last)
    if tables := [name for name, _ in whole_tables(model)]:
        raise ConfigError(
            f"{last} has no mean: {', '.join(tables)} of a model of family {config.family} are whole numbers"
        )
    sums = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for folder in folders[:-1]:
        for name, parameter in load_model(folder).named_parameters():
            sums[name] += parameter.detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(sums[name] / len(folders))
    return model


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
