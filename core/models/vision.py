"""A vision transformer: what a picture looks like, patch by patch (Dosovitskiy et al., 2020, arXiv:2010.11929).

As CLIP has it (Radford et al., 2021, arXiv:2103.00020): square patches go through one matrix, a learned vector for the
whole picture comes before them, every place has a learned position, and a LayerNorm stands before the layers. Those are
GPT-2's with its norms in front, and without a mask. What a model in front of which this stands reads is the stream
behind a layer, not normalised, so there are as many layers here as it needs, and none behind.

B pictures, G patches along a side, p pixels along a side of a patch, N = G² + 1 places, C width, H heads, D = C / H.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from portlm.errors import ConfigError, UsageError
from portlm.files import shown
from portlm.models import config_json
from portlm.models.layers import Embedding, LayerNorm, Linear
from portlm.ops.gelu_mlp import gelu_mlp
from portlm.ops.masked_attention import masked_attention

CHANNELS = 3  # red, green and blue
QUICK_GELU = "quick_gelu"
_BOUNDS = {
    "image_size": (1, 4096),
    "patch_size": (1, 4096),
    "n_layer": (0, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "layer_norm_eps": (1e-12, 0.1),
    "init_std": (0.0, 1.0),
}
MAX_PATCHES = 1 << 14


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a vision transformer. The defaults are CLIP's ViT-L/14 for 336 pixels, up to its last layer but one.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width, or patches that do not fill the picture.
    """

    MODEL_TYPE: ClassVar[str] = "clip_vision_model"
    ACTIVATIONS: ClassVar[Mapping[str, str]] = {QUICK_GELU: QUICK_GELU, **config_json.GELU}

    image_size: int = 336  # pixels along a side of a picture
    patch_size: int = 14
    n_layer: int = 23
    n_head: int = 16
    width: int = 1024
    hidden: int = 4096
    activation: str = QUICK_GELU  # x sigmoid(1.702 x), or GELU: "none" for the exact form, "tanh"
    layer_norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head:
            raise ConfigError(f"vision width {self.width} must be a multiple of n_head {self.n_head}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if self.patches > MAX_PATCHES:
            raise ConfigError(
                f"image_size {self.image_size} with patch_size {self.patch_size} makes {self.patches} patches, at most "
                f"{MAX_PATCHES} are allowed"
            )
        if self.activation not in self.ACTIVATIONS.values():
            known = ", ".join(dict.fromkeys(self.ACTIVATIONS.values()))
            raise ConfigError(f"activation must be one of {known}, got {self.activation!r}")

    @property
    def patches(self) -> int:
        """G²."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def places(self) -> int:
        """N: the patches, and the vector for the whole picture before them."""
        return self.patches + 1

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader, layer: int) -> Self:
        """Read ``vision_config`` of a config.json, strictly.

        Args:
            data: Its contents, or a reader of them.
            layer: Which of the streams before, between and behind the layers is read, as transformers counts them: 0
                is the one before all layers, -1 the last.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.MODEL_TYPE)
        read.require("num_channels", CHANNELS)
        layers = read.integer("num_hidden_layers", 12)
        if not -layers - 1 <= layer <= layers:
            raise ConfigError(
                f"vision_feature_layer {shown(layer)} does not exist: num_hidden_layers is {shown(layers)}"
            )
        read.training("attention_dropout", 0.0)
        config = cls(
            image_size=read.integer("image_size", 224),
            patch_size=read.integer("patch_size", 32),
            n_layer=layer if layer >= 0 else layer + layers + 1,
            n_head=read.integer("num_attention_heads", 12),
            width=read.integer("hidden_size", 768),
            hidden=read.integer("intermediate_size", 3072),
            activation=read.choice("hidden_act", QUICK_GELU, cls.ACTIVATIONS),
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
            init_std=read.number("initializer_range", 0.02),
        )
        read.finish("initializer_factor", "projection_dim", "vocab_size")
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return ``vision_config`` of a config.json; its last stream is the one that is read."""
        activation = next(key for key, value in self.ACTIVATIONS.items() if value == self.activation)
        return {
            "model_type": self.MODEL_TYPE,
            "num_channels": CHANNELS,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "hidden_act": activation,
            "layer_norm_eps": self.layer_norm_eps,
            "initializer_range": self.init_std,
        }


class Layer(nn.Module):
    """Attention among all places, then a two-layer perceptron; a LayerNorm before each, which adds what came before."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.width
        self.n_head, self.activation = config.n_head, config.activation
        self.layer_norm1, self.layer_norm2 = (LayerNorm(C, config.layer_norm_eps) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(C, C, bias=True) for _ in range(4))
        self.fc1, self.fc2 = Linear(C, config.hidden, bias=True), Linear(config.hidden, C, bias=True)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map (x, h), both (B, N, C), to the same for the next layer; h is None before the first, as in GPT-2."""
        y, h = self.layer_norm1(x, h)
        q, k, v = (
            part(y).view(*x.shape[:2], self.n_head, -1) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        y, h = self.layer_norm2(self.out_proj(masked_attention(q, k, v).flatten(2)), h)
        return self._mlp(y), h

    def _mlp(self, x: Tensor) -> Tensor:
        if self.activation == QUICK_GELU:
            y = self.fc1(x)
            return self.fc2(y * torch.sigmoid(y * 1.702))
        up, down = self.fc1, self.fc2
        return gelu_mlp(x, up.weight, up.bias, down.weight, down.bias, approximate=self.activation)


class Vision(nn.Module):
    """A vision transformer with uninitialised weights."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config, C = config, config.width
        self.whole = nn.Parameter(torch.empty(1, C))  # what stands before the patches
        self.patches = Linear(CHANNELS * config.patch_size**2, C, bias=False)
        self.positions = Embedding(config.places, C)
        self.norm = LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.n_layer)])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the stream behind the last layer, (B, N, C), the whole picture first.

        Args:
            pixels: (B, 3, image_size, image_size) float32, normalised.

        Raises:
            UsageError: They have another shape.
        """
        side, p = self.config.image_size, self.config.patch_size
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (CHANNELS, side, side):
            raise UsageError(
                f"pixel_values must be (pictures, {CHANNELS}, {side}, {side}), got {tuple(pixels.shape)}"
            )
        B, G = len(pixels), side // p
        x = pixels.view(B, CHANNELS, G, p, G, p).permute(0, 2, 4, 1, 3, 5)  # (B, G, G, 3, p, p)
        x = self.patches(x.reshape(B, G * G, CHANNELS * p * p))  # (B, N - 1, C)
        first = x.select(1, 0).unsqueeze(1) * 0.0 + self.whole  # (B, 1, C): a graph has no copies by batch
        x = torch.cat((first, x), dim=1) + self.positions.weight
        (x, _), h = self.norm(x, None), None
        for layer in self.layers:
            x, h = layer(x, h)
        return x if h is None else x + h
