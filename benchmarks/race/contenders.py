"""Who races: portlm's engines, and the best CPU rivals, each with the settings that are best for it.

One line each. `portlm bench --against` knows some of them; what is only worth it here is added: other formats of
llama.cpp, half precision, OpenVINO, portlm's whole loop.
"""

from __future__ import annotations

from portlm.flows.race.contender import Entry
from portlm.flows.race.gate import BYTE_CACHE
from portlm.flows.race.rivals import RIVALS, llama_cpp, transformers

CLASSES = "portlm.flows.race.portlm_engines"
ENGINES = ("packed:cpu:fused", "tvm:cpu:fused", "ort:cpu:fused")
OPENVINO = {"openvino": "openvino", "nncf": "nncf", "torch": "torch", "transformers": "transformers"}


def portlm(
    target: str, quantize: str = "", generate: bool = False, a8: bool = False, kv8: bool = False
) -> Entry:
    """A row of portlm: an engine, perhaps on quantized weights or behind session.generate.

    a8 is for 8-bit activations where they meet quantized weights, kv8 for a cache of 8 bits.
    """
    engine, device, profile = target.split(":")
    precision = {"": "f32", "int8": "q8", "int4": "q4"}[quantize]
    options = ("a8" if a8 else "", "kv8" if kv8 else "", "generate" if generate else "")
    name = " ".join(filter(None, ("portlm", engine, quantize or "f32", *options)))
    said = (
        target,
        "activations of 8 bits" if a8 else "",
        "cache of 8 bits" if kv8 else "",
        "through session.generate" if generate else "",
    )
    note = ", ".join(filter(None, said))
    cls = "PortlmGenerate" if generate else "PortlmEngine"
    arguments = {"engine": engine, "device": device, "profile": profile, "quantize": quantize}
    if a8:
        arguments["activations"] = "int8"
    if kv8:
        arguments["cache"] = "int8"
    bar = BYTE_CACHE if kv8 and not quantize else ""
    return Entry(name, precision, f"{CLASSES}:{cls}", arguments, ours=True, note=note, bar=bar)


def openvino(precision: str) -> Entry:
    """A row of OpenVINO, stateful."""
    note = {
        "f32": "arithmetic and cache in float32",
        "q4": "NNCF INT4_SYM, groups of 32, 8-bit activations and cache as OpenVINO chooses",
    }
    return Entry(
        f"openvino {precision}", precision, "openvino_model:OpenVino", {"precision": precision}, OPENVINO,
        note=note[precision],
    )  # fmt: skip


CONTENDERS = {
    entry.name: entry
    for entry in (
        *(portlm(target, bits) for bits in ("", "int8", "int4") for target in ENGINES),
        *(portlm(target, bits, a8=True) for bits in ("int8", "int4") for target in ENGINES),
        *(portlm("packed:cpu:fused", "int4", a8=a8, kv8=True) for a8 in (False, True)),
        portlm("ort:cpu:fused", "int4", generate=True, a8=True),
        *RIVALS["transformers"],
        *RIVALS["llama.cpp"],
        llama_cpp("q4_0_mix", "q4", "Q4_0 as llama.cpp mixes it: the head in Q6_K"),
        *RIVALS["ort-genai"],
        openvino("f32"),
        openvino("q4"),
    )
}
"""What runs unless the command line names others.

ONNX Runtime with 8-bit activations is there twice: driven call by call, as all engines are, and by session.generate,
since its rival onnxruntime-genai runs in a loop of its own."""

EXTRAS = {
    entry.name: entry
    for entry in (
        portlm("torch:cpu:native"),
        *(portlm(target, bits, generate=True) for bits in ("", "int4") for target in ENGINES),
        *(portlm(target, "int4", generate=True, a8=True) for target in ENGINES if "ort" not in target),
        *(portlm(target, kv8=True) for target in ENGINES),
        *(portlm(target, "int4", kv8=True) for target in ENGINES if "packed" not in target),
        llama_cpp("q4_k_m", "q4", "Q4_K_M"),
        *(llama_cpp("q4_0", "q4", f"Q4_0 with a cache of {cache}", cache) for cache in ("f16", "q8_0")),
        transformers("bfloat16", "f16", "eager mode, sdpa attention"),
    )
}
"""What runs when it is named."""

SMOKE = (
    "portlm packed f32",
    "portlm ort f32",
    "portlm packed f32 generate",
    "portlm packed int4",
    "portlm packed int4 a8",
)
WHOLE_LOOP = tuple(name for name in (*CONTENDERS, *EXTRAS) if name.endswith("generate"))
"""Rows that a model too small for its kernels to matter is about."""
