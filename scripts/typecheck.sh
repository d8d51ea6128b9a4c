#!/usr/bin/env bash
# Type checks. Checkers cannot follow the import hook of an editable install, so show them the package as folders.
set -euo pipefail
cd "$(dirname "$0")/.."

view=build/types/portlm
rm -rf build/types
mkdir -p "$view"
for entry in core/*; do
  case $entry in *__pycache__ | *.so) ;; *) ln -s "$PWD/$entry" "$view/$(basename "$entry")" ;; esac
done
ln -s "$PWD/compile" "$view/compile"
ln -s "$PWD/runtimes" "$view/runtimes"
MYPYPATH=build/types .venv/bin/mypy --package portlm --cache-dir build/mypy
