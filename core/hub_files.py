"""The files of a Hugging Face folder: where each lies, and what to say of a folder that holds no whole model.

A file lies in the folder itself. In the cache that the hub's own programs keep, it is a link into the folder blobs
of the same model; such a link is followed, once, and no other is: who made the folder chose where its links lead.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from portlm.errors import FormatError
from portlm.files import read_json, safe_join, shown
from portlm.models import CONFIG, GENERATION_CONFIG, WEIGHTS
from portlm.pictures import PREPROCESSORS
from portlm.weights import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_EXTRAS = ("special_tokens_map.json", "chat_template.jinja")
MAX_TEXT_BYTES = 4 << 20
Places = dict[str, tuple[Path, TensorInfo]]  # where each tensor is stored

_ADAPTER = "adapter_config.json"
_READ = (
    CONFIG,
    GENERATION_CONFIG,
    WEIGHTS,
    INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    *TOKENIZER_EXTRAS,
    *PREPROCESSORS,
)
_MAX_SHARDS = 4096
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf")
_VARIANT = re.compile(r"model\.(?P<name>\w+)\.safetensors|model\.safetensors\.index\.(?P<of_index>\w+)\.json")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_CARD = re.compile(
    r"(readme|model_card|licen[cs]e|notice|copying|use_policy)([-_][\w-]+)?(\.(md|txt))?", re.IGNORECASE
)
# What programs put around a module and thereby into its tensors' names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OTHER_HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.", "value_head.")
_SAVE_AGAIN = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) in transformers"
_MERGE = "merge it into the model where you have peft, model.merge_and_unload().save_pretrained(new_folder)"


def find(folder: Path, name: str) -> Path:
    """Return where a file of a folder lies, whether it exists or not.

    Raises:
        FormatError: The name leaves the folder, or is a link that does not lead to a blob of the hub's cache.
    """
    return folder / name if _is_cached(folder, name) else safe_join(folder, name)


def check_folder(folder: Path) -> None:
    """Raise FormatError unless the files that are read from a folder lie in it, and may be a whole model's."""
    for name in _READ:
        find(folder, name)
    if find(folder, _ADAPTER).exists():
        raise FormatError(
            f"{folder} holds a PEFT adapter ({_ADAPTER}), which changes another model: {_MERGE}"
        )
    if not (folder / CONFIG).exists() and (folder / "snapshots").is_dir():
        raise FormatError(
            f"{folder} is a model's place in the hub's cache: give one of the folders in snapshots/"
        )


def stored(folder: Path) -> Places:
    """Return where each tensor of a folder is stored, from one file or from shards and their index.

    Raises:
        FormatError: There are no weights, or a file is damaged or does not fit the index.
    """
    if (folder / WEIGHTS).exists():
        return {name: (folder / WEIGHTS, info) for name, info in read_header(folder / WEIGHTS).items()}
    if not (folder / INDEX).exists():
        raise FormatError(_no_weights(folder))
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{folder / INDEX} must hold a weight_map from tensor names to file names")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{folder / INDEX}: every value of weight_map must be a file name")
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise FormatError(f"{folder / INDEX} names {len(shards)} files and {_MAX_SHARDS} are allowed")
    places: Places = {}
    for shard in shards:
        path = find(folder, shard)
        for name, info in read_header(path).items():
            if weight_map.get(name) != shard:
                raise FormatError(f"{path} holds tensor {shown(name)}, which {INDEX} does not place there")
            places[name] = path, info
    for name, shard in weight_map.items():
        if name not in places:
            raise FormatError(
                f"{folder / INDEX} places tensor {shown(name)} in {shown(shard)}, which lacks it"
            )
    return places


def unwrapped(name: str) -> str:
    """Return a tensor's name without what torch.compile and the wrappers of parallel training put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def check_names(where: Path, names: Iterable[str], lacks: Callable[[], list[str]]) -> None:
    """Raise FormatError where names of tensors show that a folder holds something else than a language model.

    Args:
        where: Named in the error.
        names: The names, unwrapped.
        lacks: Says which parameters of the language model are missing.
    """
    for name in names:
        if name.startswith("base_model.model.") or ".lora_" in name or ".base_layer." in name:
            raise FormatError(
                f"{where}: tensor {shown(name)} belongs to a model with a PEFT adapter in it: {_MERGE}"
            )
        if name.startswith(_OTHER_HEADS):
            if missing := lacks():
                hint = f"there is none in here, {missing[0]} is missing"
            else:
                hint = f"{_SAVE_AGAIN} leaves the head out"
            raise FormatError(
                f"{where}: tensor {shown(name)} belongs to a head for another task, and portlm computes language "
                f"models: {hint}"
            )


def cards(folder: Path) -> list[str]:
    """Return the names of a folder's model card and licence files, which stay with the weights.

    Raises:
        FormatError: As :func:`find`.
    """
    places = (folder / name for name in _names(folder) if _CARD.fullmatch(name))
    return [find(folder, place.name).name for place in places if place.is_symlink() or not place.is_dir()]


def why_no_tokenizer(folder: Path) -> str:
    """Say what a folder without tokenizer.json has instead, and what would help."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return (
            f"there is no {TOKENIZER}; GPT2Tokenizer.from_pretrained(folder).save_pretrained(new_folder) in "
            "transformers makes it of vocab.json and merges.txt: put it beside them and import again"
        )
    if (folder / "tokenizer.model").exists():
        return f"there is no {TOKENIZER}, and portlm does not read tokenizer.model"
    return f"there is no {TOKENIZER}"


def usable_tokenizer(folder: Path, vocab_size: int, notes: list[str]) -> bool:
    """Whether text for a model can go through the tokenizer of its folder; if not, or not in all, ``notes`` say why.

    A tokenizer that cannot be used is left out, for with it nothing could be loaded, not even to take token ids.
    """
    from portlm.tokenizer import Tokenizer

    if not (folder / TOKENIZER).exists():
        notes.append(f"the checkpoint takes token ids only: {why_no_tokenizer(folder)}")
        return False
    try:
        tokenizer = Tokenizer.load(folder)
        tokenizer.within(vocab_size)
    except FormatError as error:
        notes.append(f"the tokenizer was left out, so the model takes token ids only (--ids): {error}")
        return False
    if tokenizer.vocab_size > vocab_size:
        notes.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: the control tokens beyond "
            "are never used"
        )
    return True


def _is_cached(folder: Path, name: str) -> bool:
    """Tell whether a name is a link of the hub's cache: snapshots/<revision>/<name> to blobs/<digest>."""
    if Path(name).name != name or name in ("", ".."):
        return False
    try:
        link = (folder / name).readlink()
    except (OSError, ValueError):  # no link, nothing, or a NUL in the name
        return False
    here = Path(os.path.realpath(folder))
    blobs = next((above.parent / "blobs" for above in here.parents if above.name == "snapshots"), None)
    if blobs is None or blobs.is_symlink() or os.path.realpath(here / link.parent) != str(blobs):
        return False
    if not safe_join(blobs, link.name).exists():  # and it must be a file, not another link
        raise FormatError(
            f"{folder}: {shown(name)} leads to a file that the hub's cache lacks: download it again"
        )
    return True


def _no_weights(folder: Path) -> str:
    """Say why a folder without safetensors cannot be imported, and what would help."""
    names = _names(folder)
    for name in names:
        if match := _VARIANT.fullmatch(name):
            plain = WEIGHTS if match["name"] else INDEX
            return f"{folder} holds no {plain}, only the variant {shown(name)}: rename that to {plain} to import it"
    if any(_SHARD.fullmatch(name) for name in names):
        return f"{folder} holds parts of the weights, but not {INDEX}, which says what is in them: add it"
    others = [name for name in names if name.endswith(_OTHER_WEIGHTS)]
    if not others:
        return f"{folder} holds neither {WEIGHTS} nor {INDEX}: give a folder with safetensors weights"
    return (
        f"{folder} holds {shown(others[0])} but no safetensors, and portlm opens no pickles or other formats: convert "
        f"it where you trust it, {_SAVE_AGAIN}"
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
