#!/usr/bin/env bash
# Make FOLDER/portlm, the package as links to its folders but without a compiled extension: for who does not follow the import
# hook of an editable install, or brings an extension of its own.
#
#     scripts/package_view.sh FOLDER      what is there is replaced
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$1"
mkdir -p "$1/portlm"
for entry in "$root"/core/*; do
  case $entry in *__pycache__ | *.so) ;; *) ln -s "$entry" "$1/portlm/" ;; esac
done
ln -s "$root/compile" "$root/runtimes" "$1/portlm/"
