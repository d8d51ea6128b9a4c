#!/usr/bin/env bash
# Make the Vulkan engine usable: if the loader or a driver that it accepts is missing, install them where that is
# possible without asking (root on Debian or Ubuntu), and otherwise say what to run. Never a reason to fail.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

usable() {
  .venv/bin/portlm doctor --json 2>/dev/null | .venv/bin/python -c '
import json, sys
rows = json.load(sys.stdin)["engines"]
sys.exit(not any(row["engine"] == "ort" and row["device"] == "vulkan" and row["available"] for row in rows))'
}

usable && exit 0

. /etc/os-release 2>/dev/null || ID=unknown
suite=()
backports=""
if [ "$ID" = debian ] && [ "${VERSION_ID:-0}" -le 12 ]; then
  # Debian 12's own Mesa lacks a feature that the engine requires; its backports have a newer one.
  backports="$VERSION_CODENAME-backports"
  suite=(-t "$backports")
fi
advice="apt-get install ${suite[*]} libvulkan1 mesa-vulkan-drivers"
[ -n "$backports" ] && advice="$advice   (after adding the suite $backports to the apt sources)"

if [ "$ID" != debian ] && [ "$ID" != ubuntu ]; then
  say "no usable Vulkan driver: install your system's Vulkan loader and driver for engine ort:vulkan; going on without"
  exit 0
fi
if [ "$(id -u)" != 0 ]; then
  say "no usable Vulkan driver: for engine ort:vulkan run as root: $advice; going on without"
  exit 0
fi

if [ -n "$backports" ] && ! apt-cache policy 2>/dev/null | grep -q "$backports"; then
  # The machine's own Debian sources, with the suite's name changed, so that a local mirror stays in use.
  list=/etc/apt/sources.list.d/portlm-backports
  if [ -f /etc/apt/sources.list.d/debian.sources ]; then
    awk -v suite="$backports" -v name="$VERSION_CODENAME" '
      BEGIN { RS = ""; ORS = "\n\n"; FS = "\n" }
      $0 ~ ("Suites:[^\n]*" name) && $0 !~ /security/ { gsub(/Suites:[^\n]*/, "Suites: " suite); print; exit }
    ' /etc/apt/sources.list.d/debian.sources >"$list.sources"
  else
    awk -v suite="$backports" -v name="$VERSION_CODENAME" '
      $1 == "deb" { for (i = 2; i <= NF; i++) if ($i == name) { $i = suite; print; exit } }
    ' /etc/apt/sources.list /etc/apt/sources.list.d/*.list >"$list.list" 2>/dev/null || true
  fi
fi

say "installing the Vulkan loader and a software driver (apt-get)"
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq libvulkan1 && apt-get install -y -qq "${suite[@]}" mesa-vulkan-drivers; } >/dev/null 2>&1; then
  say "apt-get could not install a Vulkan driver; to see why, run: $advice; going on without"
  exit 0
fi
usable || say "a Vulkan driver was installed, but the engine does not accept it: 'portlm doctor' says why; going on without"
