#!/usr/bin/env bash
# Create .venv and install portlm with everything that the demo and the tests use, at the versions of constraints.txt.
# A second call finds the stamps it left and does nothing; a changed kernel is compiled again, and only that.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  say "portlm needs Python 3.11 or newer, and '$python' is not: set PYTHON to one that is"
  exit 2
}
command -v c++ >/dev/null || {
  say "a C++ compiler is needed to build the kernels: install g++ or clang++"
  exit 2
}

digest() { cat "$@" | sha256sum | cut -d' ' -f1; }
stamps=.venv/.portlm
packages=$(digest pyproject.toml constraints.txt)
sources=$(digest setup.py CMakeLists.txt $(find csrc -type f | sort))

if [ ! -x .venv/bin/python ]; then
  say "creating .venv"
  "$python" -m venv .venv
fi
mkdir -p "$stamps"

# pip applies this to isolated build environments too
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1
if [ "$(cat "$stamps/packages" 2>/dev/null)" != "$packages" ]; then
  say "installing packages (a few minutes the first time)"
  # first and alone: a later resolution must find this build, not choose one with gigabytes of CUDA packages
  .venv/bin/pip install --quiet "$(grep '^torch==' constraints.txt)"
  .venv/bin/pip install --quiet --editable '.[all,dev]'
  echo "$packages" >"$stamps/packages"
  echo "$sources" >"$stamps/sources"
elif [ "$(cat "$stamps/sources" 2>/dev/null)" != "$sources" ]; then
  say "building the changed kernels"
  .venv/bin/pip install --quiet --no-deps --editable .
  echo "$sources" >"$stamps/sources"
fi

if [ ! -e "$stamps/vulkan" ]; then
  scripts/vulkan.sh && touch "$stamps/vulkan"
fi
