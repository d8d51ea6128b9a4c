"""Lowers the fused profile for ONNX Runtime: each node of domain ai.portlm becomes the operator ORT runs fastest.

A value keeps the name it has in the portable graph only if it is the same value, so that compile/bisect.py can
compare by name. What ORT's own optimiser does afterwards is left to it (it moves the bias of a Linear into the
normalisation that follows, for example).

Where the file goes: ONNX Runtime refuses weights outside the model's folder, by ../ and by symbolic link alike, so
the lowered graph lies in onnx/ beside the weight file and no weight is stored twice. The manifest lists it under
compiled. It opens in plain onnxruntime without any option.

Why MultiHeadAttention and not GroupQueryAttention: the latter refuses several new tokens on a cache when the batch
is above one ("batch_size must be 1 when sequence_length > 1 and past context is given", 1.31), which is a ragged
batch continuing a chat. Grouped heads are served all the same: the G query heads that share a key/value head are
stacked along time, (B, G*T, K*D), so the cache is read once and not repeated.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from portlm.artifact import CompiledEntry, read_manifest, verify_files
from portlm.compile.check import CONTRIB, check_model
from portlm.compile.forms import DOMAIN, Portable
from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.compile.passes import Note, ignore
from portlm.errors import UsageError
from portlm.files import write_atomic
from portlm.roles import file_stem


def compile_cpu(folder: Path, role: str = "decoder", note: Note = ignore) -> CompiledEntry:
    """Lower for CPUExecutionProvider; see lower."""
    return lower(folder, "cpu", role, note)


def compile_cuda(folder: Path, role: str = "decoder", note: Note = ignore) -> CompiledEntry:
    """Lower for CUDAExecutionProvider; see lower."""
    return lower(folder, "cuda", role, note)


def compile_vulkan(folder: Path, role: str = "decoder", note: Note = ignore) -> CompiledEntry:
    """Lower for the WebGPU plugin provider, which is Vulkan on Linux; see lower."""
    return lower(folder, "vulkan", role, note)


def lower(folder: str | Path, device: str, role: str = "decoder", note: Note = ignore) -> CompiledEntry:
    """Write a role's fused graph lowered for one device.

    Args:
        folder: the artifact.
        device: "cpu", "cuda" or "vulkan".
        role: whose graph it is.
        note: called with the name of each pass and the graph after it.

    Returns:
        What compile/build.py enters in the manifest; the one file is onnx/<role>.ort-<device>-fused.onnx.

    Raises:
        UsageError: the artifact was exported without its fused profile.
        FormatError: the fused graph is not the one the manifest lists, or not one of ours.
        StorageError: the disk is full or refuses.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    spec = manifest.roles.get(role)
    if spec is None or "fused" not in spec.profiles:
        raise UsageError(f"{root}: has no fused {role} graph; export it with profiles portable and fused")
    source = spec.profiles["fused"]
    verify_files(root, [source, spec.weights])
    model = lower_model(check_model(root / source), manifest.model.context_length, device)
    note("lowered", model)
    name = f"onnx/{file_stem(role)}.ort-{device}-fused.onnx"
    write_atomic(root / name, model.SerializeToString(deterministic=True))
    check_model(root / name)
    return CompiledEntry(
        "ort", device, "fused", "onnxruntime", (name,), {"portlm": version("portlm")}, role=role
    )


def lower_model(model: onnx.ModelProto, context_length: int, device: str) -> onnx.ModelProto:
    """The graph with every ai.portlm node replaced; inputs, outputs and weights stay."""
    lowering = Lowering(model, context_length, device)
    for node in model.graph.node:
        lowering.lower(node)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return lowering.g.model({**metadata, "portlm.lowered": f"ort-{device}"})


class Lowering:
    """One method per op of the fused profile."""

    def __init__(self, model: onnx.ModelProto, context_length: int, device: str):
        self.device = device
        self.g = GraphBuilder("decoder", {}, WeightFile(""), {CONTRIB: 1})
        self.g.adopt(model.graph)
        self._context = context_length
        self._masks: dict[int, str] = {}  # group size -> attention bias

    def lower(self, node: onnx.NodeProto) -> None:
        """Append what replaces the node; standard nodes stay."""
        if node.domain != DOMAIN:
            self.g.copy(node)
            return
        methods: dict[str, Callable[[onnx.NodeProto], None]] = {
            "AddLayerNorm": self.add_layer_norm,
            "AddRmsNorm": self.add_rms_norm,
            "CachedAttention": self.cached_attention,
            "Embedding": self.embedding,
            "GeluMlp": self.gelu_mlp,
            "LayerNorm": self.layer_norm,
            "Linear": self.linear,
            "RmsNorm": self.rms_norm,
            "Rotary": self.rotary,
            "SwiGlu": self.swiglu,
        }
        methods[node.op_type](node)

    def embedding(self, node: onnx.NodeProto) -> None:
        """Gather of rows."""
        ids, weight = node.input
        self.g.op("Gather", (weight, ids), node.output[0], axis=0)

    def linear(self, node: onnx.NodeProto) -> None:
        """MatMul, and Add for the bias, which ORT moves into a following normalisation."""
        x, weight, *bias = node.input
        name = node.output[0]
        if _attributes(node).get("transposed"):
            self.transposed_matmul(x, weight, name)
        elif bias:
            product = self.g.op("MatMul", (x, weight), f"{name}.matmul")
            self.g.op("Add", (product, bias[0]), name)
        else:
            self.g.op("MatMul", (x, weight), name)

    def transposed_matmul(self, x: str, weight: str, name: str) -> None:
        """The tied head. FusedMatMul spares the CPU a transposed copy of the table; WebGPU does not have it."""
        if self.device == "vulkan":
            turned = self.g.op("Transpose", (weight,), f"{name}.weight", perm=[1, 0])
            self.g.op("MatMul", (x, turned), name)
        else:
            self.g.op("FusedMatMul", (x, weight), name, domain=CONTRIB, transB=1)

    def layer_norm(self, node: onnx.NodeProto) -> None:
        """The standard operator, which ORT has a kernel for."""
        self.g.op("LayerNormalization", node.input, node.output[0], axis=-1, **_attributes(node))

    def add_layer_norm(self, node: onnx.NodeProto) -> None:
        """SkipLayerNormalization, which also returns the sum."""
        outputs = (
            node.output[0],
            "",
            "",
            node.output[1],
        )  # the mean and deviation between them are not needed
        self.g.split_op(
            "SkipLayerNormalization", node.input, node.output[0], outputs, domain=CONTRIB, **_attributes(node)
        )

    def rms_norm(self, node: onnx.NodeProto) -> None:
        """Composed: ORT's single operator for it is in no ONNX operator set, and a model has this only once."""
        x, weight = node.input
        Portable(self.g).rms_norm(x, weight.removesuffix(".weight"), _attributes(node)["epsilon"])

    def add_rms_norm(self, node: onnx.NodeProto) -> None:
        """SkipSimplifiedLayerNormalization, which also returns the sum."""
        outputs = (node.output[0], "", "", node.output[1])
        self.g.split_op(
            "SkipSimplifiedLayerNormalization",
            node.input,
            node.output[0],
            outputs,
            domain=CONTRIB,
            **_attributes(node),
        )

    def rotary(self, node: onnx.NodeProto) -> None:
        """The head width follows from the tables, so the number of heads is not said twice."""
        self.g.op("RotaryEmbedding", node.input, node.output[0], domain=CONTRIB)

    def gelu_mlp(self, node: onnx.NodeProto) -> None:
        """Two products; the first bias and the activation are one node."""
        x, w1, b1, w2, b2 = node.input
        name = node.output[0]
        gelu = "FastGelu" if _attributes(node)["approximate"] == b"tanh" else "BiasGelu"
        hidden = self.g.op("MatMul", (x, w1), f"{name}.hidden")
        hidden = self.g.op(gelu, (hidden, b1), f"{name}.act", domain=CONTRIB)
        product = self.g.op("MatMul", (hidden, w2), f"{name}.matmul")
        self.g.op("Add", (product, b2), name)

    def swiglu(self, node: onnx.NodeProto) -> None:
        """QuickGelu with alpha 1 is silu."""
        gate, up = node.input
        name = node.output[0]
        silu = self.g.op("QuickGelu", (gate,), f"{name}.silu", domain=CONTRIB, alpha=1.0)
        self.g.op("Mul", (silu, up), name)

    def cached_attention(self, node: onnx.NodeProto) -> None:
        """MultiHeadAttention over the key/value heads, with the mask of the portable profile as its bias."""
        g, attributes, name = self.g, _attributes(node), node.output[0]
        q, k, v, past_key, past_value, mask = node.input
        H, K = attributes["num_heads"], attributes["num_kv_heads"]
        G, D = H // K, g.head_dim(past_key)
        if not self._masks:
            self._masks[G] = Portable(g).mask(mask, "position_ids", self._context, G)
        if self.device == "vulkan":
            self.plain_attention(q, k, v, past_key, self._masks[G], H, K, name)
            return
        if G > 1:
            q = g.op("Reshape", (q, g.ints(0, 0, K, G, D)), f"{name}.stacked_heads")  # (B, T, K, G, D)
            q = g.op("Transpose", (q,), f"{name}.stacked_groups", perm=[0, 3, 1, 2, 4])  # (B, G, T, K, D)
            q = g.op("Reshape", (q, g.ints(0, -1, K * D)), f"{name}.stacked_queries")  # (B, G*T, K*D)
        inputs = (q, k, v, "", "", self._masks[G], past_key, past_value)
        out = name if G == 1 else f"{name}.stacked"
        options = {"num_heads": K, "scale": attributes["scale"]}
        g.split_op("MultiHeadAttention", inputs, out, (out, *node.output[1:]), domain=CONTRIB, **options)
        if G > 1:
            out = g.op("Reshape", (out, g.ints(0, G, -1, K, D)), f"{name}.stacked_out")  # (B, G, T, K, D)
            out = g.op("Transpose", (out,), f"{name}.unstacked", perm=[0, 2, 3, 1, 4])  # (B, T, K, G, D)
            g.op("Reshape", (out, g.ints(0, 0, H * D)), name)

    def plain_attention(
        self, q: str, k: str, v: str, past_key: str, bias: str, n_head: int, n_kv_head: int, name: str
    ) -> None:
        """Attention in plain products, as in the portable profile.

        From 32 queries on, WebGPU's MultiHeadAttention is its flash attention, which plugin 0.4 computes wrongly where
        a subgroup has 8 lanes: from the ninth query on, logits are off by 1. No option or input keeps it from that.
        """
        portable, D = Portable(self.g), self.g.head_dim(past_key)
        q = portable.heads(q, n_head, D, f"{name}.q")
        k, v = portable.heads(k, n_kv_head, D, f"{name}.k"), portable.heads(v, n_kv_head, D, f"{name}.v")
        layer = int(past_key.split(".")[1])  # past_key_values.N.key
        portable.attention(q, k, v, bias, layer, n_head, n_kv_head, D, name)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
