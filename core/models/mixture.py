"""What decoders with routed experts share: LLaMA's shape, in which a router sends each token through a few perceptrons.

Shazeer et al., "Outrageously Large Neural Networks", 2017 (arXiv:1701.06538). The loss that keeps experts equally busy
is that of Fedus et al., "Switch Transformers", 2021 (arXiv:2101.03961), equations 4 to 6, over all routed layers
together, as transformers computes it.

B batch, T time, C width, E experts, F inner width of each, k of them for each token, P slots already in the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.grouped import Block, Grouped
from portlm.models.grouped_config import GroupedConfig
from portlm.models.layers import KeyValue, Linear, check_length
from portlm.ops.experts import choose_experts, experts
from portlm.ops.linear import linear

MAX_EXPERTS = 1024


@dataclass(frozen=True)
class MixtureConfig(GroupedConfig):
    """The shape of such a decoder.

    Attributes:
        EXPERTS: The keys that config.json may have for the number of experts, the first of which is written.
        HIDDEN: The field that holds the inner width of an expert.

    Raises:
        ConfigError: A value out of range, by name, or more experts for a token than there are.
    """

    EXPERTS: ClassVar[tuple[str, str]]
    HIDDEN: ClassVar[str] = "hidden"
    SETTINGS: ClassVar[dict[str, Any]] = GroupedConfig.SETTINGS | {
        "n_expert": 4,
        "experts_per_token": 2,
        "router_aux_loss_coef": 0.01,  # of the loss that keeps experts equally busy; 0 for none
    }

    n_expert: int = 8
    experts_per_token: int = 2
    output_router_logits: bool = False  # whether training adds the loss that keeps experts equally busy
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(
            self,
            {
                "n_expert": (1, MAX_EXPERTS),
                "experts_per_token": (1, MAX_EXPERTS),
                "router_aux_loss_coef": (0.0, 1e6),
                self.HIDDEN: (1, config_json.MAX_HIDDEN),
            },
        )
        if self.experts_per_token > self.n_expert:
            raise ConfigError(
                f"experts_per_token {self.experts_per_token} must be at most n_expert {self.n_expert}"
            )

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token's experts add up to 1."""
        return True

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary; 0 stands for what follows from others.

        The inner width of an expert follows so that a token's experts are as wide together as one perceptron would be.

        Raises:
            ConfigError: A value out of range, by name.
        """
        together = -(-8 * values["width"] // 3)
        each = -(-together // max(1, values["experts_per_token"]) // 32) * 32
        balanced = {"output_router_logits": values["router_aux_loss_coef"] > 0}
        return super().from_settings(**values | balanced | {cls.HIDDEN: values[cls.HIDDEN] or each})

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return how many experts there are and how they are trained, and what all descendants have."""
        defaults: dict[str, Any] = {name: field.default for name, field in cls.__dataclass_fields__.items()}
        key, also = cls.EXPERTS
        found = {
            "n_expert": read.integer(key, defaults["n_expert"], also=also),
            "experts_per_token": read.integer("num_experts_per_tok", defaults["experts_per_token"]),
            "output_router_logits": read.boolean("output_router_logits", False),
            "router_aux_loss_coef": read.number("router_aux_loss_coef", defaults["router_aux_loss_coef"]),
        }
        return super().own(read, values) | found

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {
            self.EXPERTS[0]: self.n_expert,
            "num_experts_per_tok": self.experts_per_token,
            "output_router_logits": self.output_router_logits,
            "router_aux_loss_coef": self.router_aux_loss_coef,
        }


class Experts(nn.Module):
    """The matrices of E gated perceptrons, those of one kind side by side."""

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, count * hidden, bias=False, maps=count)
        self.up_proj = Linear(width, count * hidden, bias=False, maps=count)
        self.down_proj = Linear(count * hidden, width, bias=False, maps=count, across=True)


class RoutedMLP(nn.Module):
    """A mixture of experts in the place of a perceptron."""

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.top_k, self.normalizes = config.experts_per_token, config.normalizes
        self.balanced = config.output_router_logits
        self.gate = Linear(config.width, config.n_expert, bias=False)
        self.experts = Experts(config.n_expert, config.width, getattr(config, config.HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        gate, up, down = self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj
        return experts(x, self.gate.weight, gate.weight, up.weight, down.weight, self.top_k, self.normalizes)

    def logits(self, x: Tensor) -> Tensor:
        """Return the router's logits (B, T, E)."""
        return linear(x, self.gate.weight)


class RoutedBlock(Block):
    """A layer that says, while it trains without a cache, what its router thinks."""

    mlp: RoutedMLP

    def forward(
        self,
        x: Tensor,
        h: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Map (x, h), both (B, T, C), to the same for the next layer; the third is the cache, or router logits."""
        y, h = self.input_layernorm(x, h)
        x, present = self.self_attn(y, cos, sin, mask, past)
        y, h = self.post_attention_layernorm(x, h)
        thinks = self.training and self.mlp.balanced and past is None
        return self.mlp(y), h, self.mlp.logits(y) if thinks else present


def load_balancing(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Return E times the sum over experts of the share of tokens that chose it and its mean probability.

    It is k where all experts are equally busy, and larger otherwise.

    Args:
        logits: (..., E) of each routed layer.
        top_k: k.
    """
    rows = torch.cat([layer.flatten(0, -2) for layer in logits])
    chosen, _ = choose_experts(rows.detach(), top_k, True)
    shares = torch.zeros_like(rows).scatter(-1, chosen, 1.0).mean(0)
    return rows.shape[-1] * (shares * rows.softmax(-1).mean(0)).sum()


class Mixture(Grouped):
    """A decoder with routed experts; a family says which layers have them.

    Attributes:
        ROUTED: What a routed layer's perceptron is called in Hugging Face's files.
        MATRICES: What they call an expert's matrices.
    """

    ROUTED: ClassVar[str] = "mlp"
    MATRICES: ClassVar[dict[str, str]] = {name: name for name in ("gate_proj", "up_proj", "down_proj")}

    def is_routed(self, config: Any, layer: int) -> bool:
        """Say whether a layer has experts."""
        return True

    def block(self, config: Any, layer: int) -> nn.Module:
        """Return a layer."""
        if not self.is_routed(config, layer):
            return super().block(config, layer)
        norms = self.layer_norm(config), self.layer_norm(config)
        return RoutedBlock(norms, self.attention(config, layer), RoutedMLP(config))

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return logits or the loss, see :class:`Causal`; in training with the loss that keeps experts equally busy."""
        if targets is None or not self.training or not self.config.output_router_logits:
            return super().forward(input_ids, targets, position_ids, bias)
        check_length(input_ids.shape[1], self.config.context_length)
        y, thoughts = self._decode(input_ids, position_ids, bias)
        loss = self.loss(y, targets)
        routed: list[Any] = [layer for layer in thoughts if layer is not None]
        if not routed:
            return loss
        return loss + self.config.router_aux_loss_coef * load_balancing(routed, self.config.experts_per_token)

    @classmethod
    def hf_name(cls, name: str) -> tuple[str, bool]:
        """Return a parameter's name in Hugging Face's words, and whether it is stored transposed there."""
        found, transposed = super().hf_name(name)
        before, experts, matrix = found.partition(".mlp.experts.")
        if experts:
            kind, _, rest = matrix.partition(".")
            return f"{before}.{cls.ROUTED}.experts.{cls.MATRICES[kind]}.{rest}", transposed
        return found.replace(".mlp.gate.", f".{cls.ROUTED}.gate."), transposed

    def hf_split(self, name: str) -> tuple[tuple[str, ...], int] | None:
        """Return the tensors that a parameter is in files, one for each expert, and the axis along which they lie."""
        if ".experts." not in name:
            return None
        found = self.hf_name(name)[0]
        names = (found.replace(".experts.", f".experts.{expert}.") for expert in range(self.config.n_expert))
        return tuple(names), int(".down_proj." in name)

    @classmethod
    def hf_alias(cls, name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file; transformers 5 calls all perceptrons mlp in memory."""
        found = super().hf_alias(name)
        for part in (".gate.", ".experts."):
            found = None if found is None else found.replace(f".mlp{part}", f".{cls.ROUTED}{part}")
        return found

    @classmethod
    def hf_apart(cls, config: Any, name: str, shape: tuple[int, ...]) -> list[tuple[str, int, int]] | None:
        """Return the tensors that one of transformers 5 holds, as it has them in memory: names, first row, rows.

        They are gate_up_proj (E, 2 F, C) and down_proj (E, C, F), seen as rows of their last axis. None for others.
        """
        before, _, kind = name.rpartition(".experts.")
        if len(shape) != 3 or shape[0] != config.n_expert or kind not in ("gate_up_proj", "down_proj"):
            return None
        gate, up, down = cls.MATRICES.values()
        parts = (gate, up) if kind == "gate_up_proj" else (down,)
        rows = shape[1] // len(parts)
        return [
            (f"{before}.experts.{expert}.{part}.weight", expert * shape[1] + place * rows, rows)
            for expert in range(config.n_expert)
            for place, part in enumerate(parts)
        ]
