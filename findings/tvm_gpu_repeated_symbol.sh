#!/usr/bin/env bash
# TVM 0.27.0.post1, wheel of PyPI for Linux x86-64: its default pipeline for GPUs does not compile a concatenation along
# whose axis one symbolic size counts twice, such as s + p + p. Two sizes, or three different ones, compile, and so does
# the same module for the CPU.
#
# The rule that schedules what no other rule does (dlight's Fallback) fuses all loops of the result; behind s + 2 p the
# fused loop's divisibility is not proved, and the check raises InternalError instead of leaving the loops apart. Caches
# that are put together step by step have such sizes. What helps: a schedule that gives the loops to threads one by one.
#
# Output seen (exit code 0 means that it still behaves so):
#   cuda:   s + p compiles, s + p + q compiles, s + p + p raises InternalError
#   webgpu: s + p compiles, s + p + q compiles, s + p + p raises InternalError
#   llvm:   s + p compiles, s + p + q compiles, s + p + p compiles
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.15.post2 numpy==2.4.6
cat > "$work/compile.py" <<'PYTHON'
import sys

import tvm
from tvm import relax, tirx


def module(names):
    b, sizes = tirx.Var("b", "int64"), {name: tirx.Var(name, "int64") for name in names}
    builder = relax.BlockBuilder()
    parts = [relax.Var(f"x{i}", relax.TensorType([b, sizes[name], 4], "float32")) for i, name in enumerate(names)]
    with builder.function("main", parts):
        with builder.dataflow():
            whole = parts[0]
            for part in parts[1:]:
                whole = builder.emit(relax.op.concat([whole, part], 1))
            result = builder.emit_output(relax.op.exp(whole))
        builder.emit_func_output(result)
    return builder.get()


def scheduled(names, target):
    # Scheduling is where it happens: no CUDA compiler is needed.
    pipeline = relax.get_default_pipeline(target)
    try:
        with target:
            pipeline(module(names))
    except tvm.error.InternalError:
        return "raises InternalError"
    return "compiles"


HOST = {"kind": "llvm"}
TARGETS = {
    "cuda": {"kind": "cuda", "arch": "sm_80", "host": HOST},
    "webgpu": {"kind": "webgpu", "max_num_threads": 256, "max_shared_memory_per_block": 16384, "host": HOST},
    "llvm": HOST,
}
found = {}
for kind, description in TARGETS.items():
    target = tvm.target.Target(description)
    found[kind] = [scheduled(names, target) for names in ("sp", "spq", "spp")]
    said = ", ".join(f"{' + '.join(names)} {what}" for names, what in zip(("sp", "spq", "spp"), found[kind]))
    print(f"{kind + ':':7} {said}")
fine, broken = ["compiles"] * 3, ["compiles", "compiles", "raises InternalError"]
sys.exit(0 if found == {"cuda": broken, "webgpu": broken, "llvm": fine} else 1)
PYTHON
"$work/venv/bin/python" "$work/compile.py"
