#!/usr/bin/env bash
# ONNX Runtime 1.31.1, wheel of PyPI for Linux x86-64: importing it writes a device id and a database of events into the
# user's cache folder, and a file .ses into the folder for temporary files, before anything was asked of it.
#
# Its own switch, onnxruntime.disable_telemetry_events(), can only be called after the import and leaves the files there.
# ORT_DISABLE_TELEMETRY=1 in the environment before the import prevents them. What portlm does: core/ort_support.py.
#
# Output seen on 1.31.1 (exit code 0 means that it still behaves so):
#   plain import:              .ses deviceid onnxruntime.db
#   disable_telemetry_events:  .ses deviceid onnxruntime.db
#   ORT_DISABLE_TELEMETRY=1:   nothing
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.31.1 numpy==2.4.6

left() {  # name, Python code, VARIABLE=value...: what the code leaves in a fresh home
  local name=$1 code=$2 home
  shift 2
  home=$(mktemp -d "$work/home.XXXX")
  env -i PATH="$PATH" HOME="$home" XDG_CACHE_HOME="$home/cache" TMPDIR="$home" PYTHONDONTWRITEBYTECODE=1 "$@" \
    "$work/venv/bin/python" -c "$code"
  found=$(find "$home" -type f -printf '%f\n' | sort | paste -sd ' ')
  printf '%-26s %s\n' "$name:" "${found:-nothing}"
}

failed=0
expect() { [ "$found" = "$1" ] || { echo "  changed: '$1' was seen before" >&2; failed=1; }; }
left "plain import" "import onnxruntime"
expect ".ses deviceid onnxruntime.db"
left "disable_telemetry_events" "import onnxruntime; onnxruntime.disable_telemetry_events()"
expect ".ses deviceid onnxruntime.db"
left "ORT_DISABLE_TELEMETRY=1" "import onnxruntime" ORT_DISABLE_TELEMETRY=1
expect ""
exit "$failed"
