#!/usr/bin/env bash
# Type checks. Checkers cannot follow the import hook of an editable install, so show them the package as folders.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/package_view.sh build/types
MYPYPATH=build/types .venv/bin/mypy --package portlm --cache-dir build/mypy
