"""A toy of BERT's kind, to train with the masked objective: every position sees every other.

It is also the smallest family there can be: this file and one line in the table of families.

B rows, T positions, C width, H heads, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from portlm.models import Family, config_json
from portlm.models.layers import Embedding, LayerNorm, Linear
from portlm.ops.attention import attention_qkv
from portlm.ops.linear import linear
from portlm.ops.linear_cross_entropy import linear_cross_entropy

NAME = "toy-encoder"
FAMILY = Family("toy_encoder", "ToyConfig", "ToyEncoder")  # this file must be importable by its name


@dataclass(frozen=True)
class ToyConfig:
    family: ClassVar[str] = NAME
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 1,
        "n_head": 2,
        "width": 16,
        "context_length": 16,
        "dropout": 0.0,
    }

    vocab_size: int = 259
    context_length: int = 16
    n_layer: int = 1
    n_head: int = 2
    width: int = 16
    dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        config_json.check_bounds(
            self, dict.fromkeys(("n_layer", "n_head", "width", "context_length"), (1, 4096))
        )

    @classmethod
    def from_settings(cls, **values):
        return cls(**values)

    @classmethod
    def tiny(cls):
        return cls()

    @classmethod
    def from_hf(cls, data):
        read = config_json.Reader.of(data)
        read.require("model_type", NAME)
        numbers = {name: read.integer(name) for name in ("vocab_size", *cls.SETTINGS) if name != "dropout"}
        eos = read.token_ids("eos_token_id", numbers["vocab_size"])
        config = cls(**numbers, dropout=read.number("dropout"), eos_token_ids=eos)
        read.finish("bos_token_id", "pad_token_id")
        return config

    def to_hf(self):
        data = asdict(self) | {
            "model_type": NAME,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
        }
        del data["eos_token_ids"]
        return data


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.width
        self.n_head, self.dropout = config.n_head, config.dropout
        self.norm1, self.norm2 = LayerNorm(C, 1e-5), LayerNorm(C, 1e-5)
        self.qkv, self.out = Linear(C, 3 * C, bias=True), Linear(C, C, bias=True)
        self.up, self.down = Linear(C, 4 * C, bias=True), Linear(4 * C, C, bias=True)

    def forward(self, x):
        B, T, C = x.shape
        y = attention_qkv(self.qkv(self.norm1(x, None)[0]), self.n_head, causal=False).reshape(B, T, C)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x, None)[0]))), self.dropout, self.training)


class ToyEncoder(nn.Module):
    def __init__(self, config, *, init=True):
        super().__init__()
        self.config = config
        self.tokens, self.positions = (
            Embedding(rows, config.width) for rows in (config.vocab_size, config.context_length)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.width, 1e-5)
        if init:
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
                else:
                    nn.init.normal_(parameter, 0.0, 0.02)

    def forward(self, input_ids, targets=None):
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        y, _ = self.norm(x, None)
        if targets is None:
            return linear(y, self.tokens.weight)  # (B, T, V)
        return linear_cross_entropy(y.flatten(0, 1), self.tokens.weight, targets.flatten())

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    @staticmethod
    def hf_name(name):
        return name, False
