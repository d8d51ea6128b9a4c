"""A cache of 8 bits in TVM's portable profile: that products read its bytes, and what those products compute."""

import re

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")

import tvm
from tvm import relax

from portlm.artifact import read_manifest
from portlm.compile.export import export
from portlm.compile.tvm_build import read_graph
from portlm.compile.tvm_byte_cache import read_bytes
from portlm.compile.tvm_portable import LOWERING
from portlm.compile.tvm_schedule import cpu_passes


def product(width, turned, slots):
    """A module that multiplies (B, 2, T, ...) by a cache (B, 2, S, width) that it casts, or by its transpose."""
    builder, (batch, tokens) = relax.BlockBuilder(), (tvm.tirx.Var(name, "int64") for name in "bt")
    left = width if turned else slots
    a = relax.Var("a", relax.TensorType((batch, 2, tokens, left), "float32"))
    b = relax.Var("b", relax.TensorType((batch, 2, slots, width), "int8"))
    with builder.function("main", [a, b]):
        with builder.dataflow():
            right = builder.emit(relax.op.astype(b, "float32"))
            if turned:
                right = builder.emit(relax.op.permute_dims(right, [0, 1, 3, 2]))
            result = builder.emit_output(relax.op.matmul(a, right))
        builder.emit_func_output(result)
    return builder.get()


@pytest.mark.parametrize("turned", [False, True], ids=["shares @ values", "queries @ keys^T"])
@pytest.mark.parametrize("width", [6, 7, 64])
def test_a_product_of_bytes_equals_the_oracle(width, turned):
    slots, target = tvm.tirx.Var("s", "int64"), tvm.target.Target({"kind": "llvm"})
    module = read_bytes(product(width, turned, slots))
    assert "astype" not in module["main"].script()
    library = relax.build(module, target, relax_pipeline=tvm.transform.Sequential(cpu_passes(target)))
    machine, rng = relax.VirtualMachine(library, tvm.cpu()), np.random.default_rng(0)
    for B, T, S in ((1, 1, 1), (2, 3, 17)):
        a = rng.standard_normal((B, 2, T, width if turned else S), dtype=np.float32)
        b = rng.integers(-127, 128, (B, 2, S, width)).astype(np.int8)
        wide = b.astype(np.float64)
        expected = a.astype(np.float64) @ (wide.swapaxes(2, 3) if turned else wide)
        result = machine["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b)).numpy()
        # sums of at most 64 products of size 127, each rounded once
        np.testing.assert_allclose(result, expected, rtol=0, atol=64 * 127 * 1e-6, equal_nan=False)


def test_a_cast_that_something_else_reads_stays():
    builder = relax.BlockBuilder()
    a = relax.Var("a", relax.TensorType((1, 2, 3, 5), "float32"))
    b = relax.Var("b", relax.TensorType((1, 2, 5, 4), "int8"))
    with builder.function("main", [a, b]):
        with builder.dataflow():
            wide = builder.emit(relax.op.astype(b, "float32"))
            result = builder.emit(relax.op.matmul(a, wide))
            both = builder.emit_output(relax.Tuple([result, wide]))
        builder.emit_func_output(both)
    script = read_bytes(builder.get())["main"].script()
    assert "astype" in script
    assert "matmul_of_bytes" in script
    assert "R.matmul" not in script


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_cache_of_a_model_becomes_floats_as_a_whole(checkpoints, tmp_path, family):
    """Keys and values of each layer are multiplied as bytes; what is cast from int8 is nothing."""
    folder = export(checkpoints[family], tmp_path / "out", cache="int8", profiles=["portable"])
    module = read_graph(folder, "decoder", "portable")
    for _, step in LOWERING.graph:
        before, module = module, step(module)
    layers = len(read_manifest(folder).roles["decoder"].state) // 4  # keys, values, and the scales of both
    products = re.findall(r"call_tir\(cls\.(\w*matmul_of_bytes)", module.script())
    assert len(products) == 2 * layers
    assert len([name for name in products if name.startswith("NT_")]) == layers
    widening = re.compile(r"R.astype\([^\n]*float32")
    assert widening.search(cast_from_int8(before["main"].script()))
    assert not widening.search(cast_from_int8(module["main"].script()))


def cast_from_int8(script):
    """Lines of a script that read something of int8."""
    names = re.findall(r'(\w+)\s*: R.Tensor\(\([^\n]*?\), (?:dtype=)?"int8"\)', script)
    assert names
    return "\n".join(line for line in script.splitlines() if set(re.findall(r"\w+", line)) & set(names))
