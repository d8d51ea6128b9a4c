"""Lowers the fused profile for ONNX Runtime: each node of domain ai.portlm becomes the operator ORT runs fastest.

A flat list of passes, each of which knows one of ONNX Runtime's own operators.

A value keeps the name it has in the portable graph only if it is the same value, so that compile/bisect.py can
compare by name. What ORT's own optimiser does afterwards is left to it (it moves the bias of a Linear into the
normalisation that follows, for example).

Where the file goes: ONNX Runtime refuses weights outside the model's folder, by ../ and by symbolic link alike, so
the lowered graph lies in onnx/ beside the weight file and no weight is stored twice. The manifest lists it under
compiled. It opens in plain onnxruntime without any option.

Attention is GroupQueryAttention on the CPU: alone among ONNX Runtime's it takes a cache whose past and present are the
same memory, with room for more slots, and writes the new ones into it. The graph's metadata says so to who runs it
(portlm.ort_support.IN_PLACE). It refuses one thing, several new tokens of several rows on a filled cache ("batch_size
must be 1 when sequence_length > 1 and past context is given", 1.31), so there rows are read one by one. Rotary
embeddings stay nodes of their own: of a first prompt's positions it looks at the very first alone, which is wrong with
padding on the left. For calls without padding there is a second graph (compile/ort_even.py). On CUDA it has no
float32, and heads must be a multiple of 8 wide; where it cannot be, attention is MultiHeadAttention: the G query heads
that share a key/value head are stacked along time, (B, G*T, K*D), so the cache is read once and not repeated.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx

from portlm.artifact import Compiled, CompiledEntry, store_file
from portlm.compile.check import CONTRIB, check_model
from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.compile.ort_even import MASK, attributes_of, can_be_even, even_attention
from portlm.compile.ort_quantized import gather_block_quantized, matmul_nbits
from portlm.compile.passes import Note, ignore, run_passes
from portlm.compile.source import read_source
from portlm.errors import EngineUnavailableError
from portlm.ops.cached_attention import MASKED, attention_bias
from portlm.ops.masked_attention import rows_with_keys
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION
from portlm.ort_support import EVEN, IN_PLACE, ROUNDED, ROUNDED_TARGET, UNREAD, accuracy_level
from portlm.roles import file_stem

GROWN = "past + sequence"  # an extent that grows from call to call
HEAD_WIDTH = 8  # GroupQueryAttention takes multiples of it


def compile_graph(
    folder: str | Path, device: str, profile: str = "fused", role: str = "decoder", note: Note = ignore
) -> Compiled:
    """Write a role's fused graph lowered for one device.

    Args:
        folder: the artifact.
        device: "cpu", "cuda" or "vulkan".
        profile: "fused", since the portable graph runs as it is.
        role: whose graph it is.
        note: called with the name of each pass and the graph after it.

    Returns:
        What compile/build.py enters in the manifest: onnx/<role>.ort-<device>-fused.onnx, and on the CPU, where the
        graph is fit for it, another that ends in EVEN, for calls in which nothing is masked.

    Raises:
        UsageError: the artifact was exported without its fused profile.
        EngineUnavailableError: the device has no tensors of the type in which the model keeps keys and values.
        FormatError: the fused graph is not the one the manifest lists, or not one of ours.
        StorageError: the disk is full or refuses.
    """
    root = Path(folder)
    source, manifest = read_source(root, role, "fused")
    if manifest.cache is not None and device == "vulkan":
        raise EngineUnavailableError(
            f"ort:vulkan: its provider has no tensors of {manifest.cache.kind}, in which this model keeps keys and "
            "values: export it with --cache float32"
        )
    context, name = manifest.model.context_length, f"onnx/{file_stem(role)}.ort-{device}-fused.onnx"
    lowered = {name: lower_model(source, context, device, note)}
    if device == "cpu" and _grows_in_place(source.graph) and can_be_even(source):
        even = name.removesuffix(".onnx") + EVEN
        lowered[even] = lower_model(source, context, device, note, even=True)
    files = {}
    for path, model in lowered.items():
        files[path] = store_file(root, path, model.SerializeToString(deterministic=True))
        check_model(root / path)
    versions = {"portlm": version("portlm")}
    rounded = manifest.quantization is not None and accuracy_level() == ROUNDED
    target = ROUNDED_TARGET if rounded else "onnxruntime"
    entry = CompiledEntry("ort", device, "fused", target, tuple(files), versions, role=role)
    return Compiled(entry, files)


def lower_model(
    model: onnx.ModelProto, context_length: int, device: str, note: Note = ignore, even: bool = False
) -> onnx.ModelProto:
    """The graph with every ai.portlm node replaced; inputs, outputs and weights stay.

    Args:
        model: a graph of the fused profile.
        context_length: of the model.
        device: "cpu", "cuda" or "vulkan".
        note: called with each pass's name and the graph after it.
        even: for calls in which nothing is masked (compile/ort_even.py).
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    metadata["portlm.lowered"] = f"ort-{device}"
    passes = PASSES
    if device == "cpu" and _grows_in_place(model.graph):
        metadata |= IN_PLACE
    else:
        passes = tuple(rewrite for rewrite in PASSES if rewrite is not group_query_attention)

    def rewriting(rewrite: Rewrite) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
        def apply(model: onnx.ModelProto) -> onnx.ModelProto:
            domains = {CONTRIB: 1} if rewrite is portable_form else {DOMAIN: DOMAIN_VERSION, CONTRIB: 1}
            g = GraphBuilder(model.graph.name, {}, WeightFile(""), domains, context_length)
            g.adopt(model.graph)
            for node in model.graph.node:
                if node.domain != DOMAIN or not rewrite(g, node, device):
                    g.copy(node)
            return g.model(metadata)

        return apply

    steps = [(rewrite.__name__, rewriting(rewrite)) for rewrite in passes]
    if even:
        metadata[UNREAD] = MASK
        steps.insert(0, ("even_attention", lambda model: even_attention(model, context_length, metadata)))
    lowered: onnx.ModelProto = run_passes(model, steps, note)
    return lowered


def bias_gelu(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """GeluMlp: two products, between them the first bias and the activation as one node."""
    if node.op_type != "GeluMlp":
        return False
    x, w1, b1, w2, b2 = node.input
    name = node.output[0]
    gelu = "FastGelu" if attributes_of(node)["approximate"] == "tanh" else "BiasGelu"
    hidden = g.op("MatMul", (x, w1), f"{name}.hidden")
    hidden = g.op(gelu, (hidden, b1), f"{name}.act", domain=CONTRIB)
    product = g.op("MatMul", (hidden, w2), f"{name}.matmul")
    g.op("Add", (product, b2), name)
    return True


def quick_gelu(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """SwiGlu: QuickGelu with alpha 1 is silu."""
    if node.op_type != "SwiGlu":
        return False
    gate, up = node.input
    silu = g.op("QuickGelu", (gate,), f"{node.output[0]}.silu", domain=CONTRIB, alpha=1.0)
    g.op("Mul", (silu, up), node.output[0])
    return True


def skip_norm(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """The norms with the residual add in front, which also return the sum.

    RmsNorm alone is left to its portable form: ORT's single operator for it is in no ONNX operator set, and a model has
    it only once.
    """
    operators = {"AddLayerNorm": "SkipLayerNormalization", "AddRmsNorm": "SkipSimplifiedLayerNormalization"}
    if node.op_type not in operators:
        return False
    y, total = node.output
    outputs = (y, "", "", total)  # the mean and deviation between them are not needed
    g.split_op(operators[node.op_type], node.input, y, outputs, domain=CONTRIB, **attributes_of(node))
    return True


def rotary_embedding(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """Rotary: the head width follows from the tables, so the number of heads is not said twice."""
    if node.op_type != "Rotary":
        return False
    g.op("RotaryEmbedding", node.input, node.output[0], domain=CONTRIB)
    return True


def fused_matmul(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """Linear with a table (out, in): FusedMatMul spares the CPU a transposed copy; WebGPU does not have it.

    Any other Linear is a MatMul, and an Add for the bias, which ORT moves into a following normalisation.
    """
    if node.op_type != "Linear" or not attributes_of(node)["transposed"] or device == "vulkan":
        return False
    x, weight, *bias = node.input
    y = node.output[0]
    product = g.op("FusedMatMul", (x, weight), f"{y}.matmul" if bias else y, domain=CONTRIB, transB=1)
    if bias:
        g.op("Add", (product, bias[0]), y)
    return True


def group_query_attention(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """CachedAttention: GroupQueryAttention, with the portable profile's mask as its bias.

    To it all slots are real ones, also those of padding on the left: the bias hides them.
    """
    if node.op_type != "CachedAttention":
        return False
    attributes = attributes_of(node)
    q, k, v, past_key, past_value, mask = node.input
    bias = attention_bias(g, mask, 1, attributes["window"])

    def last() -> str:
        before = g.op("Sub", ("slots", g.ints(1)), "slots.before")
        column = g.op("Gather", (mask, g.axis(0)), "slots.column", axis=1)  # (B,)
        nothing = g.op("Sub", (column, column), "slots.nothing")
        rows = g.op("Sub", (before, nothing), "slots.rows")
        return g.op("Cast", (rows,), "slots.last", to=onnx.TensorProto.INT32)

    total = _slot_count(g, mask)
    inputs = (q, k, v, past_key, past_value, g.shared("slots.last", last), total, "", "", "", bias)
    settings = {"num_heads": attributes["num_heads"], "kv_num_heads": attributes["num_kv_heads"]}
    settings |= {"softcap": attributes["softcap"]} if attributes["softcap"] else {}
    name = node.output[0]
    g.split_op(
        "GroupQueryAttention",
        inputs,
        name,
        node.output,
        domain=CONTRIB,
        scale=attributes["scale"],
        **settings,
    )
    return True


def _slot_count(g: GraphBuilder, mask: str) -> str:
    """The number of slots of a mask (B, P + T), as GroupQueryAttention takes it; "slots" is the same in int64."""

    def count() -> str:
        slots = g.op("Shape", (mask,), "slots", start=1, end=2)
        return g.op("Cast", (slots,), "slots.int32", to=onnx.TensorProto.INT32)

    return g.shared("slots", count)


def multi_head_attention(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """CachedAttention: MultiHeadAttention over the key/value heads, with the portable profile's mask as its bias.

    It knows no soft cap.
    Not on Vulkan: from 32 queries on, WebGPU's MultiHeadAttention is its flash attention, which plugin 0.4 computes
    wrongly where a subgroup has 8 lanes: from the ninth query on, logits are off by 1. No option or input keeps it from
    that, so there attention stays in plain products.
    """
    if node.op_type != "CachedAttention" or device == "vulkan" or attributes_of(node)["softcap"]:
        return False
    attributes, name = attributes_of(node), node.output[0]
    q, k, v, past_key, past_value, mask = node.input
    H, K, D = attributes["num_heads"], attributes["num_kv_heads"], int(g.input_shape(past_key)[3])
    G = H // K
    bias = attention_bias(g, mask, G, attributes["window"])
    if G > 1:
        q = g.op("Reshape", (q, g.ints(0, 0, K, G, D)), f"{name}.stacked_heads")  # (B, T, K, G, D)
        q = g.op("Transpose", (q,), f"{name}.stacked_groups", perm=[0, 3, 1, 2, 4])  # (B, G, T, K, D)
        q = g.op("Reshape", (q, g.ints(0, -1, K * D)), f"{name}.stacked_queries")  # (B, G*T, K*D)
    inputs = (q, k, v, "", "", bias, past_key, past_value)
    out = name if G == 1 else f"{name}.stacked"
    options = {"num_heads": K, "scale": attributes["scale"]}
    g.split_op("MultiHeadAttention", inputs, out, (out, *node.output[1:]), domain=CONTRIB, **options)
    if G > 1:
        out = g.op("Reshape", (out, g.ints(0, G, -1, K, D)), f"{name}.stacked_out")  # (B, G, T, K, D)
        out = g.op("Transpose", (out,), f"{name}.unstacked", perm=[0, 2, 3, 1, 4])  # (B, T, K, G, D)
        g.op("Reshape", (out, g.ints(0, 0, H * D)), name)
    return True


def padded_attention(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """MaskedAttention: MultiHeadAttention, which hides keys by numbers far below any score.

    To a query that sees nothing it gives the mean of all values, which becomes 0. It has no grouped heads.
    """
    if node.op_type != "MaskedAttention" or device != "cpu":
        return False
    attributes, name = attributes_of(node), node.output[0]
    q, k, v, mask, bias = (*node.input, "", "")[:5]
    if attributes["num_heads"] != attributes["num_kv_heads"]:
        return False

    def shown() -> str:
        return g.op("Cast", (mask,), g.unique("keys.shown"), to=onnx.TensorProto.INT32)

    def one_row() -> str:
        return g.op("Unsqueeze", (bias, g.ints(0)), g.unique(f"{bias}.row"))

    row = g.shared(f"row of {bias}", one_row) if bias and attributes["bias_rank"] == 3 else bias
    inputs = [q, k, v, "", g.shared(f"shown keys of {mask}", shown) if mask else "", row]
    while not inputs[-1]:
        inputs.pop()
    options = {"num_heads": attributes["num_heads"], "scale": attributes["scale"]}
    options |= {"mask_filter_value": MASKED} if mask else {}
    out = f"{name}.seen" if mask else name
    g.op("MultiHeadAttention", inputs, out, domain=CONTRIB, **options)
    if mask:
        g.op("Mul", (out, rows_with_keys(g, mask)), name)
    return True


def attention_products(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """QuantizedAttention, and CachedAttention that no node of ONNX Runtime takes: their portable forms.

    That of bytes casts the numbers and leaves their scales to scores and weights.

    Heads are taken apart to the width that is known: with a size of -1, a step of no tokens would have no shape.
    """
    if node.op_type not in ("CachedAttention", "QuantizedAttention"):
        return False
    attributes, inputs = attributes_of(node), list(node.input)
    D = int(g.input_shape(inputs[3])[3])
    for place, heads in enumerate(("num_heads", "num_kv_heads", "num_kv_heads")):
        apart = g.ints(0, 0, attributes[heads], D)
        inputs[place] = g.op("Reshape", (inputs[place], apart), f"{node.name}.{inputs[place]}.heads")
    nodes()[node.op_type].portable(g, inputs, node.output, attributes)
    return True


def portable_form(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """Every node that no other pass took, in standard operators."""
    spec, attributes = nodes()[node.op_type], attributes_of(node)
    names = [*node.input, *[""] * (len(spec.inputs) - len(node.input))]
    for place, wanted in enumerate(spec.inputs):
        if wanted.heads:
            apart = g.ints(0, 0, attributes[wanted.heads], attributes.get("head_dim", -1))
            heads = g.unique(f"{node.name}.{wanted.name}.heads")
            names[place] = g.op("Reshape", (names[place], apart), heads)
    outputs = list(node.output)
    if spec.output_heads:
        outputs[0] = f"{node.output[0]}.apart"
    spec.portable(g, names, outputs, attributes)
    if spec.output_heads:
        g.op("Reshape", (outputs[0], g.ints(0, 0, -1)), node.output[0])
    return True


Rewrite = Callable[[GraphBuilder, onnx.NodeProto, str], bool]
"""Writes what replaces a node on a device and returns True, or leaves it and returns False."""

PASSES: tuple[Rewrite, ...] = (
    bias_gelu,
    quick_gelu,
    skip_norm,
    rotary_embedding,
    fused_matmul,
    matmul_nbits,
    gather_block_quantized,
    group_query_attention,
    multi_head_attention,
    padded_attention,
    attention_products,
    portable_form,
)
"""In order; each walks the whole graph. A new op needs none: the last one takes its portable form."""


def _grows_in_place(graph: onnx.GraphProto) -> bool:
    """Whether GroupQueryAttention can write all that grows from call to call."""
    attention = [node for node in graph.node if node.op_type == "CachedAttention" and node.domain == DOMAIN]
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)}
    grown = {value.name for value in graph.output if any(d.dim_param == GROWN for d in shapes[value.name])}
    widths = [shapes[node.input[3]][3].dim_value for node in attention]  # of past_key
    written = {name for node in attention for name in node.output[1:]}
    return bool(grown) and written == grown and not any(width % HEAD_WIDTH for width in widths)
