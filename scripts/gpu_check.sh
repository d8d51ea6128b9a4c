#!/usr/bin/env bash
# What a machine with an NVIDIA GPU has to answer, in at most ten minutes: are the CUDA parts right, and how fast are
# they? benchmarks/gpu/check.py does the work and describes the options; this finds a Python for it. That Python needs
# nothing but its own library: what is missing for a section is reported as that section's result.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "gpu_check: '$python' is not Python 3.11 or newer: set PYTHON to one that is" >&2
  exit 2
}
exec "$python" benchmarks/gpu/check.py "$@"
