"""Any decoder in plain PyTorch, as a graph of portlm's ops: what `portlm.export` does to a module that is not ours.

`trace` records a module's forward from input_ids (B, T) to logits (B, T, V) with torch.export, for any B and T.
`canonicalise` turns the recording into portlm:: ops and a few ATen operators, by the passes in PASSES, one after the
other. How the module wrote its masks, positions, norms and activations does not matter as long as the numbers are
theirs (compile/canonical_graph.py, canonical_attention.py, canonical_values.py).

Nothing is changed in silence: the recording and the result are run on random tokens, and must agree.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from portlm.agreement import within
from portlm.compile import (
    canonical_attention,
    canonical_clean,
    canonical_ops,
    canonical_portable,
    canonical_static,
    canonical_values,
)
from portlm.compile.canonical_graph import (
    WRAPPER,
    Node,
    Runner,
    Work,
    module_path,
    run,
)
from portlm.compile.quiet import quiet
from portlm.errors import ParityError, UsageError
from portlm.models.modes import answering

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by about 1e-6 of it
CHECKED = ((2, 5), (1, 1), (3, 17))  # (B, T) of the comparison, cut to the context

PASSES: tuple[Callable[[Work], None], ...] = (
    canonical_clean.inline_regions,
    canonical_clean.drop_no_ops,
    canonical_clean.spell,
    canonical_static.bound_context,
    canonical_ops.rotaries,
    canonical_attention.find_attention,
    canonical_attention.plain_attention,
    canonical_ops.linears,
    canonical_ops.rows_apart,
    canonical_clean.settle,
    canonical_values.activations,
    canonical_values.norms,
    canonical_ops.gates,
    canonical_ops.perceptrons,
    canonical_ops.residual_norms,
    canonical_portable.expand_spelling,
    canonical_static.fold,
    canonical_clean.settle,
    canonical_portable.refuse_unknown,
)


@dataclass(frozen=True)
class Canonical:
    """A decoder without a cache, as a graph.

    Attributes:
        module: its placeholders are the weights, input_ids (B, T) int64 and, where the model has positions,
            position_ids (B, T) int64, 0 .. T-1 in every row, and positions (T) int64, the same once, where a mask
            other than the causal one is looked up. Its output is (logits (B, T, V) float32,). A weight's
            placeholder has its name in meta["weight"]. Every node has meta["val"], a fake tensor whose sizes B and T
            are symbols, and those that came from the module meta["nn_module_stack"] and meta["stack_trace"].
        weights: name -> float32 tensor, in the orientation that the graph reads.
        context_length: the longest T.
        vocab_size: V.
    """

    module: fx.GraphModule
    weights: dict[str, Tensor]
    context_length: int
    vocab_size: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that are not weights."""
        nodes = self.module.graph.nodes
        return tuple(n.target for n in nodes if n.op == "placeholder" and "weight" not in n.meta)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of input_ids (B, T)."""
        B, T = input_ids.shape
        places = torch.arange(T)
        inputs = {"input_ids": input_ids, "position_ids": places.expand(B, T), "positions": places}
        return run(self.module, self.weights, **{n: inputs[n] for n in self.inputs})[0]


class _Logits(nn.Module):
    """A module whose forward returns the logits alone."""

    def __init__(self, module: nn.Module):
        super().__init__()
        setattr(self, WRAPPER, module)

    def forward(self, input_ids: Tensor) -> Tensor:
        result = getattr(self, WRAPPER)(input_ids)
        if not isinstance(result, Tensor) and hasattr(result, "logits"):
            result = result.logits
        if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
            result = result[0]
        if not isinstance(result, Tensor):
            raise UsageError(
                f"the module must return logits (B, T, V), or an object with .logits, got {type(result).__name__}"
            )
        return result


def trace(
    module: nn.Module, context_length: int = 0, example: Tensor | None = None
) -> torch.export.ExportedProgram:
    """Record a module's forward for any batch and length.

    Args:
        module: maps input_ids (B, T) int64 to logits (B, T, V), or to an object with .logits, or a tuple that begins
            with them. It is put in eval mode for the recording.
        context_length: the longest T; 0 leaves it to what the module says.
        example: ids (B, T) to record with, B and T at least 2; token 0 if None.

    Raises:
        UsageError: weights that are not float32, control flow that depends on data, or a size that must be fixed.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.dtype is not torch.float32:
            kind = _short(parameter.dtype)
            raise UsageError(f"{name} is {kind}, and the weight file holds float32: {_cast(parameter)}")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise UsageError(
                f"{name} is on the device meta, where tensors have no values: load its weights first"
            )
        if tensor.device.type != "cpu":
            raise UsageError(f"{name} is on {tensor.device}, and export runs on the CPU: call module.cpu()")
    ids = torch.zeros(2, 5, dtype=torch.int64) if example is None else example
    if ids.dim() != 2 or min(ids.shape) < 2 or ids.dtype != torch.int64:
        raise UsageError(f"example must be int64 (B, T), both at least 2, got {ids.dtype} {tuple(ids.shape)}")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC(max=context_length or None)}
    try:
        with answering(module), torch.no_grad(), quiet(), _masks_as_given():
            return torch.export.export(_Logits(module).eval(), (ids,), dynamic_shapes=(sizes,), strict=False)
    except UsageError:
        raise
    except Exception as error:
        raise _explained(error) from error


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Keep nn.TransformerEncoder and its kin from looking at the values of a mask, to see whether it is causal.

    A recording has no values. The mask itself says what it hides, and is recorded.
    """
    layers: Any = torch.nn.modules.transformer
    original = layers._detect_is_causal_mask
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        layers._detect_is_causal_mask = original


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(parameter: Tensor) -> str:
    return (
        "call module.float()"
        if parameter.is_floating_point()
        else "keep integers in buffers, weights in float32"
    )


def _explained(error: Exception) -> UsageError:
    """Say in one line why torch.export could not record a module."""
    text = str(error)
    frames = re.findall(r'File "([^"]*)", line (\d+), in .*\n\s*(.*)', text)
    frames = [f for f in frames if "/torch/" not in f[0]]
    where = ""
    if frames:
        file, number, code = frames[-1]
        where = f" at {file.rsplit('/', 1)[-1]} line {number}: `{code.strip()}`"
    else:
        trace_back = error.__traceback__
        while trace_back is not None:
            code = trace_back.tb_frame.f_code
            if (
                "/torch/" not in code.co_filename
                and code.co_name == "forward"
                and code.co_filename != __file__
            ):
                where = f" at {code.co_filename.rsplit('/', 1)[-1]} line {trace_back.tb_lineno}"
            trace_back = trace_back.tb_next
    kind = type(error).__name__
    if "data-dependent" in text.lower() or "DataDependent" in kind or "unbacked" in text.lower():
        return UsageError(
            f"the module decides by the values of its input{where}, which no graph can: "
            "write the choice as arithmetic, or take it out of forward"
        )
    if "specialized" in text or "Constraints violated" in text or "constant" in text.lower():
        return UsageError(
            f"the module fixes the batch or the length of its input{where}, and a graph must take any: "
            f"use x.shape where a number stands ({text.strip().splitlines()[0][:200]})"
        )
    return UsageError(f"the module cannot be recorded{where}: {kind}: {text.strip().splitlines()[0][:200]}")


def canonicalise(
    program: torch.export.ExportedProgram,
    context_length: int = 0,
    check: bool = True,
    own_attention: bool = True,
    watch: Callable[[str, fx.Graph], None] | None = None,
) -> Canonical:
    """Turn the recording of a module into a graph of portlm:: ops and the ATen operators of canonical_portable.KEPT.

    Args:
        program: of `trace`, or of torch.export for one input (B, T) of ids with both sizes dynamic.
        context_length: the longest T; 0 takes the bound that the program has, or the rows of its position table.
        check: compare the graph with the program on random ids.
        own_attention: keep causal attention as portlm::attention. It has a form in a graph as attention over a cache
            only, see canonical_decoder.py; False writes it in products with a mask.
        watch: called with the name of each pass and the graph after it.

    Raises:
        UsageError: something in the program has no form; the message says what, where, and what to write instead.
        ParityError: the graph does not give the program's logits. This is a defect of a pass, not of the module.
    """
    if any(node.op == "call_function" and _writes(node) for node in program.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions({})  # in-place operators become their pure twins
    work = _start(program, context_length)
    for change in PASSES:
        if change is canonical_attention.plain_attention and own_attention:
            continue
        change(work)
        if watch is not None:
            watch(change.__name__, work.graph)
    result = _finish(work)
    if check:
        _check(program, result)
    return result


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def _start(program: torch.export.ExportedProgram, context_length: int) -> Work:
    signature = program.graph_signature
    graph = fx.Graph()
    values: dict[Node, Node] = {}
    result = graph.graph_copy(program.graph, values)
    written = {**signature.buffers_to_mutate, **getattr(signature, "parameters_to_mutate", {})}
    if written:
        names = ", ".join(sorted(module_path(name) for name in written.values()))
        raise UsageError(
            f"forward writes to {names}, and a graph only reads its weights: leave it as it is in eval mode"
        )
    if not isinstance(result, (tuple, list)) or len(result) != 1 or len(signature.user_inputs) != 1:
        raise UsageError("the module must take input_ids alone and return logits alone")
    graph.output(tuple(result))
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    (ids_name,) = signature.user_inputs
    ids = placeholders[ids_name]
    ids.target, ids.name = "input_ids", "input_ids"
    sizes = ids.meta["val"].shape
    if len(sizes) != 2 or any(isinstance(s, int) for s in sizes):
        raise UsageError(f"input_ids must be (B, T) with both sizes dynamic, got {tuple(sizes)}")
    work = Work(program.graph_module, graph, _weights(program, placeholders), ids, 0)
    bound = program.range_constraints.get(sizes[1].node.expr)
    upper = int(bound.upper) if bound is not None and bound.upper.is_finite and bound.upper < 2**31 else 0
    work.context = min([n for n in (upper, context_length) if n], default=0)
    return work


def _weights(
    program: torch.export.ExportedProgram, placeholders: dict[str, Node]
) -> dict[str, tuple[str, Tensor]]:
    """Return placeholder -> (name, tensor) of what the graph reads; a tied weight has its first name only."""
    signature = program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers
    names |= signature.inputs_to_lifted_tensor_constants
    found: list[tuple[str, str, Tensor]] = []
    for placeholder, name in names.items():
        tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
        found.append((placeholder, module_path(name), tensor.detach()))
    read = {p for p, _, _ in found if placeholders[p].users}
    tensors = {t.data_ptr() for p, _, t in found if p in read and t.numel()}
    found = [f for f in found if f[0] in read or f[2].data_ptr() in tensors]
    first = canonical_static.shared_once(found)
    for placeholder, kept in first.items():
        placeholders[placeholder].replace_all_uses_with(placeholders[kept])
    weights = {p: (name, tensor) for p, name, tensor in found if p not in first}
    for placeholder in names:
        if placeholder not in weights:
            placeholders[placeholder].graph.erase_node(placeholders[placeholder])
    return weights


def _finish(work: Work) -> Canonical:
    graph = work.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in work.weights:
            if not node.users:
                graph.erase_node(node)
                del work.weights[node.name]
                continue
            name, tensor = work.weights[node.name]
            if tensor.dtype is not torch.float32:
                raise UsageError(
                    f"{name} is {_short(tensor.dtype)}, and the weight file holds float32: register it as float32"
                )
            if not torch.isfinite(tensor).all():
                raise UsageError(f"{name} holds NaN or infinity, and a graph has finite weights only")
            node.meta["weight"] = name
    (logits,) = next(n for n in graph.nodes if n.op == "output").args[0]
    value = logits.meta["val"]
    if value.dim() != 3 or not isinstance(value.shape[2], int) or value.dtype is not torch.float32:
        raise UsageError(
            f"the module must return float32 logits (B, T, V), got {value.dtype} {tuple(value.shape)}"
        )
    graph.lint()
    weights = dict(work.weights[n.name] for n in graph.nodes if n.name in work.weights)
    result = Canonical(fx.GraphModule(nn.Module(), graph), weights, work.context, int(value.shape[2]))
    if _vocabulary(result) < result.vocab_size:
        raise UsageError(
            f"the module gives logits for {result.vocab_size} ids and reads {_vocabulary(result)}: it could not read "
            "all that it writes; make the embedding as long as the logits are wide"
        )
    return result


def _check(program: torch.export.ExportedProgram, result: Canonical) -> None:
    """Compare the program and its canonical form on random ids."""
    vocab = _vocabulary(result)
    generator = torch.Generator().manual_seed(0)
    for B, T in dict.fromkeys((B, min(T, result.context_length)) for B, T in CHECKED):
        ids = torch.randint(0, vocab, (B, T), generator=generator)
        with torch.no_grad():
            expected = Runner(program.graph_module).run(*_arguments(program, ids))[0]
            actual = result(ids)
        scale = float(expected.abs().max())
        if not math.isfinite(scale):
            raise ParityError(f"the module's own answer to {B} x {T} random tokens holds NaN or infinity")
        error = float((actual - expected).abs().max())
        if not within(error, TOLERANCE * max(scale, 1e-6)):
            raise ParityError(
                f"the canonical graph differs from the module by {error:.3g} of {scale:.3g} for {B} x {T} tokens"
            )


def _vocabulary(result: Canonical) -> int:
    """Return how many ids the model reads; it may be fewer than it has logits for."""
    ids = next(n for n in result.module.graph.nodes if n.target == "input_ids")
    tables = [n.args[1] for n in ids.users if n.target is torch.ops.portlm.embedding.default]
    return min((t.meta["val"].shape[0] for t in tables), default=result.vocab_size)


def _arguments(program: torch.export.ExportedProgram, ids: Tensor) -> Iterable[Any]:
    signature = program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers
    names |= signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            if name is None:
                yield ids
            else:
                yield program.state_dict[name] if name in program.state_dict else program.constants[name]
