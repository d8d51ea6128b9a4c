"""The configuration of LLaVA; what it computes is in llava.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Self

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.llama import LlamaConfig
from portlm.models.vision import VisionConfig

WHOLE = {
    "default": False,
    "full": True,
}  # whether the place of the whole picture is kept, in transformers' words


@dataclass(frozen=True)
class LlavaConfig(LlamaConfig):
    """The shape of a LLaVA: that of its LLaMA, and what stands before it. The defaults are LLaVA-1.5-7B.

    Raises:
        ConfigError: As of LlamaConfig and VisionConfig; or a picture that leaves no room in the context.
    """

    family = "llava"
    ARCHITECTURE = "LlavaForConditionalGeneration"
    SETTINGS: ClassVar[dict[str, Any]] = LlamaConfig.SETTINGS | {
        "image_size": 32,  # pixels along a side of a picture
        "patch_size": 8,
        "vision_layers": 2,
        "vision_heads": 4,
        "vision_width": 64,
    }

    vocab_size: int = 32064
    context_length: int = 4096
    rms_norm_eps: float = 1e-5
    vision: VisionConfig = field(default_factory=VisionConfig)
    whole_picture: bool = False  # whether the vector for the whole picture is read, too, before the patches
    projector_bias: bool = True
    image_token_id: int = 32000  # which stands for a picture in a text

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_token_ids(self, "image_token_id")
        if self.places >= self.context_length:
            raise ConfigError(
                f"context_length {self.context_length} leaves no room for a text behind the {self.places} places of a "
                "picture: give a longer one, a smaller image_size or a larger patch_size"
            )

    @property
    def places(self) -> int:
        """P."""
        return self.vision.patches + self.whole_picture

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration of a model to train; its last id stands for a picture."""
        width = values.pop("vision_width")
        vision = VisionConfig(
            image_size=values.pop("image_size"),
            patch_size=values.pop("patch_size"),
            n_layer=values.pop("vision_layers"),
            n_head=values.pop("vision_heads"),
            width=width,
            hidden=4 * width,
        )
        return super().from_settings(vision=vision, image_token_id=values["vocab_size"] - 1, **values)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes and a token for a picture."""
        vision = VisionConfig(image_size=6, patch_size=3, n_layer=2, n_head=2, width=12, hidden=20)
        text = LlamaConfig.tiny()
        return cls(**vars(text) | {"vocab_size": 260, "vision": vision, "image_token_id": 259})

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.family)
        layer = read.integer("vision_feature_layer", -2)
        text = read.part("text_config", LlamaConfig.from_hf, model_type=LlamaConfig.family)
        vision = read.part("vision_config", partial(VisionConfig.from_hf, layer=layer))
        read.require("projector_hidden_act", "gelu")
        ids = {
            key: read.token_ids(key, text.vocab_size)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        bos, pad = (
            next(iter(ids[key]), None) if own is None else own
            for key, own in (("bos_token_id", text.bos_token_id), ("pad_token_id", text.pad_token_id))
        )
        values = vars(text) | {
            "tie_embeddings": read.boolean("tie_word_embeddings", False) or text.tie_embeddings,
            "bos_token_id": bos,
            "eos_token_ids": text.eos_token_ids or ids["eos_token_id"],
            "pad_token_id": pad,
            "vision": vision,
            "whole_picture": read.choice("vision_feature_select_strategy", "default", WHOLE),
            "projector_bias": read.boolean("multimodal_projector_bias", True),
            "image_token_id": read.integer("image_token_index", 32000, also="image_token_id"),
        }
        config = cls(**values)
        read.require("image_seq_length", config.places, says="the places of a picture")
        read.finish("ignore_index")
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as ARCHITECTURE."""
        text = LlamaConfig(**{each.name: getattr(self, each.name) for each in fields(LlamaConfig)})
        return {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.family,
            "text_config": text.to_hf(),
            "vision_config": self.vision.to_hf(),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full" if self.whole_picture else "default",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": self.projector_bias,
            "image_token_index": self.image_token_id,
            "image_seq_length": self.places,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
