"""A canonical graph as a module that declares its roles: what is exported in the place of a module without any.

A foreign module computes all positions at once. If attention is the only place where one position sees another, and
every attention was recognised as causal, the same graph can go step by step: attention takes a cache, everything else
sees the new tokens alone. That is shown node by node (`mixing`), and then by numbers, before it is believed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from portlm.agreement import within
from portlm.compile.canonical import TOLERANCE, Canonical, canonicalise, trace
from portlm.compile.canonical_graph import Node, Runner, aten, module_path, place, portlm
from portlm.errors import ParityError, UsageError
from portlm.models.roles import Role
from portlm.models.roles import decoder as cached_role
from portlm.roles import TensorSpec

Caches = list[tuple[Tensor, Tensor]]


def decoder_of(module: nn.Module, context_length: int = 0, example: Tensor | None = None) -> CanonicalDecoder:
    """Return the decoder that is exported in the place of a module without roles.

    Args:
        module: maps input_ids (B, T) int64 to logits (B, T, V), or to an object with .logits, or a tuple that begins
            with them.
        context_length: the longest T; 0 takes what the module says: its configuration's, the rows of its table of
            positions, the side of its mask, or the bound that it checks.
        example: ids (B, T) to record with.

    Raises:
        UsageError: something in the module has no form, nothing bounds its length, or a token sees those after it. The
            message names the line.
    """
    program = trace(module, context_length or stated_context(module), example)
    decoder = CanonicalDecoder(canonicalise(program))
    if decoder.why_not:
        why_not = decoder.why_not
        decoder = CanonicalDecoder(canonicalise(program, own_attention=False))
        decoder.why_not = why_not
        _check_order(decoder)
    return decoder


def _check_order(decoder: CanonicalDecoder) -> None:
    """Compare the logits of the first tokens with those of the whole sequence, on random ids.

    A batch is padded at the end, and every new token comes there: logits may not change by what follows.

    Raises:
        UsageError: they do.
    """
    total = min(33, decoder.context_length)
    ids = torch.randint(0, decoder.ids(), (2, total), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = decoder(ids)
        scale = max(float(whole.abs().max()), 1e-6)
        for T in sorted({1, 2, 3, total // 2, total - 1} & set(range(1, total))):
            error = float((decoder(ids[:, :T]) - whole[:, :T]).abs().max())
            if not within(error, TOLERANCE * scale):
                raise UsageError(
                    f"the logits of {T} tokens change by {error:.3g} of {scale:.3g} when others follow, and a decoder "
                    "writes from left to right: hide later tokens in every attention, with is_causal=True or a mask "
                    f"of -inf; here {decoder.why_not}"
                )


def stated_context(module: nn.Module) -> int:
    """Return the context length that a module's configuration states, or 0."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("context_length", "max_position_embeddings", "n_positions"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


class _Part(nn.Module):
    """Stands where a module of the original stood, so that what is recorded carries its path."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class CanonicalDecoder(_Part):
    """The decoder of a canonical graph, with a cache where it can have one.

    Weights keep their names. Arguments and results are those of portlm's own decoders.

    Attributes:
        context_length: the longest sequence.
        vocab_size: V.
        caches: (K, D) of each attention: key/value heads and their width; empty without a cache.
        why_not: why there is no cache; "" if there is one.
    """

    def __init__(self, canonical: Canonical):
        super().__init__()
        self.context_length, self.vocab_size = canonical.context_length, canonical.vocab_size
        self._inputs = canonical.inputs
        self.why_not = mixing(canonical)
        self.caches: list[tuple[int, int]] = []
        self._plain = canonical.module.graph
        self._graph = self._plain if self.why_not else self._with_cache(canonical)
        for name, tensor in canonical.weights.items():
            path, _, last = name.rpartition(".")
            part = self._part(path)
            _check_free(part, last)
            part.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        for node in self._graph.nodes:
            self._part(_path(node))
        if not self.why_not:
            self._check()

    def _part(self, path: str) -> nn.Module:
        """Return the part at a path, made with those above it where it is missing."""
        part: nn.Module = self
        for name in path.split(".") if path else []:
            if name not in part._modules:
                _check_free(part, name)
                part.add_module(name, _Part())
            part = part._modules[name]  # type: ignore[assignment]
        return part

    def _with_cache(self, canonical: Canonical) -> fx.Graph:
        """Return a copy of the graph whose attentions append to a cache, and whose head sees the tokens to keep."""
        graph = fx.Graph()
        (logits,) = graph.graph_copy(canonical.module.graph, {})  # type: ignore[misc]
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            keep = graph.placeholder("logits_to_keep")
            mask = graph.placeholder("attention_mask")
        present: list[Node] = []
        for node in list(graph.nodes):
            if node.target is not portlm.attention.default:
                continue
            q, k, v, _, scale = node.args
            layer = len(self.caches)
            self.caches.append((k.meta["val"].shape[2], k.meta["val"].shape[3]))
            with graph.inserting_after(mask):
                past = [graph.placeholder(f"past_{layer}_{kind}") for kind in ("value", "key")][::-1]
            with graph.inserting_before(node):
                step = graph.call_function(portlm.cached_attention.default, (q, k, v, *past, mask, scale))
                step.meta = dict(node.meta)
                present += [graph.call_function(_item, (step, i)) for i in (1, 2)]
            node.replace_all_uses_with(step)
            graph.erase_node(node)
        head = _head(logits)
        if head is not None:
            with graph.inserting_before(head):
                kept = graph.call_function(aten.index_select.default, (head.args[0], 1, keep))
            head.args = (kept, *head.args[1:])
        else:
            logits = graph.call_function(aten.index_select.default, (logits, 1, keep))
        graph.output((logits, *present))
        graph.lint()
        return graph

    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: Caches,
        logits_to_keep: Tensor,
    ) -> tuple[Tensor, Caches]:
        """Return the logits of the new tokens that are asked for, and the grown cache.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T) int64.
            attention_mask: (B, P+T) int64, 0 for padding.
            past: keys and values (B, K, P, D) of each attention.
            logits_to_keep: (kept) int64, indices into the T tokens.
        """
        inputs = {
            "input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep,
        }  # fmt: skip
        for layer, (key, value) in enumerate(past):
            inputs[f"past_{layer}_key"], inputs[f"past_{layer}_value"] = key, value
        logits, *present = self._run(self._graph, inputs)
        return logits, list(zip(present[::2], present[1::2], strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the logits (B, T, V) of input_ids (B, T); given a function first, call it in this module's name."""
        if callable(args[0]):
            return super().forward(*args, **kwargs)
        (ids,) = args
        positions = torch.arange(ids.shape[1], device=ids.device)
        inputs = {"input_ids": ids, "position_ids": positions.expand_as(ids), "positions": positions}
        return self._run(self._plain, inputs)[0]

    def _run(self, graph: fx.Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        runner = _InPlace(self, graph)
        values = [
            self.get_parameter(node.meta["weight"]) if "weight" in node.meta else inputs[node.target]
            for node in graph.nodes
            if node.op == "placeholder"
        ]
        return runner.run(*values)

    def roles(self) -> dict[str, Role]:
        """Return the role "decoder": with a cache if there is one, else from all tokens to the logits of all."""
        if not self.why_not:
            return {"decoder": cached_role(self.step, vocab_size=self.vocab_size, caches=self.caches)}
        shapes = {"input_ids": ("batch", "sequence"), "position_ids": ("batch", "sequence")}
        inputs = tuple(TensorSpec(name, "int64", shapes.get(name, ("sequence",))) for name in self._inputs)

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self._run(self._plain, dict(zip(self._inputs, tensors, strict=True)))

        logits = TensorSpec("logits", "float32", ("batch", "sequence", self.vocab_size))
        return {"decoder": Role(function, inputs, (logits,))}

    def warn(self, name: str) -> None:
        """Warn about what it costs that there is no cache."""
        if self.why_not:
            warnings.warn(
                f"{name} is exported without a cache: {self.why_not}. Each new token computes the whole sequence "
                "again; a method step() over a key/value cache, declared in roles(), would compute the new token only",
                stacklevel=3,
            )

    def _check(self) -> None:
        """Compare steps of several sizes, one of them with padding, with the sequence at once.

        Raises:
            ParityError: they differ. This is a defect of `mixing`, not of the module.
        """
        total = min(9, self.context_length)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.ids(), (2, total), generator=generator)
        with torch.no_grad():
            expected = self(ids)
            past = [(torch.zeros(2, K, 0, D), torch.zeros(2, K, 0, D)) for K, D in self.caches]
            found, begin = [], 0
            for end in sorted({1, (total + 1) // 2, max(total - 1, 1), total}):
                places = torch.arange(begin, end).expand(2, -1)
                keep, seen = torch.arange(end - begin), torch.ones(2, end, dtype=torch.int64)
                logits, past = self.step(ids[:, begin:end], places, seen, past, keep)
                found.append(logits)
                begin = end
        error = float((torch.cat(found, 1) - expected).abs().max())
        if not within(error, TOLERANCE * max(float(expected.abs().max()), 1e-6)):
            raise ParityError(f"steps over a cache differ from the whole sequence by {error:.3g}")

    def ids(self) -> int:
        """Return how many ids the model reads; it may give logits for fewer."""
        tables = [
            n.args[1].meta["val"].shape[0]
            for n in self._plain.nodes
            if n.target is portlm.embedding.default and n.args[0].target == "input_ids"
        ]
        return min(tables, default=self.vocab_size)


def _check_free(part: nn.Module, name: str) -> None:
    if hasattr(part, name):
        raise UsageError(
            f"a part of the module is called {name!r}, and so is an attribute of the decoder that is exported in its "
            "place: rename it"
        )


def _item(values: Any, index: int) -> Any:
    return values[index]


class _InPlace(Runner):
    """Runs each node inside the part that stands for its module."""

    def __init__(self, root: CanonicalDecoder, graph: fx.Graph):
        super().__init__(fx.GraphModule(nn.Module(), graph))
        self.root, self.part = root, root

    def run_node(self, n: fx.Node) -> Any:
        """Note the part of a node, then run it."""
        path = _path(n)
        self.part = self.root.get_submodule(path) if path else self.root  # type: ignore[assignment]
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function from inside the part."""
        if target is aten.sym_size.int:
            return args[0].shape[args[1]]
        return self.part(super().call_function, target, args, kwargs)


def _path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return module_path(list(stack.values())[-1][0]) if stack else ""


def _head(logits: Node) -> Node | None:
    """Return the linear map that makes the logits, if nothing but pointwise operators comes after it."""
    node = logits
    while node.target is not portlm.linear.default:
        inputs = [n for n in node.all_input_nodes if "weight" not in n.meta]
        pointwise = (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.sigmoid.default)
        if node.target not in pointwise or len(inputs) != 1 or len(inputs[0].users) != 1:
            return None
        (node,) = inputs
    return node if len(node.args[0].meta["val"].shape) == 3 else None


def mixing(canonical: Canonical) -> str:
    """Say where one position sees another otherwise than by causal attention; "" if nowhere.

    A value may have the time axis once. It has it twice where positions meet pairwise, and loses it where they are
    summed over. A reshape may not move elements from one position to another.
    """
    graph = canonical.module.graph
    ids = next(n for n in graph.nodes if n.target == "input_ids")
    time = ids.meta["val"].shape[1].node.expr
    if not any(n.target is portlm.attention.default for n in graph.nodes):
        return "it has no causal attention that could keep one"

    def axes(node: Node) -> list[int]:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        return [
            j for j, s in enumerate(sizes) if isinstance(s, torch.SymInt) and time in s.node.expr.free_symbols
        ]

    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        before = [axes(n) for n in node.all_input_nodes]
        after = axes(node)
        if len(after) > 1 or (any(before) and len(after) != 1):
            return f"tokens see each other otherwise than by causal attention, {place(node)}"
        if node.target is aten.reshape.default and after:
            x = node.args[0]
            inner = [_after(n, axes(n)[0]) for n in (x, node)]
            if inner[0] != inner[1]:
                return f"a reshape moves elements from token to token, {place(node)}"
        if node.target is aten.cat.default and after == [node.args[1] % node.meta["val"].dim()]:
            return f"tokens are added to the sequence, {place(node)}"
    return ""


def _after(node: Node, axis: int) -> Any:
    """Return the product of the sizes behind an axis, which is one token's elements if it is the time axis."""
    product: Any = 1
    for size in node.meta["val"].shape[axis + 1 :]:
        product = product * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return product
