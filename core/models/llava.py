"""LLaVA: a LLaMA that is shown a picture among its tokens.

Liu et al., "Visual Instruction Tuning", 2023 (arXiv:2304.08485), and "Improved Baselines with Visual Instruction
Tuning" (arXiv:2310.03744), whose projector has two layers. The way in which GPT-4 (OpenAI, 2023, arXiv:2303.08774)
takes pictures was not published; this is the smallest model that does.

- a vision transformer (vision.py) says what each patch of a picture looks like
- a projector of two linear maps with GELU between them turns that into vectors as wide as a token's
- those stand in the place of tokens, one after the other, and the LLaMA behind reads them as it reads tokens

A picture is seen once, by the role `see`. The decoder is given what that made of it, as a state that does not change,
and for each of its tokens which row of the picture stands in its place (portlm.rows).

B batch, T time, C width, P places of a picture, V vocabulary.
"""

import re
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.models.layers import KeyValue, Linear, check_length
from portlm.models.llama import Llama
from portlm.models.llava_config import LlavaConfig
from portlm.models.roles import Role, decoder
from portlm.models.vision import CHANNELS, Vision
from portlm.ops.embedding import embedding
from portlm.roles import StateSpec, TensorSpec
from portlm.rows import PICTURE, PICTURE_IDS

PIXELS = "pixel_values"

PRESETS = {
    "llava-1.5-7b": LlavaConfig(),
    "llava-1.5-13b": LlavaConfig(n_layer=40, n_head=40, n_kv_head=40, width=5120, hidden=13824),
}
PARAMETERS = {  # of the published files, less 12,598,272 of the layer and the norm that no picture goes through
    "llava-1.5-7b": 7_050_828_800,
    "llava-1.5-13b": 13_338_896_384,
}


class Projector(nn.Module):
    """Two linear maps with GELU between them, place by place."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        C, bias = config.width, config.projector_bias
        self.linear_1 = Linear(config.vision.width, C, bias=bias)
        self.linear_2 = Linear(C, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, P, width of the vision transformer) to (B, P, C)."""
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(Llama):
    """A LLaVA with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    SPARE_PARTS: ClassVar[str] = "layers"  # what tensors belong to that hf_spare names
    config: LlavaConfig
    vision: Vision
    projector: Projector
    # Not saved, as they follow from the configuration. Row 0 is a token's, row i is of place i - 1 of a picture.
    places: Tensor  # (P + 1, P): 1 where the place is
    tokens: Tensor  # (P + 1, 1): 1 of a token

    def __init__(self, config: LlavaConfig, *, init: bool = True):
        super().__init__(config, init=False)
        first = torch.zeros(1, config.places)
        self.register_buffer("places", torch.cat((first, torch.eye(config.places))), persistent=False)
        self.register_buffer("tokens", torch.cat((torch.ones(1, 1), first.t())), persistent=False)
        if init:
            self.init_weights()

    def in_front(self, config: LlavaConfig) -> tuple[tuple[str, nn.Module], ...]:
        """Return what pictures go through."""
        return ("vision", Vision(config.vision)), ("projector", Projector(config))

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, pixels: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V), or the mean cross-entropy when targets are given.

        Args:
            input_ids: (B, T) int64; config.image_token_id P times, one behind the other, where the picture stands.
            targets: (B, T) int64, the token that follows each input; -100 where there is none to predict.
            pixels: (B, 3, image_size, image_size), a picture for each row; None for texts alone.

        Raises:
            ContextLengthError: T is larger than the context.
            UsageError: The pixels have another shape.
        """
        check_length(input_ids.shape[1], self.config.context_length)
        x = self.embed(input_ids, None)
        if pixels is not None:
            shown = input_ids == self.config.image_token_id
            x = self.shown(x, (shown.cumsum(1) * shown).clamp(max=self.config.places), self.see(pixels))
        y, _ = self._through(x)
        return self.logits(y) if targets is None else self.loss(y, targets)

    def see(self, pixels: Tensor) -> Tensor:
        """Return what stands for pictures (B, 3, image_size, image_size) among tokens, (B, P, C).

        Raises:
            UsageError: They have another shape.
        """
        x = self.vision(pixels)
        if not self.config.whole_picture:
            _, x = x.split((1, self.config.vision.patches), dim=1)
        return self.projector(x)

    def shown(self, x: Tensor, picture_ids: Tensor, picture: Tensor) -> Tensor:
        """Return what was embedded, (B, T, C), with rows of pictures in the place of tokens.

        A row is chosen by a product with a row of ones and zeros, which is exact and the same on every engine.

        Args:
            x: (B, T, C).
            picture_ids: (B, T) int64, 0 where x stays, i for row i - 1 of the picture.
            picture: (B, P, C).
        """
        return x * embedding(picture_ids, self.tokens) + embedding(picture_ids, self.places) @ picture

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[KeyValue] | None = None,
        logits_to_keep: Tensor | None = None,
        picture_ids: Tensor | None = None,
        picture: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Continue sequences whose P earlier slots are in the cache, as Causal.step does, with a picture or without.

        Args:
            input_ids: (B, T) int64; what stands where a picture's row is has no effect.
            position_ids: (B, T) int64.
            attention_mask: (B, P + T) int64.
            past: Of each layer.
            logits_to_keep: (kept,) int64.
            picture_ids: (B, T) int64, as of :meth:`shown`; None for tokens alone.
            picture: (B, P, C), as :meth:`see` returns it.

        Returns:
            Logits (B, kept, V), and the cache with the new slots.

        Raises:
            ContextLengthError: There are more slots than the context holds.
        """
        if picture_ids is None or picture is None:
            return super().step(input_ids, position_ids, attention_mask, past, logits_to_keep)
        check_length(attention_mask.shape[1], self.config.context_length)
        past = self.no_past(len(input_ids)) if past is None else past
        x = self.shown(self.embed(input_ids, position_ids), picture_ids, picture)
        y, present = self._through(x, position_ids, attention_mask, past)
        return self.logits(y if logits_to_keep is None else y.index_select(1, logits_to_keep)), present

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: it sees a picture, and continues a text with the picture in it."""
        config = self.config
        side, rows = config.vision.image_size, ("batch", config.places, config.width)
        see = Role(
            lambda pixels: (self.see(pixels),),
            (TensorSpec(PIXELS, "float32", ("batch", CHANNELS, side, side)),),
            (TensorSpec(PICTURE, "float32", rows),),
        )
        write = decoder(
            self.step,
            vocab_size=config.vocab_size,
            caches=[(config.n_kv_head, config.head_dim)] * config.n_layer,
            more=(TensorSpec(PICTURE_IDS, "int64", ("batch", "sequence"), below=config.places + 1),),
            given=(StateSpec(PICTURE, "", "float32", rows, "given", "constant"),),
        )
        return {"see": see, "decoder": write}

    def std(self, name: str, parameter: Tensor) -> float:
        """Return the spread of a fresh matrix (out, in)."""
        return self.config.vision.init_std if name.startswith("vision.") else super().std(name, parameter)

    def hf_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a parameter has in Hugging Face's files: patches go through a convolution there."""
        p = self.config.vision.patch_size
        return {"vision.patches.weight": (shape[0], CHANNELS, p, p), "vision.whole": shape[-1:]}.get(
            name, shape
        )

    @classmethod
    def hf_name(cls, name: str) -> tuple[str, bool]:
        """Return a parameter's name in Hugging Face's files, and whether it is stored transposed there."""
        if name.startswith("projector."):
            return f"multi_modal_{name}", False
        if name.startswith("vision."):
            return _TOWER + _named(name.removeprefix("vision.")), False
        return f"language_model.{super().hf_name(name)[0]}", False

    @classmethod
    def hf_alias(cls, name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter."""
        for pattern, usual in _SPELLINGS:
            name = pattern.sub(usual, name)
        return None if name.endswith((*cls.CONSTANTS, ".embeddings.position_ids")) else name

    @staticmethod
    def hf_spare(name: str) -> bool:
        """Say whether a tensor is of a part that a file may hold and that no picture goes through."""
        return name.startswith((f"{_TOWER}encoder.layers.", f"{_TOWER}post_layernorm."))

    @classmethod
    def hf_tied(cls, config: LlavaConfig) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice."""
        return {cls.hf_alias(copy): cls.hf_alias(name) for copy, name in super().hf_tied(config).items()}  # type: ignore[misc]


_TOWER = "vision_tower.vision_model."
_NAMES = {  # of the vision transformer, here and in the files
    "whole": "embeddings.class_embedding",
    "patches": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding",
    "norm": "pre_layrnorm",
}
_PARTS = {
    "mlp.": ("fc1", "fc2"),
    "self_attn.": ("q_proj", "k_proj", "v_proj", "out_proj"),
}  # of a layer there
# Files of other versions of transformers call the parts of the model by these names.
_SPELLINGS = tuple(
    (re.compile(pattern), usual)
    for pattern, usual in (
        (r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
        (r"^vision_tower\.(?!vision_model\.)", _TOWER),
        (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
        (r"^(lm_head|model)\.", r"language_model.\1."),
    )
)


def _named(name: str) -> str:
    """The name of a parameter of the vision transformer in Hugging Face's files, without what stands before it."""
    first, _, rest = name.partition(".")
    if first == "layers":
        number, _, inside = rest.partition(".")
        part = next((part for part, modules in _PARTS.items() if inside.partition(".")[0] in modules), "")
        return ".".join(part for part in ("encoder.layers", number, f"{part}{inside}") if part)
    return ".".join(part for part in (_NAMES.get(first, first), rest) if part)
