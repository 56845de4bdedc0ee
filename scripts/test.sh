#!/usr/bin/env bash
# Everything CI runs, in one command. A failed phase does not stop the others; the last line counts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
root=$PWD
# shellcheck source=scripts/ensure.sh
. "$here/ensure.sh"
exec </dev/null
export CARGO_TERM_COLOR=never PYTHONDONTWRITEBYTECODE=1

num_passed=0
num_failed=0
failures=()
logs=$(mktemp -d)
finished=

# Prints the result however the script ends.
finish() {
    local code=$? failure
    rm -rf "$logs"
    if [ -z "$finished" ]; then
        num_failed=$((num_failed + 1))
        failures+=("stopped early with exit code $code")
    fi
    heading "result"
    for failure in ${failures[@]+"${failures[@]}"}; do
        echo "FAILED: $failure"
    done
    echo "$num_passed passed, $num_failed failed"
    [ "$num_failed" -eq 0 ] || exit 1
}
trap finish EXIT

heading() { printf '\n=== %s  [%d min %02d s]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

count() {
    num_passed=$((num_passed + $1))
    num_failed=$((num_failed + $2))
}

# phase NAME COMMAND...: runs it and counts it as one check.
phase() {
    local name=$1
    shift
    heading "$name"
    if "$@"; then
        count 1 0
    else
        count 0 1
        failures+=("$name")
    fi
}

# sum_of LOG WORD: adds up the numbers that stand before WORD in the given lines.
sum_of() { { grep -oE "[0-9]+ $2" <<<"$1" || true; } | awk '{ sum += $1 } END { print sum + 0 }'; }

# counted NAME SUMMARY_PATTERN COMMAND...: runs tests and counts what their summary lines say. A run
# that failed without saying how many, or that ran nothing, counts as one failure.
counted() {
    local name=$1 pattern=$2 code=0 summary passed failed
    shift 2
    heading "$name"
    "$@" 2>&1 | tee "$logs/last" || code=$?
    summary=$(sed 's/\x1b\[[0-9;]*m//g' "$logs/last" | grep -E "$pattern" || true)
    passed=$(sum_of "$summary" passed)
    failed=$(($(sum_of "$summary" failed) + $(sum_of "$summary" 'errors?') +
        $(sum_of "$summary" 'timed out') + $(sum_of "$summary" 'exec failed')))
    if [ "$code" -ne 0 ] && [ "$failed" -eq 0 ]; then failed=1; fi
    if [ "$passed" -eq 0 ] && [ "$failed" -eq 0 ] && [ "$name" != "doc tests" ]; then failed=1; fi
    # A skipped test of the real model would be a silent hole.
    if [ "$name" = "real model and SDK" ]; then
        failed=$((failed + $(sum_of "$summary" skipped) + $(sum_of "$summary" deselected)))
    fi
    count "$passed" "$failed"
    if [ "$failed" -gt 0 ]; then failures+=("$name: $failed failed"); fi
}

make_venv() {
    local requirements=tests/python/requirements.txt stamp=.venv/requirements.installed
    # Another version of a package that is in the first list too, so it lives in its own directory.
    local second=tests/python/requirements-dashscope2.txt
    ensure_python_venv
    if cat "$requirements" "$second" | cmp -s - "$stamp" && .venv/bin/python -c 'import openai, pytest' 2>/dev/null; then
        echo "up to date"
        return
    fi
    rm -rf .venv
    python3 -m venv .venv &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
            --target .venv/dashscope2 -r "$second" &&
        cat "$requirements" "$second" >"$stamp"
}

check_scripts() {
    local script
    for script in scripts/*.sh .ci/run; do
        bash -n "$script" || return 1
    done
    .venv/bin/python - scripts/*.py tests/python/*.py <<'EOF'
import ast, sys
for path in sys.argv[1:]:
    ast.parse(open(path).read(), path)
EOF
}

get_cuda() {
    cuda_home=$(bash "$here/cuda-home.sh" | tail -n 1)
    [ -x "$cuda_home/bin/nvcc" ] || return 1
    echo "$cuda_home"
}

# Every kernel compiles for every architecture, and the hot ones keep to their registers.
check_kernels() { NVCC=$cuda_home/bin/nvcc bash "$here/check-kernels.sh"; }

# A build with kernels computes on the CPU where there is no card, and says why.
starts_without_a_card() {
    local log=$logs/without-a-card
    timeout 60 "$binary" serve --model models/tiny/mixed.gguf --port 0 2>"$log" &
    local server=$!
    for _ in $(seq 100); do
        if grep -q "NVIDIA" "$log" && grep -q "ready on" "$log"; then break; fi
        sleep 0.1
    done
    kill "$server" 2>/dev/null || true
    wait "$server" || true
    cat "$log"
    command -v nvidia-smi >/dev/null || grep -q "no usable NVIDIA GPU" "$log"
}

get_model() {
    model=$(bash "$here/get-model.sh" "$binary" | tail -n 1)
    [ -s "$model" ] || return 1
    echo "$model"
}

heading "what this machine lacks"
ensure_c_compiler
ensure_cargo
cargo --version
target=$(cargo_target_dir)
binary=$target/release/qwen-server
model=
cuda_home=

phase "Python environment" make_venv
phase "scripts" check_scripts
phase "licences and sources" "$root/.venv/bin/python" scripts/check-dependencies.py
phase "format" cargo fmt --check
phase "clippy" cargo clippy --all-targets --locked -- -D warnings
phase "CUDA compiler" get_cuda
phase "kernels" check_kernels
# One binary for all: it holds the kernels, and starts on machines that have nothing of CUDA.
phase "release build" env CUDA_HOME="$cuda_home" cargo build --release --locked --features cuda,otel
phase "real model" get_model
export QWEN_SERVER_TEST_MODEL=$model
export QWEN_SERVER_BIN=$binary

phase "start without a card" starts_without_a_card
phase "without a network" bash "$here/offline-test.sh" "$binary"

# With the kernels, thread by thread on the processor.
if cargo nextest --version >/dev/null 2>&1; then
    counted "Rust tests" '^ *Summary \[' \
        cargo nextest run --locked --features emulation,otel --no-fail-fast --status-level slow --final-status-level fail
else
    counted "Rust tests" '^test result: ' cargo test --lib --bins --tests --locked --no-fail-fast --features emulation,otel
fi
counted "doc tests" '^test result: ' cargo test --doc --locked --features emulation,otel
phase "documentation" env RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps --locked
counted "real model and SDK" '^=.* in [0-9.]+s|^[0-9]+ (passed|failed|error).* in [0-9.]+s' \
    "$root/.venv/bin/python" -m pytest -p no:cacheprovider --durations=10 tests/python

finished=yes
