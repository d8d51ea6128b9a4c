#!/usr/bin/env bash
# Compile the kernels for 64-bit ARM with a cross compiler, and run their tests on an emulated processor (qemu), with a
# Python, NumPy and PyTorch for it. Packages are unpacked into build/aarch64 and installed nowhere; the cross compiler and
# qemu are Debian's.
#
#     scripts/aarch64.sh compile    only compile, any warning being an error; without a compiler, say so and succeed
#     scripts/aarch64.sh [TESTS]    compile and run tests, on processors with and without the dot product
#
# An emulator orders memory as this machine does, and says nothing of speed.
set -euo pipefail
cd "$(dirname "$0")/.."

host=$PWD/.venv/bin/python
build=$PWD/build/aarch64
root=$build/root site=$build/site package=$build/package
compiler=aarch64-linux-gnu-g++

say() { printf 'aarch64: %s\n' "$*" >&2; }

# What is missing of the programs given as PROGRAM=PACKAGE is installed where that is possible without asking; 1 if not.
provide() {
  local missing=()
  for pair in "$@"; do command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}"); done
  [ ${#missing[@]} = 0 ] && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]} (apt-get)"
    local install=(apt-get install -y -qq --no-install-recommends "${missing[@]}")
    export DEBIAN_FRONTEND=noninteractive
    { "${install[@]}" || { apt-get update -qq && "${install[@]}"; }; } >/dev/null 2>&1 && return
  fi
  say "missing; on Debian or Ubuntu: apt-get install ${missing[*]}"
  return 1
}

# Compiles for the Python $1, whose headers are in $2; the extension is $build/_C.so.
compile() {
  local objects=$build/objects tools=$build/tools
  if [ ! -d "$tools/pybind11" ]; then
    PIP_CONSTRAINT=constraints.txt "$host" -m pip install --quiet --target "$tools" cmake ninja pybind11
  fi
  export PATH=$tools/cmake/data/bin:$tools/bin:$PATH
  cmake -S . -B "$objects" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS=-Werror -DPORTLM_CUDA=OFF \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$compiler \
    -Dpybind11_DIR="$tools/pybind11/share/cmake/pybind11" -DPython_EXECUTABLE="$1" -DPython_INCLUDE_DIR="$2" \
    -DPORTLM_OUTPUT_DIRECTORY="$build" >"$build/configure.log" || { cat "$build/configure.log" >&2; exit 1; }
  cmake --build "$objects" --parallel >"$build/compile.log" || { cat "$build/compile.log" >&2; exit 1; }
}

mkdir -p "$build"
if [ "${1:-}" = compile ]; then
  provide $compiler=g++-aarch64-linux-gnu || { say "nothing was compiled"; exit 0; }
  include=$("$host" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  # Debian's pyconfig.h includes the processor's own. For compiling alone this machine's will do, whose types are as long.
  mkdir -p "$build/headers/aarch64-linux-gnu"
  ln -sfn "/usr/include/$(uname -m)-linux-gnu/${include##*/}" "$build/headers/aarch64-linux-gnu/${include##*/}"
  export CPLUS_INCLUDE_PATH=$build/headers
  compile "$host" "$include"
  say "everything compiles"
  exit 0
fi

provide $compiler=g++-aarch64-linux-gnu qemu-aarch64=qemu-user || exit 2
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
  say "apt-get and dpkg-deb are needed to fetch Debian's packages for the processor"
  exit 2
}

if [ ! -e "$root/complete" ]; then
  say "fetching Debian's Python for the processor"
  apt=$build/apt
  mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$root"
  : >"$apt/status"
  fetch=(apt-get -qq -o Dir::State="$apt" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt"
    -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false -o Acquire::Languages=none)
  { "${fetch[@]}" update &&
    "${fetch[@]}" --download-only -y install python3-minimal libpython3-stdlib libpython3-dev libgomp1 libstdc++6; } \
    >"$build/apt.log" 2>&1 || {
    say "apt-get found no packages for arm64 where this machine's sources point ($build/apt.log)"
    exit 2
  }
  for package_file in "$apt"/archives/*.deb; do dpkg-deb -x "$package_file" "$root"; done
  for headers in "$root"/usr/include/python3.*; do  # here Debian's stand-in looks for the real one beside the system's headers
    ln -sf "../aarch64-linux-gnu/${headers##*/}/pyconfig.h" "$headers/pyconfig.h"
  done
  touch "$root/complete"
fi

# A program that runs it, so that tests can start Python in turn.
python=$build/bin/python
mkdir -p "$build/bin"
cat >"$python" <<END
#!/bin/sh
PYTHONHOME="$root/usr" exec qemu-aarch64 -L "$root" -0 "\$0" "$root/usr/bin/python3" "\$@"
END
chmod +x "$python"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

if [ ! -e "$site/complete" ]; then
  say "installing PyTorch and what the tests need (pip)"
  into=("$host" -m pip install --quiet --disable-pip-version-check --upgrade --target "$site" --only-binary=:all:
    --implementation cp --python-version "$version")
  for glibc in 28 27 17; do into+=(--platform "manylinux_2_${glibc}_aarch64"); done
  into+=(--platform manylinux2014_aarch64)
  # pip judges conditions by the machine that it runs on, so PyTorch comes without what it would ask for here; and at a
  # version that has no CUDA in it for this processor.
  "${into[@]}" --no-deps torch==2.9.1
  "${into[@]}" -c <(grep -v '^torch==' constraints.txt) typing-extensions filelock sympy networkx fsspec jinja2 \
    numpy msgspec tokenizers safetensors click rich pytest hypothesis
  touch "$site/complete"
fi

compile "$python" "$root/usr/include/python$version"
scripts/package_view.sh "$package"
mv "$build/_C.so" "$package/portlm/"

# emulated PROCESSOR INSTRUCTIONS COMMAND...
emulated() { QEMU_CPU=$1 PORTLM_ISA=$2 PYTHONPATH=$package:$site OMP_NUM_THREADS=2 "$python" "${@:3}"; }
plain=cortex-a57 dots=neoverse-n1
chooses() {
  local usable
  usable=$(emulated "$1" "" -c 'from portlm import _C; print(*_C.usable_isas())')
  [ "$usable" = "$2" ] || { say "$1 should run $2, and runs $usable"; exit 1; }
}
chooses $plain "scalar neon"
chooses $dots "scalar neon neon_dotprod"

# The same tokens as here. Torch and onnx, which make the files, are this machine's.
models=$build/models
if [ ! -d "$models" ]; then
  "$host" scripts/same_tokens.py make "$models.new"
  mv "$models.new" "$models"
fi
"$host" scripts/same_tokens.py write "$models" >"$build/tokens-here.json"
for processor in $plain=scalar $plain=neon $dots=neon_dotprod; do
  isa=${processor#*=}
  emulated "${processor%=*}" "$isa" scripts/same_tokens.py write "$models" >"$build/tokens-$isa.json"
  say "$isa beside this machine"
  "$host" scripts/same_tokens.py compare "$build/tokens-here.json" "$build/tokens-$isa.json"
done

# All kernels with plain NEON; with the dot product and without vectors those that multiply or choose by whole numbers. Not what
# compiles models, looks at object files or takes an emulator too long.
ops=()
for file in tests/ops/test_*.py; do
  case $file in */test_matrix.py | */test_registry.py | */test_symbols.py | */test_cuda*.py) ;; *) ops+=("$file") ;; esac
done
dot_ops=(tests/ops/test_packed_linear.py tests/ops/test_token_{selection,scores}.py)
if [ $# -gt 0 ]; then ops=("$@") dot_ops=("$@"); fi
run=(-m pytest -q -p no:cacheprovider -k "not opcheck and not compile")
emulated $plain neon "${run[@]}" "${ops[@]}"
emulated $dots neon_dotprod "${run[@]}" "${dot_ops[@]}"
emulated $plain scalar "${run[@]}" "${dot_ops[@]}"
