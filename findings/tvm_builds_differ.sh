#!/usr/bin/env bash
# TVM 0.27.0.post1, wheel of PyPI for Linux x86-64: the same module built again in the same process for the same target
# gives another library. Several symbolic extents, made anew for each build, are enough; a module whose shapes are numbers gives the same bytes.
#
# Seen in the machine code: shapes that are computed from the extents are stored in another order, so the libraries do
# the same. Whoever caches a library by its digest, or claims a reproducible build, is surprised. What portlm does: it
# records the digest of the bytes that it built, and claims equal bytes of exported graphs only.
#
# Output seen (exit code 0 means that it still behaves so; the second number varies from run to run, 3 to 5 were seen):
#   numbers:  40 builds, 1 library
#   symbolic: 40 builds, 4 different libraries
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.15.post2 numpy==2.4.6
cat > "$work/build.py" <<'PYTHON'
import hashlib
import pathlib
import sys
import tempfile

import tvm
from tvm import relax, tirx


def module(b, p, s):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([b, s, 8], "float32"))
    y = relax.Var("y", relax.TensorType([b, 2, p, 4], "float32"))

    def call(name, inputs, shape):
        kind = relax.TensorType(shape, "float32")
        return builder.emit(relax.op.call_dps_packed(name, relax.Tuple(inputs), kind))

    with builder.function("main", [x, y]):
        with builder.dataflow():
            first = call("f", [x, y], [b, s, 24])
            second = call("g", [first], [b, s, 16])
            third = call("h", [second, y], [b, 2, p + s, 4])
            result = builder.emit_output(relax.Tuple([second, third]))
        builder.emit_func_output(result)
    return builder.get()


def builds(extents):
    digests = set()
    for _ in range(40):
        target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
        built = relax.build(module(*extents()), target, exec_mode="compiled")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "library.so"
            built.export_library(str(path), workspace_dir=folder)
            digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    return len(digests)


numbers = builds(lambda: (1, 2, 3))
symbolic = builds(lambda: [tirx.Var(name, "int64") for name in "bps"])
print(f"numbers:  40 builds, {numbers} librar{'y' if numbers == 1 else 'ies'}")
print(f"symbolic: 40 builds, {symbolic} different libraries")
sys.exit(0 if numbers == 1 and symbolic > 1 else 1)
PYTHON
"$work/venv/bin/python" "$work/build.py"
