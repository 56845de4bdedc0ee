#!/usr/bin/env bash
# Puts together what scripts/gpu-check.sh needs on a machine with a card but without Rust.
#
#   usage: gpu-bundle.sh [FOLDER]     default: gpu-bundle/
#
# Needs Rust and nvcc (scripts/cuda-home.sh; CUDA_HOME is taken if it is set). The folder holds one archive
# of stripped programs and models/tiny, and the script itself; together they stay under 60 MiB.
#
# FEATURES and PROFILE replace `cuda` and `release`: FEATURES=emulation PROFILE=dev makes a bundle that
# rehearses on a machine without a card.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ensure.sh
. "$here/ensure.sh"
mkdir -p "${1:-gpu-bundle}"
folder=$(cd "${1:-gpu-bundle}" && pwd)
cd "$here/.."
features=${FEATURES:-cuda}
profile=${PROFILE:-release}
max_bytes=$((60 << 20))

ensure_c_compiler
ensure_cargo
if [ "$features" = cuda ] && [ -z "${CUDA_HOME:-}" ]; then
    CUDA_HOME=$(bash "$here/cuda-home.sh" | tail -n 1)
    export CUDA_HOME
fi

# executable KIND NAME: the path in cargo's messages of the program of this target.
executable() {
    python3 -c '
import json, sys
kind, name = sys.argv[1:]
for line in sys.stdin:
    message = json.loads(line)
    target = message.get("target", {})
    if message.get("executable") and target.get("kind") == [kind] and target.get("name") == name:
        print(message["executable"])
' "$1" "$2"
}

build=(--locked --features "$features" --profile "$profile" --message-format json-render-diagnostics)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/scripts" "$work/models"
say "building the server"
cargo build "${build[@]}" --bin qwen-server >"$work/server.json"
say "building the tests"
# Tests have a profile of their own name, except for optimised ones.
[ "$profile" = dev ] && build[4]=test
cargo test --no-run "${build[@]}" --lib --test models >"$work/tests.json"
cp "$(executable bin qwen-server <"$work/server.json")" "$work/bin/qwen-server"
cp "$(executable lib qwen_server <"$work/tests.json")" "$work/bin/lib-tests"
cp "$(executable test models <"$work/tests.json")" "$work/bin/models-tests"
rm "$work/server.json" "$work/tests.json"
strip "$work"/bin/*
# Tests look for the models where the sources were.
pwd >"$work/manifest-dir"
git rev-parse HEAD >"$work/commit" 2>/dev/null || echo unknown >"$work/commit"
cp -r models/tiny "$work/models/tiny"
cp scripts/gpu_check.py scripts/gpu_gguf.py "$work/scripts/"
cp scripts/gpu-check.sh "$folder/"

say "compressing"
# The programs hold the same kernels and crates, which a window over all of them stores once.
python3 - "$work" "$folder/bundle.tar.xz" <<'EOF'
import lzma, sys, tarfile
source, archive = sys.argv[1:]
filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 256 << 20}]
with lzma.open(archive, "wb", filters=filters) as compressed:
    with tarfile.open(fileobj=compressed, mode="w|") as tar:
        tar.add(source, arcname=".")
EOF
num_bytes=$(stat -c %s "$folder/bundle.tar.xz")
say "$folder/bundle.tar.xz: $((num_bytes >> 20)) MiB"
[ "$num_bytes" -lt "$max_bytes" ] || die "the bundle is larger than 60 MiB"
echo "$folder"
