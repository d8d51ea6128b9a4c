#!/usr/bin/env bash
# Run the tests of kernels and of packed files on an extension that gcc's address and undefined-behaviour sanitizers
# watch: whatever reads or writes beside its memory, overflows or divides by zero ends the test that does it.
#
#     scripts/sanitize.sh [ISAS]      such as "scalar;avx2"; without it scalar and the widest that this machine has
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
build=$PWD/build/sanitize
tools=$build/tools package=$build/package

# Of the widest set also the narrower one whose kernels it takes over.
isas=${1:-$("$python" -c '
from portlm import _C
usable = _C.usable_isas()
print(*dict.fromkeys(["scalar", usable[-1].partition("_")[0], usable[-1]]), sep=";")')}

if [ ! -d "$tools/pybind11" ]; then
  PIP_CONSTRAINT=constraints.txt "$python" -m pip install --quiet --target "$tools" cmake ninja pybind11
fi
scripts/package_view.sh "$package"

export PATH=$tools/cmake/data/bin:$tools/bin:$PATH
cmake -S . -B "$build/objects" -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g1" \
  -DPORTLM_SANITIZE=ON -DPORTLM_ISAS="$isas" -DPORTLM_CUDA=OFF -DPORTLM_OUTPUT_DIRECTORY="$package/portlm" \
  -Dpybind11_DIR="$tools/pybind11/share/cmake/pybind11" -DPython_EXECUTABLE="$python" >"$build/configure.log"
cmake --build "$build/objects" --parallel

# Python is not compiled with them, so they are loaded before it; behind them the library whose exceptions they look at.
library() { "${CXX:-c++}" -print-file-name="$1"; }
export LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" PYTHONPATH=$package
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1

# One float more than there is: what does not see this sees nothing.
overrun='
import numpy as np
from portlm import _C
x = np.zeros(1024, np.float32)
_C.swiglu_fwd(*3 * [x.ctypes.data], 1025)'
if "$python" -c "$overrun" 2>"$build/overrun.log" || ! grep -q heap-buffer-overflow "$build/overrun.log"; then
  echo "sanitize: a kernel wrote behind its memory, and nothing was reported ($build/overrun.log)" >&2
  exit 1
fi

# Not those that compile models, look at object files, need a GPU, or measure memory, of which a sanitizer keeps much.
ignored=()
for other in tests/ops/test_{matrix,registry,symbols}.py tests/ops/test_cuda*.py; do ignored+=(--ignore "$other"); done
ignored+=(--deselect "tests/ops/test_linear_cross_entropy.py::test_linear_cross_entropy_takes_a_fraction_of_the_memory_of_the_logits")
# and not the one whose child has no room for a sanitizer in its bounded memory
ignored+=(--deselect "tests/runtimes/test_packed_engine.py::test_it_is_compiled_at_first_use")
pytest=("$python" -m pytest -n 2 --dist loadfile -q -p no:cacheprovider)
"${pytest[@]}" "${ignored[@]}" tests/ops tests/compile/test_packed.py tests/runtimes/test_packed_engine.py
PORTLM_ISA=scalar "${pytest[@]}" "${ignored[@]}" tests/ops

# The kernels of CUDA, as compiled for the CPU: a tensor's end is watched for them, too.
emulated=$build/cuda_on_cpu.so
env -u LD_PRELOAD CUDA_ON_CPU_FLAGS="-fsanitize=address --param asan-stack=0" scripts/cuda_on_cpu.sh "$emulated"
export PORTLM_CUDA_ON_CPU=$emulated
overrun='
import ctypes, os, numpy as np
library = ctypes.CDLL(os.environ["PORTLM_CUDA_ON_CPU"])
x = np.zeros(32, np.float32)
library.cuda_on_cpu_reverse(x.ctypes.data_as(ctypes.c_void_p), 33, 0)'
if "$python" -c "$overrun" 2>"$build/overrun.log" || ! grep -q heap-buffer-overflow "$build/overrun.log"; then
  echo "sanitize: an emulated kernel wrote behind its memory, and nothing was reported ($build/overrun.log)" >&2
  exit 1
fi
"${pytest[@]}" --dist load -k "emulated and not test_cuda_on_cpu" tests/ops/test_cuda*.py
