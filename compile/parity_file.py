"""parity.safetensors: what every engine is asked, and the answer of eager PyTorch, for machines that do not have it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from portlm.artifact import Manifest, check_files
from portlm.compile.parity_calls import Calls, continues_text
from portlm.engine import CallSpec, call_specs
from portlm.errors import FormatError, UsageError
from portlm.memory import giver_of
from portlm.rows import rows_shown
from portlm.weights import load_numpy, save_tensors

REFERENCE = "parity.safetensors"
DECODER = "decoder"  # the role whose answer has no prefix in the file, as in files of one role
SOURCE = "source/"  # before what the encoder is called with


@dataclass(frozen=True)
class Probe:
    """What every engine is asked.

    input_ids (B, T) int64 and attention_mask (B, T) int64, 0 on the padding at the left; cuts are the ends of the
    steps in which the T tokens are read; source is what the encoder is called with first, nothing without one.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    cuts: tuple[int, ...]
    source: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def position_ids(self) -> np.ndarray:
        """(B, T) int64: the number of tokens before each in its own row."""
        return np.maximum(self.attention_mask.cumsum(1) - 1, 0)


@dataclass(frozen=True)
class Reference:
    """The probe and the model's answer to it; N counts the tokens that are not padding, n the greedy steps.

    logits (N, V) float32, greedy (B, n) int64, margins (B, n) float32: by how much each greedy token won.
    """

    probe: Probe
    logits: np.ndarray
    greedy: np.ndarray
    margins: np.ndarray


def save_reference(folder: Path, references: Mapping[str, Reference | Calls]) -> None:
    """Write parity.safetensors: the decoder's tensors by name, those of other roles behind "<role>/"."""
    tensors: dict[str, np.ndarray] = {}
    for role, reference in references.items():
        prefix = "" if role == DECODER else f"{role}/"
        tensors |= {f"{prefix}{name}": value for name, value in _tensors(reference).items()}
    save_tensors(folder / REFERENCE, tensors, {"made_with": f"eager PyTorch, portlm {version('portlm')}"})


def _tensors(reference: Reference | Calls) -> dict[str, np.ndarray]:
    if isinstance(reference, Calls):
        tensors = {f"given/{name}": value for name, value in reference.given.items()}
        for i, (inputs, answers) in enumerate(zip(reference.inputs, reference.answers, strict=True)):
            tensors |= {f"call{i}/{name}": value for name, value in inputs.items()}
            tensors |= {f"answer{i}/{name}": value for name, value in answers.items()}
        return tensors
    return {
        "input_ids": reference.probe.input_ids,
        "attention_mask": reference.probe.attention_mask,
        "cuts": np.array(reference.probe.cuts, dtype=np.int64),
        "logits": reference.logits,
        "greedy": reference.greedy,
        "margins": reference.margins,
        **{f"{SOURCE}{name}": value for name, value in reference.probe.source.items()},
    }


def load_reference(folder: Path, manifest: Manifest) -> dict[str, Reference | Calls]:
    """Read parity.safetensors, checked against the manifest and against itself; return the answer of each role.

    Raises:
        UsageError: there is none.
        FormatError: it is damaged or belongs to another model.
    """
    if REFERENCE not in manifest.files:
        raise UsageError(
            f"{folder}: holds no reference answer; run `portlm verify --certify` where PyTorch is installed"
        )
    check_files(folder, [REFERENCE], manifest)
    path = folder / REFERENCE
    by_role: dict[str, dict[str, np.ndarray]] = {}
    specs = call_specs(manifest)
    for name, tensor in load_numpy(path).items():
        if not np.isfinite(tensor).all():
            raise FormatError(
                f"{path}: {name} holds NaN or infinity, with which nothing can agree: certify again"
            )
        # The decoder's own names have no prefix, but may have a slash.
        role, _, rest = name.partition("/")
        role, rest = (role, rest) if role in specs and rest else (DECODER, name)
        by_role.setdefault(role, {})[rest] = tensor
    found: dict[str, Reference | Calls] = {}
    for role, tensors in by_role.items():
        if role not in specs:
            raise FormatError(f"{path}: holds the answer of a {role}, which the model does not have")
        if continues_text(specs[role]):
            found[role] = _read_decoder(path, tensors, {}, specs[role], manifest)
        elif role == DECODER and "cuts" in tensors and giver_of(specs):
            found[role] = _read_decoder(
                path, tensors, _take_source(path, tensors, specs), specs[role], manifest
            )
        else:
            found[role] = _read_calls(path, tensors, specs[role], manifest)
    if missing := [role for role in specs if role not in found]:
        raise FormatError(
            f"{path}: holds no answer of the model as {missing[0]}, so nothing can be compared with it"
        )
    return {role: found[role] for role in specs}


def _read_calls(path: Path, tensors: dict[str, np.ndarray], spec: CallSpec, manifest: Manifest) -> Calls:
    """The answer of a role that is called. Engines check the inputs, as they check any."""
    expected = {f"given/{state.name}": state.dtype for state in spec.state if state.initial == "given"}
    count = sum(name.startswith("call") and name.endswith(f"/{spec.inputs[0].name}") for name in tensors)
    for i in range(count):
        expected |= {f"call{i}/{item.name}": item.dtype for item in spec.inputs}
        expected |= {f"answer{i}/{item.name}": "float32" for item in spec.outputs}
    full = all(value.size for value in tensors.values())
    if not count or {name: value.dtype.name for name, value in tensors.items()} != expected or not full:
        raise FormatError(f"{path}: its tensors do not fit each other or this model")

    def below(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }

    inputs = tuple(below(f"call{i}/") for i in range(count))
    return Calls(below("given/"), inputs, tuple(below(f"answer{i}/") for i in range(count)))


def _take_source(
    path: Path, tensors: dict[str, np.ndarray], specs: Mapping[str, CallSpec]
) -> dict[str, np.ndarray]:
    """Take what the encoder is called with out of the tensors. The engine checks it, as it checks any call."""
    names = [name for name in tensors if name.startswith(SOURCE)]
    source = {name.removeprefix(SOURCE): tensors.pop(name) for name in names}
    giver = giver_of(specs)
    wanted = {item.name: item.dtype for item in specs[giver].inputs}
    if {name: value.dtype.name for name, value in source.items()} != wanted:
        raise FormatError(f"{path}: its sources are not what the {giver} of this model takes")
    return source


def _read_decoder(
    path: Path,
    tensors: dict[str, np.ndarray],
    source: dict[str, np.ndarray],
    spec: CallSpec,
    manifest: Manifest,
) -> Reference:
    """The answer of a role that continues a text: of each token, or of what a head says of it."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    if dtypes != dict.fromkeys(("input_ids", "attention_mask", "cuts", "greedy"), "int64") | {
        "logits": "float32",
        "margins": "float32",
    }:
        raise FormatError(f"{path}: holds other tensors than a reference answer has")
    ids, mask, cuts = (
        tensors["input_ids"],
        tensors["attention_mask"],
        tuple(int(cut) for cut in tensors["cuts"].ravel()),
    )
    vocab, context = manifest.model.vocab_size, manifest.model.context_length
    width = next(item.shape[-1] for item in spec.outputs if item.name == "logits")
    answers = width if isinstance(width, int) else vocab
    if (
        ids.ndim != 2
        or shapes["attention_mask"] != ids.shape
        or not np.isin(mask, (0, 1)).all()
        or not ((ids >= 0) & (ids < vocab + rows_shown(spec))).all()
        or not (tensors["margins"] >= 0).all()
        or shapes["logits"] != (int(mask.sum()), answers)
        or tensors["greedy"].ndim != 2
        or len(tensors["greedy"]) != len(ids)
        or shapes["margins"] != shapes["greedy"]
        or ids.shape[1] + shapes["greedy"][1] > context
        or list(cuts) != sorted(set(cuts))
        or not cuts
        or cuts[0] < 1
        or cuts[-1] != ids.shape[1]
    ):
        raise FormatError(f"{path}: its tensors do not fit each other or this model")
    return Reference(Probe(ids, mask, cuts, source), tensors["logits"], tensors["greedy"], tensors["margins"])
