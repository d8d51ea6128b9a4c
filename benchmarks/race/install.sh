#!/usr/bin/env bash
# The rivals of the race, in an environment of their own on top of the one that has portlm, which is left as it is.
#
#     benchmarks/race/install.sh FOLDER [PYTHON]      PYTHON: of the environment with portlm (default: .venv/bin/python)
#     FOLDER/bin/python benchmarks/race/race.py
#
# llama.cpp is compiled for this very processor, which takes twenty minutes on two cores; a second call does not repeat
# it. Whatever cannot be installed is said at the end and is a row in the table of the race.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [PYTHON]" >&2; exit 2; }
mkdir -p "$1" && folder=$(cd "$1" && pwd)
base=${2:-$root/.venv/bin/python}

LLAMA=llama-cpp-python==0.3.36
GGUF=gguf==0.19.0
GENAI="onnxruntime-genai==0.18.0 onnx_ir==1.1.0"
OPENVINO="openvino==2026.4.1"
NNCF="nncf==3.4.0"

# Packages of the environment below are seen, and pip installs nothing that is there already.
"$base" -m venv --without-pip "$folder" || exit 1
below=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
here=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$below')" > "$here/portlm-environment.pth"
export PIP_DISABLE_PIP_VERSION_CHECK=1 CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2}
pip=("$folder/bin/python" -m pip)
"${pip[@]}" --version > /dev/null || { echo "$base has no pip" >&2; exit 1; }

failed=()
install() { # NAME ARGUMENTS...
  local name=$1; shift
  echo "== $name"
  "${pip[@]}" install -q -c "$root/constraints.txt" "$@" || failed+=("$name")
}

install gguf "$GGUF"
# shellcheck disable=SC2086 # several packages each
install onnxruntime-genai $GENAI
install openvino "$OPENVINO"
install nncf "$NNCF"
if ! compgen -G "$folder/wheels/llama_cpp_python-*.whl" > /dev/null; then
  echo "== llama.cpp, compiled for this processor"
  # gcc 12.2 takes _tile_loadconfig for a reader of eight bytes and drops what a function wrote of the other 56, and llama.cpp's own
  # products on AMX end in a fault. Without the passes that drop it they are right, and everything else is as fast.
  amx=""; grep -qsw amx_tile /proc/cpuinfo && amx="-fno-tree-dse -fno-dse"
  # Not from pip's cache: a wheel there may have been compiled for another processor.
  CXXFLAGS="${CXXFLAGS:-} $amx" CMAKE_ARGS="-DGGML_NATIVE=ON" "${pip[@]}" wheel -q --no-cache-dir --no-deps --no-binary llama-cpp-python \
    -w "$folder/wheels" "$LLAMA" || failed+=("llama.cpp")
fi
compgen -G "$folder/wheels/llama_cpp_python-*.whl" > /dev/null && install llama-cpp-python "$folder"/wheels/llama_cpp_python-*.whl

[ ${#failed[@]} -eq 0 ] || { printf 'not installed: %s\n' "${failed[@]}"; }
echo "now: $folder/bin/python benchmarks/race/race.py --list"
[ ${#failed[@]} -eq 0 ]
