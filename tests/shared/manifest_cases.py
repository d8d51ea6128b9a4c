"""A small artifact's manifest, and manifests changed by somebody who can also compute their digest."""

import hashlib
import json

from portlm.artifact import (
    CompiledEntry,
    Manifest,
    ModelSpec,
    ParityRow,
    Provenance,
    RoleSpec,
    StateSpec,
    TensorSpec,
    hash_files,
)

FILES = (
    "config.json",
    "onnx/decoder.portable.onnx",
    "onnx/decoder.onnx.data",
    "compiled/tvm-cpu-fused/model.so",
)


def make_manifest(folder):
    shape = ("batch", 2, "past", 8)
    state = StateSpec("past_key_values.0.key", "present.0.key", "float32", shape, "empty", "append")
    role = RoleSpec(
        profiles={"portable": FILES[1]},
        weights=FILES[2],
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 257)),),
        state=(state,),
        dtypes={"head": "float16"},
        provenance=Provenance({"onnx": "1.23.2"}, {"opset": 20, "strict": False}, {"input_ids": (2, 3)}),
    )
    row = ParityRow(
        engine="ort",
        device="cpu",
        profile="fused",
        precision="fp32",
        max_logit_error=1.5e-6,
        kl=0.0,
        top1=1.0,
        greedy_match=384,
        greedy_total=384,
        placement={"cpu": 61},
        fallback=(),
        versions={"onnxruntime": "1.31.1"},
        date="2026-11-21",
    )
    return Manifest(
        model=ModelSpec("llama", 1000, 257, 48),
        roles={"decoder": role},
        files=hash_files(folder, FILES),
        compiled=(CompiledEntry("tvm", "cpu", "fused", "llvm", (FILES[3],), {"apache-tvm": "0.27.0"}),),
        parity=(row,),
    )


def digest(data):
    """The documented digest, written out again: canonical JSON without the field itself."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def rewrite(folder, change):
    """Change the manifest as somebody would who can also compute its digest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    data["sha256"] = digest(data)
    path.write_text(json.dumps(data))


def set_at(data, place, value):
    *path, last = place
    for key in path:
        data = data[key]
    data[last] = value


DECODER = ("roles", "decoder")
