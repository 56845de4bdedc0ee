#!/usr/bin/env bash
# Checks and measures qwen-server on a machine with an NVIDIA card, in at most 9 minutes and offline. It
# needs no Rust: everything comes from the folder that scripts/gpu-bundle.sh made.
#
#   usage: gpu-check.sh [BUNDLE]      default: the folder of this script, or gpu-bundle/ beside scripts/
#
# Results are written to $OUT (default ./gpu-check): results.md, results.json and logs.tar.gz; they are
# written after each step, so an interrupted run leaves what it found. Python 3 is needed; with torch
# and transformers the floors are measured and the model is compared with Hugging Face's.
# The exit code is 0 if no check failed; speeds below their targets are no failures.
#
# GPU_CHECK_DEVICE=cpu rehearses everything on a machine without a card, with small models.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bundle=${1:-$here}
[ -f "$bundle/bundle.tar.xz" ] || bundle=${1:-$here/../gpu-bundle}
if ! [ -f "$bundle/bundle.tar.xz" ]; then
    echo "error: $bundle holds no bundle.tar.xz; make it with scripts/gpu-bundle.sh" >&2
    exit 2
fi
out=${OUT:-gpu-check}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
started=$(date +%s)

# Python unpacks, because small images have no xz.
python3 - "$bundle/bundle.tar.xz" "$work" <<'EOF'
import sys, tarfile
tarfile.open(sys.argv[1]).extractall(sys.argv[2])
EOF
# The limit leaves time to write the results. What outlives its own limit is killed.
code=0
PYTHONUNBUFFERED=1 timeout --kill-after=5 530 \
    python3 "$work/scripts/gpu_check.py" --started "$started" --out "$out" "$work" || code=$?
echo "gpu-check took $(($(date +%s) - started)) s; results in $out"
exit "$code"
