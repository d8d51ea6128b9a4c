#!/usr/bin/env bash
# Compile the CUDA kernels for the CPU, as FILE, for the tests (tests/shared/cuda_on_cpu.py): the sources as they are, between
# the headers of tests/cuda_on_cpu, under gcc's watch for undefined behaviour, wrong alignment included.
#
#     scripts/cuda_on_cpu.sh FILE [SOURCE.cu...]      without sources all of csrc/cuda
#     CUDA_ON_CPU_FLAGS=...                           more for the compiler: scripts/sanitize.sh has the address sanitizer watch, too
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 FILE [SOURCE.cu...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
out=$1
shift
[ $# -gt 0 ] || set -- "$root"/csrc/cuda/*.cu

objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
flags=(-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-attributes
  -fsanitize=undefined -fno-sanitize-recover=all "-DPORTLM_CUDA_ARCHITECTURES=\"cpu\"" -I"$root/tests/cuda_on_cpu" -I"$root/csrc" ${CUDA_ON_CPU_FLAGS:-})
compile() { "${CXX:-c++}" "${flags[@]}" -x c++ -c "$1" -o "$objects/$(basename "$1").o"; }
running=()
for source in "$@" "$root"/tests/cuda_on_cpu/*.cpp; do
  compile "$source" &
  running+=($!)
  if [ ${#running[@]} -ge 2 ]; then
    wait "${running[0]}"
    running=("${running[@]:1}")
  fi
done
for process in "${running[@]}"; do wait "$process"; done
"${CXX:-c++}" -shared -fsanitize=undefined ${CUDA_ON_CPU_FLAGS:-} "$objects"/*.o -o "$out"
