"""Model families, one file each, and the checkpoint folder they share.

A checkpoint folder holds config.json, generation_config.json and model.safetensors exactly as Hugging Face's
transformers would write them, so it opens there as it is if there are such models. Names, orientations and keys are
translated by the family's own file; this one reads, checks and writes.

Nothing here imports PyTorch until a model is asked for.
"""

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np

from portlm.errors import ConfigError, FormatError, StorageError
from portlm.files import read_json, shown, write_atomic
from portlm.models.config_json import Reader
from portlm.weights import TensorInfo, load_numpy, read_header, save_tensors

if TYPE_CHECKING:
    import torch

CONFIG, GENERATION_CONFIG, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
HALVES = ("F16", "BF16")  # number formats of 16 bits, in safetensors' spelling
FLOATS = ("F32", *HALVES)  # of a checkpoint
IMPORTED = (*FLOATS, "F64")  # of what `portlm import` takes
_MAX_CONFIG_BYTES = 1 << 20


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
        """Return a parameter's name in Hugging Face's files, and whether it is stored transposed there."""


class Family(NamedTuple):
    """Where a family lives: its module, and the names of its two classes there.

    Attributes:
        module: To import.
        config: The class of its configuration.
        model: The class of its model.
        kind: "decoder" for one that continues a text from a cache, "recurrent" for one that does so from a state of
            fixed size, "encoder" for one that reads a whole text, with heads, "bidirectional" for one that does so with
            a state in each direction, "encoder-decoder" for one that reads a source and writes a target.
        foreign: Whether transformers has such models, too.
    """

    module: str
    config: str
    model: str
    kind: str = "decoder"
    foreign: bool = True

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
    "mistral": Family("portlm.models.mistral", "MistralConfig", "Mistral"),
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
    "bert": Family("portlm.models.bert", "BertConfig", "Bert", "encoder"),
    "roberta": Family("portlm.models.roberta", "RobertaConfig", "Roberta", "encoder"),
    "distilbert": Family("portlm.models.distilbert", "DistilBertConfig", "DistilBert", "encoder"),
    "marian": Family("portlm.models.transformer", "TransformerConfig", "Transformer", "encoder-decoder"),
    "bart": Family("portlm.models.bart", "BartConfig", "Bart", "encoder-decoder"),
    "t5": Family("portlm.models.t5", "T5Config", "T5", "encoder-decoder"),
    "recurrent": Family(
        "portlm.models.recurrent", "RecurrentConfig", "Recurrent", "recurrent", foreign=False
    ),
    "awd_lstm": Family("portlm.models.awd_lstm", "AWDLSTMConfig", "AWDLSTM", "recurrent", foreign=False),
    "elmo": Family("portlm.models.elmo", "ElmoConfig", "Elmo", "bidirectional", foreign=False),
    "nplm": Family("portlm.models.nplm", "NPLMConfig", "NPLM", "recurrent", foreign=False),
    "seq2seq": Family("portlm.models.seq2seq", "Seq2SeqConfig", "Seq2Seq", "encoder-decoder", foreign=False),
    "bahdanau": Family(
        "portlm.models.bahdanau", "BahdanauConfig", "Bahdanau", "encoder-decoder", foreign=False
    ),
}
DECODERS = {name: family for name, family in FAMILIES.items() if family.kind == "decoder"}


class SavesTokenizer(Protocol):
    """What :func:`save_model` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of ids it can produce."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""

    def save(self, folder: Path) -> Any:
        """Write tokenizer.json and what belongs to it."""


def preset(name: str) -> Config:
    """Return the configuration of a published model such as ``gpt2-medium`` or ``llama3-8b``.

    Raises:
        ConfigError: There is no such preset. The message lists them.
    """
    presets = {name: config for family in FAMILIES.values() for name, config in family.presets().items()}
    if name not in presets:
        raise ConfigError(f"there is no preset {shown(name)}: choose one of {', '.join(presets)}")
    return presets[name]


def config_from_hf(data: Mapping[str, Any] | Reader) -> Config:
    """Read the contents of a Hugging Face config.json, strictly.

    Raises:
        ConfigError: Another family, or a key that is missing, unknown, out of range or asks for another
            model.
    """
    read = Reader.of(data)
    family = read.raw("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"model_type must be one of {', '.join(FAMILIES)}, got {shown(family)}")
    kind = FAMILIES[family].config_class()
    if FAMILIES[family].kind == "decoder":
        from portlm.models.heads import headed, heads_of

        kind = headed(kind) if heads_of(read) else kind
    return kind.from_hf(read)


def build(config: Config | Mapping[str, Any], device: "str | torch.device" = "cpu") -> Model:
    """Return a freshly initialised model.

    Args:
        config: A configuration, or the contents of a config.json.
        device: Where its parameters live; ``meta`` allocates nothing.
    """
    import torch

    if isinstance(config, Mapping):
        config = config_from_hf(config)
    with torch.device(device):
        model: Model = FAMILIES[config.family].model_class()(config)
    return model


def load_config(folder: str | os.PathLike[str], notes: list[str] | None = None) -> Config:
    """Read config.json of a checkpoint folder.

    Args:
        folder: Where it lies.
        notes: Takes a sentence for each value that the configuration does not keep.

    Raises:
        FormatError: It is missing, no JSON, or not a model portlm computes.
    """
    path = Path(folder) / CONFIG
    data = read_json(path, max_bytes=_MAX_CONFIG_BYTES)
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold a JSON object")
    read = Reader(data)
    try:
        config = config_from_hf(read)
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from error
    if notes is not None:
        notes += read.notes
    return config


def load_model(folder: str | os.PathLike[str], device: "str | torch.device" = "cpu") -> Model:
    """Read a checkpoint folder. Weights of 16 bits are widened, which is exact.

    Everything is compared with config.json before memory is allocated.

    Returns:
        The model in float32 on ``device``, in evaluation mode.

    Raises:
        FormatError: A file is missing or damaged, or a tensor is missing, unexpected, of another shape or no
            float of 16 or 32 bits. The message names it.
    """
    import torch

    config, path = load_config(folder), Path(folder) / WEIGHTS
    check_tensors(path, read_header(path), expected_shapes(config))
    model: Model = FAMILIES[config.family].model_class()(config, init=False)
    mapped = load_numpy(path)  # so that memory never holds the model twice
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            hf_name, transposed = model.hf_name(name)
            tensor = torch.from_numpy(np.array(mapped[hf_name]))
            parameter.copy_(tensor.t() if transposed else tensor)
    return model.to(device).eval()


def save_model(folder: str | os.PathLike[str], model: Model, tokenizer: SavesTokenizer | None = None) -> None:
    """Write a checkpoint folder. transformers opens it if it has such models. Each file is replaced atomically.

    Args:
        folder: Created if it does not exist.
        model: Its weights are written in float32.
        tokenizer: Written beside it. Its end of text is recorded where the configuration names none.

    Raises:
        ConfigError: The tokenizer has more tokens than the model.
        StorageError: The disk is full or refuses the write.
    """
    folder, config = Path(folder), _with_end(model.config, tokenizer)
    make_folder(folder)
    save_tensors(folder / WEIGHTS, hf_tensors(model), metadata={"format": "pt"})
    _save_texts(folder, config, tokenizer)


def save_config(folder: Path, config: Config, tokenizer: SavesTokenizer | None = None) -> None:
    """Write a checkpoint folder without its weights; arguments and errors as for `save_model`."""
    _save_texts(folder, _with_end(config, tokenizer), tokenizer)


def _with_end(config: Config, tokenizer: SavesTokenizer | None) -> Config:
    """The configuration, with the tokenizer's end of text where it names none."""
    if tokenizer is None:
        return config
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary holds "
            f"{config.vocab_size}: they do not belong together"
        )
    if not config.eos_token_ids and tokenizer.eos_id is not None:
        return replace(config, eos_token_ids=(tokenizer.eos_id,))
    return config


def _save_texts(folder: Path, config: Config, tokenizer: SavesTokenizer | None) -> None:
    write_config(folder, config)
    if tokenizer is not None:
        tokenizer.save(folder)


def write_config(folder: Path, config: Config) -> None:
    """Write config.json and generation_config.json."""
    data = config.to_hf()
    write_json(folder / CONFIG, data)
    keys = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    ids = {key: data[key] for key in keys if data.get(key) is not None}
    write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **ids})


def write_json(path: Path, data: Any) -> None:
    """Write JSON the way Hugging Face does: two spaces, sorted keys, a final newline."""
    write_atomic(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def hf_tensors(model: Model) -> "dict[str, torch.Tensor]":
    """Return every parameter in float32 on the CPU, under its name and in its orientation in the files."""
    import torch

    tensors = {}
    for name, parameter in model.named_parameters():
        hf_name, transposed = model.hf_name(name)
        tensor = parameter.detach().to("cpu", torch.float32)
        tensors[hf_name] = tensor.t() if transposed else tensor
    return tensors


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that model.safetensors must hold, without allocating any."""
    import torch

    with torch.device("meta"):
        model = FAMILIES[config.family].model_class()(config, init=False)
    shapes = {}
    for name, parameter in model.named_parameters():
        hf_name, transposed = model.hf_name(name)
        shapes[hf_name] = tuple(parameter.shape[::-1] if transposed else parameter.shape)
    return shapes


def check_tensors(
    path: Path,
    header: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: tuple[str, ...] = FLOATS,
) -> None:
    """Raise FormatError unless a file holds exactly the expected tensors.

    Args:
        path: Named in the error.
        header: What the file holds, by name.
        shapes: What it should hold, by name.
        dtypes: Accepted number formats, in safetensors' spelling.
    """
    missing = [name for name in shapes if name not in header]
    if missing:
        raise FormatError(
            f"{path}: tensor {missing[0]} of shape {shapes[missing[0]]} is missing"
            f"{_and_others(missing)}: {CONFIG} asks for it"
        )
    extra = [name for name in header if name not in shapes]
    if extra:
        raise FormatError(
            f"{path}: tensor {shown(extra[0])} of shape {tuple(header[extra[0]].shape)} is unexpected"
            f"{_and_others(extra)}: {CONFIG} describes a model without it"
        )
    for name, shape in shapes.items():
        info = header[name]
        if tuple(info.shape) != shape:
            raise FormatError(
                f"{path}: tensor {name} has shape {tuple(info.shape)}, but {CONFIG} asks for {shape}"
            )
        if info.dtype not in dtypes:
            hint = (
                "portlm import converts it" if info.dtype in IMPORTED else "its weights are no plain numbers"
            )
            raise FormatError(
                f"{path}: tensor {name} is {info.dtype}, but must be {' or '.join(dtypes)}: {hint}"
            )


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        StorageError: The file system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be created: {error.strerror}") from error
