"""The engines of others that `portlm bench --against` names, each with the formats that are worth a row."""

from __future__ import annotations

from collections.abc import Sequence

from portlm.errors import EngineUnavailableError, UsageError
from portlm.flows.race import genai, hugging_face, llamacpp
from portlm.flows.race.contender import Entry

_HERE = "portlm.flows.race"


def llama_cpp(file: str, precision: str, note: str, cache: str = "") -> Entry:
    """A row of llama.cpp: one of its formats, with the fastest of its caches or with the one that is named."""
    name = f"llama.cpp {file.upper()}" + (f" cache {cache}" if cache else "")
    return Entry(
        name, precision, f"{_HERE}.llamacpp:LlamaCpp", {"file": file, "cache": cache}, llamacpp.NEEDS, note=note,
        bar="f32, GELU from a table" if precision == "f32" else "",
    )  # fmt: skip


def ort_genai(builder: str, precision: str, note: str) -> Entry:
    """A row of onnxruntime-genai: one of its builder's precisions."""
    return Entry(
        f"ort-genai {builder}",
        precision,
        f"{_HERE}.genai:Genai",
        {"precision": builder},
        genai.NEEDS,
        note=note,
    )


def transformers(dtype: str, precision: str, note: str) -> Entry:
    """A row of transformers: one of its number formats."""
    name = f"transformers {dtype}"
    return Entry(
        name, precision, f"{_HERE}.hugging_face:Transformers", {"dtype": dtype}, hugging_face.NEEDS, note=note
    )


RIVALS: dict[str, tuple[Entry, ...]] = {
    "llama.cpp": (
        llama_cpp("f32", "f32", "float32 weights and cache, no flash attention, which rounds to half inside"),
        llama_cpp("q8_0", "q8", "8.5 bits a weight everywhere; the fastest of its caches"),
        llama_cpp("q4_0", "q4", "4.5 bits a weight everywhere; the fastest of its caches"),
    ),
    "ort-genai": (
        ort_genai("fp32", "f32", "its own builder's graph"),
        ort_genai("int4", "q4", "blocks of 32, int8 arithmetic (accuracy level 4), float32 cache"),
    ),
    "transformers": (transformers("float32", "f32", "eager mode, sdpa attention"),),
}


def read_rivals(text: str) -> list[Entry]:
    """The rows of a list of rivals with commas between them.

    Raises:
        UsageError: there is no such rival.
        EngineUnavailableError: the packages of one are missing; the message has pip's command.
    """
    found: list[Entry] = []
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        if name not in RIVALS:
            raise UsageError(f"there is no rival {name!r}: choose among {', '.join(RIVALS)}")
        for entry in RIVALS[name]:
            try:
                entry.check()
            except EngineUnavailableError as error:
                raise EngineUnavailableError(f"{name} is {error}") from None
        found += RIVALS[name]
    return found


def ours(targets: Sequence[object], bar: str = "") -> list[Entry]:
    """A row for each of portlm's targets, which are named ENGINE:DEVICE:PROFILE; see Entry for their bar."""
    return [
        Entry(
            str(target), "f32", f"{_HERE}.portlm_engines:PortlmEngine",
            dict(zip(("engine", "device", "profile"), str(target).split(":"), strict=False)), ours=True, bar=bar,
        )
        for target in targets
    ]  # fmt: skip
