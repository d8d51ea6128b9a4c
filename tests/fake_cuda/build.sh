#!/usr/bin/env bash
# Build the fake GPU into a folder: libcuda.so.1, libcudart.so.13, and the emulator that kernels are linked with.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cxx=${CXX:-c++}
flags=(-std=c++17 -O1 -fPIC -Wall -Wextra)
"$cxx" "${flags[@]}" -shared "$here/driver.cpp" -o "$1/libcuda.so.1" -Wl,-soname,libcuda.so.1 -ldl
"$cxx" "${flags[@]}" -shared "$here/runtime.cpp" -o "$1/libcudart.so.13" -Wl,-soname,libcudart.so.13 \
  -Wl,--version-script="$here/runtime.map" -Wl,--no-as-needed "$1/libcuda.so.1"
"$cxx" "${flags[@]}" -fvisibility=hidden -I"$here/../cuda_on_cpu" -c "$here/../cuda_on_cpu/emulator.cpp" -o "$1/emulator.o"
