"""A key/value cache of 8 bits in place of a model's own: a property of its graphs, made when they are written.

Each state that cached_attention reads and grows becomes two, its numbers and their scales, and each CachedAttention a
QuantizedAttention over them (core/ops/quantized_attention.py).
"""

from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

from torch import fx

from portlm.compile.graph import GraphBuilder
from portlm.compile.trace import Recording, arguments_of, output_nodes
from portlm.errors import UsageError
from portlm.models.roles import Role
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN
from portlm.roles import StateSpec

ATTENTION = "portlm::cached_attention"
SCALE = ".scale"  # behind the name of the numbers


def kept_states(state: StateSpec) -> tuple[StateSpec, ...]:
    """Return what keeps a state: its numbers and their scales, or itself if it does not grow."""
    if not _grows(state):
        return (state,)
    scales = (*state.shape[:-1], 1)
    return (
        StateSpec(state.name, state.output, "int8", state.shape, state.initial, state.update),
        StateSpec(state.name + SCALE, state.output + SCALE, "float32", scales, state.initial, state.update),
    )


def check_recordings(roles: Mapping[str, Role], recordings: Mapping[str, Recording]) -> None:
    """Look whether the states that grow are those of cached_attention, and nothing else's.

    Raises:
        UsageError: one is not, or there is none; the message names it.
    """
    if not any(_grows(state) for role in roles.values() for state in role.state):
        raise UsageError("the model keeps no keys and values from call to call: leave cache out")
    for name, role in roles.items():
        recording = recordings[name]
        given = {node.name: node for node in recording.graph.nodes if node.op == "placeholder"}
        read = dict(zip(recording.inputs[len(role.inputs) :], role.state, strict=True))
        grown = zip(
            output_nodes(recording.graph)[len(role.outputs) :],
            [s for s in role.state if s.output],
            strict=True,
        )
        found = {state.name: _use(node) for node, state in grown}
        for key, state in read.items():
            if _grows(state) and (
                state.dtype != "float32" or found.get(state.name) != _only_read(given[key])
            ):
                raise UsageError(
                    f"{state.name} of {name} cannot be kept in 8 bits: it must be float32 (B, K, P, D), and be read "
                    "and grown by one portlm.ops.cached_attention alone; leave cache out"
                )


def write_attention(
    g: GraphBuilder, fused: bool, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Any]
) -> None:
    """Write what stands for a node CachedAttention.

    Args:
        g: the graph, which has the states as `kept_states` says.
        fused: as a node of ai.portlm, otherwise in standard operators.
        inputs: of the model's node, in the form of the profile.
        outputs: of it.
        attributes: of it.
    """
    *fresh, past_key, past_value, mask = inputs
    out, *present = outputs
    cache, grown = (
        [part for name in names for part in (name, name + SCALE)]
        for names in ((past_key, past_value), present)
    )
    spec = nodes()["QuantizedAttention"]
    if fused:
        default = {a.name: a.default for a in spec.attributes}
        written = {name: value for name, value in attributes.items() if value != default[name]}
        g.split_op(spec.op_type, [*fresh, *cache, mask], out, [out, *grown], domain=DOMAIN, **written)
    else:
        spec.portable(g, [*fresh, *cache, mask], [out, *grown], attributes)


def _grows(state: StateSpec) -> bool:
    return state.update == "append"


def _only_read(placeholder: fx.Node) -> tuple[fx.Node, str] | None:
    """The one cached_attention that reads a state, and as what."""
    users = list(placeholder.users)
    if len(users) != 1 or _operator(users[0]) != ATTENTION or len(placeholder.meta["val"].shape) != 4:
        return None
    names = [name for name, value in arguments_of(users[0]).items() if value is placeholder]
    return (users[0], names[0]) if names in (["past_key"], ["past_value"]) else None


def _use(result: fx.Node) -> tuple[fx.Node, str]:
    """The cached_attention that grows a state, and which of its caches this is."""
    if result.target is getitem and len(result.users) == 1:
        source, place = result.args
        if isinstance(source, fx.Node) and _operator(source) == ATTENTION and place in (1, 2):
            return source, ("past_key", "past_value")[int(place) - 1]  # type: ignore[arg-type]
    return result, ""


def _operator(node: fx.Node) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", "")
