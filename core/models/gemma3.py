"""Gemma 3, its language model: Gemma 2 with norms on queries and keys in place of soft caps.

Gemma team, "Gemma 3 Technical Report", 2025 (arXiv:2503.19786).

- RMSNorm on each head of queries and keys, before they are rotated, and no caps
- five layers with a window to one that sees everything, each kind with rotary positions of its own base

B batch, T time, H query heads, K key/value heads, D head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json, config_rope
from portlm.models.gemma2 import FULL, SLIDING, Block, Gemma2, Gemma2Config, Norm
from portlm.models.grouped import Attention
from portlm.models.rope import tables
from portlm.ops.embedding import embedding

_LOCAL = 10000.0  # the base where layers have a window


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """The shape of a Gemma 3 language model. The defaults are transformers'.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "gemma3_text"
    ARCHITECTURE = "Gemma3ForCausalLM"
    THETA = 1e6
    CAPS = (0.0, 0.0)
    TURN = (SLIDING,) * 5 + (FULL,)

    vocab_size: int = 262208
    context_length: int = 131072
    rope_theta: float = 1e6
    layers: tuple[str, ...] = TURN
    score_cap: float = 0.0
    logit_cap: float = 0.0
    local_theta: float = _LOCAL  # of layers with a window

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(self, {"local_theta": (1.0, 1e12)})

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what sets its attention apart; transformers does not look at a cap of its scores."""
        read.require("attn_logit_softcapping")
        turn = read.integer("sliding_window_pattern", 6, also="_sliding_window_pattern")
        found = super().own(read, values)
        if turn != 6 and read.raw("layer_types", "see above") is None:
            raise ConfigError(f"sliding_window_pattern = {turn} is not supported: say it in layer_types")
        return found

    @classmethod
    def read_rotation(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return both bases and the scaling of the layers that see everything.

        Transformers 5 has a block for each kind in rope_parameters, earlier versions keys beside each other.
        """
        context, blocks = (
            values["context_length"],
            read.raw("rope_parameters", "a block for each kind of layer"),
        )
        local = read.optional_number("rope_local_base_freq", f"a number; {_LOCAL:g} if missing")
        if not isinstance(blocks, dict) or not {FULL, SLIDING} & blocks.keys():
            found = config_rope.rotary(read, context, default_base=cls.THETA, kinds=cls.SCALINGS)
            _whole(found)
            return _fields(found, _LOCAL if local is None else local)
        if blocks.keys() - {FULL, SLIDING}:
            raise ConfigError(
                f"rope_parameters = {shown(blocks)} must have a block for {FULL} and one for {SLIDING}"
            )
        full, sliding = ({"rope_parameters": blocks.get(kind)} for kind in (FULL, SLIDING))
        beside = {key: read.raw(key) for key in ("rope_theta", "rope_scaling")}
        full |= {key: value for key, value in beside.items() if value is not None}
        found = config_rope.rotary(
            config_json.Reader(full), context, default_base=cls.THETA, kinds=cls.SCALINGS
        )
        near = config_rope.rotary(config_json.Reader(sliding), context, default_base=_LOCAL, kinds=())
        _whole(found, near)
        if local is not None and local != near.theta:
            raise ConfigError(f"rope_local_base_freq is {local:g}, but that of {SLIDING} is {near.theta:g}")
        return _fields(found, near.theta)

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        data = super().own_to_hf()
        near = {"rope_type": "default", "rope_theta": self.local_theta}
        data["rope_parameters"] = {FULL: data["rope_parameters"], SLIDING: near}
        return data | {"rope_local_base_freq": self.local_theta}


def _whole(*rotations: config_rope.Rotation) -> None:
    if any(rotation.share != 1 for rotation in rotations):
        raise ConfigError("partial_rotary_factor is not supported: only 1 gives the model portlm computes")


def _fields(full: config_rope.Rotation, local: float) -> dict[str, Any]:
    return {"rope_theta": full.theta, "rope_scaling": full.scaling, "local_theta": local}


def _sized(n_layer: int, width: int, hidden: int) -> Gemma3Config:
    return Gemma3Config(
        vocab_size=262144,
        context_length=32768,
        n_layer=n_layer,
        n_head=4,
        n_kv_head=1,
        width=width,
        hidden=hidden,
        window=512,
        bos_token_id=2,
        eos_token_ids=(1,),
        pad_token_id=0,
    )


PRESETS = {"gemma3-270m": _sized(18, 640, 2048), "gemma3-1b": _sized(26, 1152, 6912)}
PARAMETERS = {"gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952}  # of the published files


class NormedAttention(Attention):
    """Attention with a norm on each head of queries and keys."""

    def __init__(self, config: Gemma3Config, **bounds: Any):
        super().__init__(config, **bounds)
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised queries (B, T, H, D) and keys (B, T, K, D), and values (B, T, K, D) of x (B, T, C)."""
        q, k, v = super().project(x)
        return self.q_norm(q, None)[0], self.k_norm(k, None)[0], v


class Gemma3(Gemma2):
    """A Gemma 3 language model."""

    local_cos: Tensor  # (context, D/2), of layers with a window
    local_sin: Tensor

    def rotate_by(self, tables_of_full: tuple[Tensor, Tensor]) -> None:
        """Keep the rotations of both kinds of layers."""
        super().rotate_by(tables_of_full)
        near = tables(self.config.context_length, self.config.head_dim, self.config.local_theta)
        for name, table in zip(("local_cos", "local_sin"), near, strict=True):
            self.register_buffer(name, table, persistent=False)

    def carried(self, tokens: int, position_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Return the rotations of layers that see everything, and then of those with a window."""
        near = self.local_cos, self.local_sin
        if position_ids is None:
            return *super().carried(tokens, position_ids), *(table[:tokens] for table in near)
        return *super().carried(tokens, position_ids), *(embedding(position_ids, table) for table in near)

    def block(self, config: Any, layer: int) -> nn.Module:
        """Return a layer."""
        attention = NormedAttention(config, **self.bounds(config, layer))
        return Block(config, attention, int(config.kinds[layer] == SLIDING))
