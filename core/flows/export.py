"""portlm.export: from a module in memory to an artifact that carries the module's own answer.

Nobody can ask the module again once it is an artifact: no code of it is stored. So its answer to the probe of the
parity certificate is taken now, on PyTorch's own operators, and every engine is measured against that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portlm.artifact import Manifest, read_manifest
from portlm.errors import UsageError
from portlm.plan import has_code
from portlm.roles import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from portlm.models.roles import Role


def export(
    module: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    example: Any = None,
    profiles: Sequence[str] = ("portable", "fused"),
    answer: bool = True,
    weights: str = "auto",
    quantize: str | None = None,
    group: int | None = None,
    asymmetric: bool = False,
    calibrate: str | Path | None = None,
    cache: str | None = None,
) -> Path:
    """Export a model that is in memory to an artifact folder, which appears complete or not at all.

    Args:
        module: any torch.nn.Module in float32 that maps input_ids (B, T) int64 to logits (B, T, V), or to an object
            with .logits; or one that declares its roles in `roles()`, see portlm.models.roles. It is not changed.
        folder: the artifact folder. An artifact that is already there is replaced, anything else is refused.
        tokenizer: has `save(folder)`; None leaves the artifact without one, for token ids only.
        example: input_ids (B, T) int64 to record a module without roles with; None makes some.
        profiles: which graphs to write.
        answer: also keep the module's own answer to the probe that `portlm verify` puts to every engine, which takes
            up to 128 steps of greedy decoding. Where weights are quantized, the answer is that of the module with what
            they mean in their place; a module that declares no roles gives none then, and engines are compared with its
            graph in PyTorch's own operators.
        weights: "bfloat16" or "float16" to round matrices to 16 bits, which halves them on disk and where an engine
            reads them so; the module is rounded, too, until its answer is kept. "auto" is "float32".
        quantize: "int8" or "int4" for matrices and token tables in so many bits; None leaves them as they are.
        group: how many weights share a scale: 32, 64 (if nothing is said) or 128, which must divide the inputs of every
            matrix.
        asymmetric: each group has a zero point, too.
        calibrate: a text file like what the model will read, for the tokenizer. Weights are rounded so that what they
            give on its first nine tenths changes least; what quantizing costs on the last tenth is measured, and said
            in the manifest, if the module declares roles.
        cache: "int8" to keep keys and values in 8 bits, see portlm.ops.byte_cache; None is "float32". The answer is
            then that of the module with such a cache, and with `calibrate` its cost is measured, whether weights are
            quantized or not. A module that declares no roles gives no answer.

    Returns:
        The artifact folder.

    Raises:
        FormatError: the module computes what a graph cannot say. The message names the operator, the module and the
            line.
        UsageError: `folder` holds something that is not an artifact, a profile is unknown, or the group does not divide
            the inputs of a matrix, which the message names.
        StorageError: the disk is full or refuses. What was there before is untouched.
    """
    from portlm.compile.calibrate import read
    from portlm.compile.export import export_module
    from portlm.compile.halves import rounding
    from portlm.flows.quality import record_cost
    from portlm.models.roles import roles_of

    _check_arguments(module, folder, tokenizer, example)
    target = export_module(
        module,
        folder,
        tokenizer=tokenizer,
        example=example,
        profiles=profiles,
        weights=weights,
        quantize=quantize,
        group=group,
        asymmetric=asymmetric,
        calibrate=calibrate,
        cache=cache,
    )
    if calibrate is not None and roles_of(module):
        text = read(calibrate, tokenizer, read_manifest(target).model.vocab_size)
        record_cost(target, module, text, weights)
    manifest = read_manifest(target)
    if answer and not has_code(manifest):
        with rounding(module, weights):
            _keep_answer(module, target, manifest)
    return target


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    profiles: Sequence[str] = ("portable", "fused"),
    *,
    weights: str = "auto",
    quantize: str | None = None,
    group: int | None = None,
    asymmetric: bool = False,
    calibrate: str | Path | None = None,
    cache: str | None = None,
) -> Path:
    """Export a checkpoint to an artifact folder, as portlm.compile.export.export does.

    With a text, what quantizing and a cache of 8 bits cost on the last tenth of the text is measured and said in the
    manifest.
    """
    from portlm.compile import export as compiler
    from portlm.compile.calibrate import read
    from portlm.flows.quality import record_cost
    from portlm.tokenizer import Tokenizer

    target = compiler.export(
        checkpoint,
        out,
        profiles,
        weights=weights,
        quantize=quantize,
        group=group,
        asymmetric=asymmetric,
        calibrate=calibrate,
        cache=cache,
    )
    if calibrate is not None:
        module, _ = compiler.open_mapped(checkpoint)
        vocab_size = read_manifest(target).model.vocab_size
        record_cost(target, module, read(calibrate, Tokenizer.load(checkpoint), vocab_size), weights)
    return target


def _check_arguments(module: object, folder: str | Path, tokenizer: object, example: object) -> None:
    """Refuse what is not what `export` takes.

    Raises:
        UsageError: the message says what it is, and what it must be.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        hint = "; a checkpoint on disk goes through `portlm export`" if isinstance(module, str | Path) else ""
        raise UsageError(f"the model must be a torch.nn.Module, got {type(module).__name__}{hint}")
    if example is not None and not isinstance(example, torch.Tensor):
        raise UsageError(f"example must be a tensor, int64 (B, T), got {type(example).__name__}")
    if tokenizer is not None and not hasattr(tokenizer, "save"):
        raise UsageError(
            f"tokenizer must be a portlm.tokenizer.Tokenizer, got {type(tokenizer).__name__}: "
            "take Tokenizer.load(folder)"
        )
    try:
        os.lstat(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise UsageError(
                f"{str(folder)[:80]!r} cannot be the name of a folder: {error.args[-1]}"
            ) from error


def _keep_answer(module: nn.Module, folder: Path, manifest: Manifest) -> None:
    """Store what the module itself says to the probe."""
    import torch

    from portlm.compile import parity
    from portlm.compile.quantized_module import dequantized
    from portlm.models.modes import answering
    from portlm.models.roles import roles_of
    from portlm.ops.kernel_op import without_kernels
    from portlm.runtimes.eager import TorchEngine

    declared = roles_of(module)
    if (manifest.quantization is not None or manifest.cache is not None) and not declared:
        return
    functions = declared or {"decoder": _whole_forward(module, manifest.model.vocab_size)}
    sizes = manifest.model.vocab_size, manifest.model.context_length
    engine = TorchEngine(functions, *sizes, "cpu", "native", {"cpu": 0})
    engine.rounds_cache = manifest.cache is not None
    with answering(module), dequantized(module, folder, manifest), torch.no_grad(), without_kernels():
        parity.certify(folder, [], reference=engine)


def _whole_forward(module: nn.Module, vocab_size: int) -> Role:
    """The module's forward as a role without state."""
    from portlm.models.roles import Role

    def function(input_ids: Tensor) -> tuple[Tensor, ...]:
        result = module(input_ids)
        logits = getattr(result, "logits", result)
        return (logits[0] if isinstance(logits, tuple | list) else logits,)

    return Role(
        function,
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        (TensorSpec("logits", "float32", ("batch", "sequence", vocab_size)),),
    )
