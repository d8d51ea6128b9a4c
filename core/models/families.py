"""The table of families, and what every one of them has.

A new family is a file of its own beside this one, and a row of FAMILIES. Nothing here imports PyTorch, or a family,
until one is asked for.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

from portlm.models.config_json import Reader

if TYPE_CHECKING:
    import torch


class Config(Protocol):
    """What every family's configuration has: a frozen dataclass that checks itself.

    Attributes:
        family: Its key in FAMILIES, and model_type in config.json.
        SETTINGS: Names and defaults of what ``[model]`` of a training run may set.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    family: ClassVar[str]
    SETTINGS: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""

    @property
    def context_length(self) -> int:
        """The longest sequence."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text; not computed with, only kept with the model."""

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS, ``vocab_size`` and ``eos_token_ids``."""

    @classmethod
    def tiny(cls) -> Self:
        """Return a small one for tests, with at least 259 ids."""

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly."""

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json, with ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""


class Model(Protocol):
    """What every family's model has besides what an nn.Module has."""

    training: bool

    @property
    def config(self) -> Any:
        """Its configuration."""

    def __call__(self, input_ids: "torch.Tensor", targets: "torch.Tensor | None" = None, /) -> "torch.Tensor":
        """Return logits (B, T, V), or the mean cross-entropy when targets (B, T) are given, -100 for none."""

    def step(
        self,
        input_ids: "torch.Tensor",
        position_ids: "torch.Tensor",
        attention_mask: "torch.Tensor",
        past: Any = None,
        /,
    ) -> tuple["torch.Tensor", Any]:
        """Continue sequences from a cache: logits (B, T, V) and the next cache. Only decoders have it."""

    def num_parameters(self) -> int:
        """Return the number of parameters, a shared one counted once."""

    def named_parameters(self) -> "Iterator[tuple[str, torch.nn.Parameter]]":
        """Yield every parameter with its name."""

    def parameters(self) -> "Iterator[torch.nn.Parameter]":
        """Yield every parameter."""

    def named_buffers(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield every buffer with its name."""

    def modules(self) -> "Iterator[torch.nn.Module]":
        """Yield the model and every module in it."""

    def state_dict(self) -> "dict[str, torch.Tensor]":
        """Return every tensor by name."""

    def load_state_dict(self, state: "Mapping[str, torch.Tensor]", /) -> Any:
        """Take every tensor by name."""

    def to(self, device: "str | torch.device", /) -> Self:
        """Move to a device."""

    def train(self, mode: bool = True) -> Self:
        """Switch to training."""

    def eval(self) -> Self:
        """Switch to evaluation."""

    @staticmethod
    def hf_name(name: str) -> tuple[str, bool]:
        """Return a parameter's name in Hugging Face's files, and whether it is stored transposed there.

        A model may also have ``hf_split(name)``: the names of several tensors that a parameter is there, in order, and
        the axis along which they lie in it; None for one that is a single tensor. Another may have ``hf_shape(name,
        shape)``: the shape that the same numbers, in the same order, have there.
        """


class Family(NamedTuple):
    """Where a family lives: its module, and the names of its two classes there.

    Attributes:
        module: To import.
        config: The class of its configuration.
        model: The class of its model.
        kind: "decoder" for one that continues a text from a cache, "recurrent" for one that does so from a state of
            fixed size, "encoder" for one that reads a whole text, with heads, "bidirectional" for one that does so with
            a state in each direction, "encoder-decoder" for one that reads a source and writes a target, "prefix" for
            one that does so in a single stack, "vectors" for a table of them that is looked up, "picture" for a decoder
            that is shown one.
        foreign: Whether transformers has such models, too.
        counted: The verb that makes such a model, where none learns by gradients: its numbers are counts of a text.
        begins_as: The family whose checkpoints its parts may begin as, "" for none; ``of`` of its configuration makes
            one from that one's, and its model says what begins as what (``adopted``).
    """

    module: str
    config: str
    model: str
    kind: str = "decoder"
    foreign: bool = True
    counted: str = ""
    begins_as: str = ""

    def config_class(self) -> type[Config]:
        """Import and return the configuration class."""
        found: type[Config] = getattr(importlib.import_module(self.module), self.config)
        return found

    def model_class(self) -> Any:
        """Import and return the model class."""
        return getattr(importlib.import_module(self.module), self.model)

    def presets(self) -> dict[str, Config]:
        """Import and return the published sizes by name."""
        presets: dict[str, Config] = importlib.import_module(self.module).PRESETS
        return presets

    def parameters(self) -> dict[str, int]:
        """Import and return the published number of parameters of each preset."""
        parameters: dict[str, int] = importlib.import_module(self.module).PARAMETERS
        return parameters


# The keys are the values of model_type in config.json, and the only ones that lead to code. The first is the default.
FAMILIES = {
    "gpt2": Family("portlm.models.gpt2", "GPT2Config", "GPT2"),
    "llama": Family("portlm.models.llama", "LlamaConfig", "Llama"),
    "gpt_neox": Family("portlm.models.gpt_neox", "GPTNeoXConfig", "GPTNeoX"),
    "qwen2": Family("portlm.models.qwen2", "Qwen2Config", "Qwen2"),
    "qwen3": Family("portlm.models.qwen3", "Qwen3Config", "Qwen3"),
    "qwen3_moe": Family("portlm.models.qwen3_moe", "Qwen3MoeConfig", "Qwen3Moe"),
    "mistral": Family("portlm.models.mistral", "MistralConfig", "Mistral"),
    "mixtral": Family("portlm.models.mixtral", "MixtralConfig", "Mixtral"),
    "phi3": Family("portlm.models.phi3", "Phi3Config", "Phi3"),
    "stablelm": Family("portlm.models.stablelm", "StableLMConfig", "StableLM"),
    "opt": Family("portlm.models.opt", "OPTConfig", "OPT"),
    "smollm3": Family("portlm.models.smollm3", "SmolLM3Config", "SmolLM3"),
    "olmo2": Family("portlm.models.olmo2", "Olmo2Config", "Olmo2"),
    "gemma2": Family("portlm.models.gemma2", "Gemma2Config", "Gemma2"),
    "gemma3_text": Family("portlm.models.gemma3", "Gemma3Config", "Gemma3"),
    "gpt3": Family("portlm.models.gpt3", "GPT3Config", "GPT3", foreign=False),
    "gpt_neo": Family("portlm.models.gpt_neo", "GPTNeoConfig", "GPTNeo"),
    "openai-gpt": Family("portlm.models.gpt1", "GPT1Config", "GPT1"),
    "llava": Family("portlm.models.llava", "LlavaConfig", "Llava", "picture"),
    "bert": Family("portlm.models.bert", "BertConfig", "Bert", "encoder"),
    "roberta": Family("portlm.models.roberta", "RobertaConfig", "Roberta", "encoder"),
    "distilbert": Family("portlm.models.distilbert", "DistilBertConfig", "DistilBert", "encoder"),
    "marian": Family("portlm.models.transformer", "TransformerConfig", "Transformer", "encoder-decoder"),
    "bart": Family("portlm.models.bart", "BartConfig", "Bart", "encoder-decoder"),
    "t5": Family("portlm.models.t5", "T5Config", "T5", "encoder-decoder"),
    "encoder-decoder": Family(
        "portlm.models.bert_decoder", "BertDecoderConfig", "BertDecoder", "encoder-decoder", begins_as="bert"
    ),
    "unilm": Family("portlm.models.unilm", "UniLMConfig", "UniLM", "prefix", foreign=False),
    "recurrent": Family(
        "portlm.models.recurrent", "RecurrentConfig", "Recurrent", "recurrent", foreign=False
    ),
    "awd_lstm": Family("portlm.models.awd_lstm", "AWDLSTMConfig", "AWDLSTM", "recurrent", foreign=False),
    "elmo": Family("portlm.models.elmo", "ElmoConfig", "Elmo", "bidirectional", foreign=False),
    "nplm": Family("portlm.models.nplm", "NPLMConfig", "NPLM", "recurrent", foreign=False),
    "word_vectors": Family(
        "portlm.models.word_vectors", "WordVectorsConfig", "WordVectors", "vectors", foreign=False
    ),
    "ngram": Family(
        "portlm.models.ngram", "NGramConfig", "NGram", "recurrent", foreign=False, counted="ngram"
    ),
    "seq2seq": Family("portlm.models.seq2seq", "Seq2SeqConfig", "Seq2Seq", "encoder-decoder", foreign=False),
    "bahdanau": Family(
        "portlm.models.bahdanau", "BahdanauConfig", "Bahdanau", "encoder-decoder", foreign=False
    ),
    "luong": Family("portlm.models.luong", "LuongConfig", "Luong", "encoder-decoder", foreign=False),
}
DECODERS = {name: family for name, family in FAMILIES.items() if family.kind == "decoder"}
