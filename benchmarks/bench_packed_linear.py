"""packed_linear, with activations of 15 and of 8 bits, against float32 weights and MatMulNBits of ONNX Runtime.

One row at a time, as a generated token has it, where reading the weights is the limit: each call goes over as many
copies of the matrix as lie far beyond the caches. The same with one copy, which stays in a cache. Then 512 rows, as a
prompt has, beside the peak of byte products: packed_linear makes two per weight and activation, packed_linear_a8 one.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from harness import Case, fresh_pages, main

from portlm import _C
from portlm.ops.linear import linear

FAR = 200 << 20  # bytes of copies: more than any cache keeps
# (rows, K, N, bits, group): decoding from memory, from a cache, and a prompt
DECODE = [
    (1, 4096, 1024, 4, 32), (1, 1024, 4096, 4, 32), (1, 1024, 32000, 4, 32), (1, 1024, 32000, 4, 64),
    (1, 4096, 1024, 8, 32), (1, 1024, 32000, 8, 64), (4, 1024, 4096, 4, 32),
]  # fmt: skip
CACHED = [
    (1, 256, 256, 4, 32),
    (1, 512, 512, 4, 32),
    (1, 1024, 1024, 4, 32),
    (1, 1024, 1024, 4, 64),
    (8, 1024, 1024, 4, 32),
]
PROMPT = [(512, 1024, 4096, 4, 32), (512, 4096, 1024, 4, 64), (512, 1024, 4096, 8, 32)]
# Of MatMulNBits at its fastest and packed_linear_a8, which round to 7 bits and a sign: 0.4 % of the largest of a group.
TOLERANCE = 0.03


class Quantized:
    """Random weights (N, K) in the layout of MatMulNBits, symmetric, as the kernels read them and as numbers."""

    def __init__(self, K: int, N: int, bits: int, group: int) -> None:
        rng = np.random.default_rng(0)
        self.K, self.N, self.bits, self.group = K, N, bits, group
        q = rng.integers(0, 1 << bits, (N, K // group, group), dtype=np.uint8)
        self.q = q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4
        self.scales = rng.uniform(0.001, 0.002, (N, K // group)).astype(np.float16).astype(np.float32)
        centred = q.astype(np.float32) - (1 << (bits - 1))
        self.w = torch.from_numpy((self.scales[:, :, None] * centred).reshape(N, K))
        self.size = _C.packed_size(N, K, group, bits, 0)

    def packed(self, copies: int) -> torch.Tensor:
        """Return copies side by side, in large pages as the weights of a whole model can have."""
        memory = fresh_pages(copies * self.size)
        for copy in range(copies):
            _C.pack_matrix(
                self.q.ctypes.data, self.scales.ctypes.data, 0, memory.data_ptr() + copy * self.size,
                self.N, self.K, self.group, self.bits,
            )  # fmt: skip
        return memory


def ours(
    m: Quantized, x: torch.Tensor, copies: int, memory: torch.Tensor, kernel: Callable[..., None]
) -> Callable[[], torch.Tensor]:
    y = torch.empty(x.shape[0], m.N)
    addresses = [memory.data_ptr() + copy * m.size for copy in range(copies)]

    def call(memory: torch.Tensor = memory) -> torch.Tensor:  # which stays as long as the call
        for address in addresses:
            kernel(x.data_ptr(), address, 0, y.data_ptr(), x.shape[0], m.N, m.K, m.group, m.bits, 0, 0)
        return y

    return call


def float32(m: Quantized, x: torch.Tensor, copies: int) -> Callable[[], torch.Tensor]:
    weights = [m.w.clone() for _ in range(copies)]

    @torch.no_grad()
    def call() -> torch.Tensor:
        for weight in weights:
            y = linear(x, weight)
        return y

    return call


def onnxruntime(m: Quantized, x: torch.Tensor, copies: int) -> Callable[[], torch.Tensor]:
    """Return one run of a graph with a MatMulNBits for each copy, at its fastest accuracy level, with bound memory."""
    from onnx import TensorProto, helper, numpy_helper

    from portlm.ort_support import import_onnxruntime

    ort = import_onnxruntime()
    nodes, initializers, outputs = [], [], []
    for copy in range(copies):
        initializers += [
            numpy_helper.from_array(
                m.q ^ np.uint8(copies - 1 - copy), f"q{copy}"
            ),  # else they might become one
            numpy_helper.from_array(m.scales.ravel(), f"scales{copy}"),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"q{copy}", f"scales{copy}"], [f"y{copy}"], domain="com.microsoft",
                K=m.K, N=m.N, bits=m.bits, block_size=m.group, accuracy_level=4,
            )
        )  # fmt: skip
        outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, [x.shape[0], m.N]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        outputs,
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # not while others are measured
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString(), options,
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.numpy())
    for copy in range(copies):
        binding.bind_output(f"y{copy}")

    def call() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[-1].numpy())

    return call


def case(kind: str, rows: int, K: int, N: int, bits: int, group: int, far: int) -> Case:
    m, x = Quantized(K, N, bits, group), torch.randn(rows, K)
    copies = max(1, far // m.size)
    floats = max(
        1, far // (4 * K * N)
    )  # as many copies of these as take the same memory, and the time is per copy
    memory = m.packed(copies)
    per_copy = {"portlm": copies, "portlm a8": copies, "float32": floats, "ort": copies}
    contenders = {
        "portlm": ours(m, x, copies, memory, _C.packed_linear),
        "portlm a8": ours(m, x, copies, memory, _C.packed_linear_a8),
        "float32": float32(m, x, floats),
        "ort": onnxruntime(m, x, copies),
    }
    products = {"portlm": 4 * rows * K * N, "portlm a8": 2 * rows * K * N} if rows > 8 else {}
    moved = {"portlm": m.size, "portlm a8": m.size, "float32": 4 * K * N, "ort": m.q.nbytes + m.scales.nbytes}
    return Case(
        f"{kind} ({rows}, {K}) -> {N}, {bits} bits, groups of {group}",
        contenders,
        moved=0 if rows > 8 else moved,
        flops=2 * rows * K * N if rows > 8 else 0,
        int8=products,
        calls=per_copy,
        tolerance=TOLERANCE,
    )


def cases(smoke: bool) -> Iterator[Case]:
    if smoke:
        yield case("from memory", 1, 64, 48, 4, 32, 1 << 14)
        yield case("prompt", 20, 64, 48, 8, 32, 0)
        return
    for shape in DECODE:
        yield case("from memory", *shape, FAR)
    for shape in CACHED:
        yield case("cached", *shape, 0)
    for shape in PROMPT:
        yield case("prompt", *shape, 0)


if __name__ == "__main__":
    main("packed_linear", cases)
