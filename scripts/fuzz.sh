#!/usr/bin/env bash
# The nightly mode: every fuzz target for minutes, and a hundred thousand random schedules.
# scripts/fuzz.sh [SECONDS_PER_TARGET] [SEED]; without a seed the day is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export QWEN_SERVER_FUZZ_SECONDS=${1:-300}
export QWEN_SERVER_FUZZ_SEED=${2:-$(date +%Y%m%d)}
export QWEN_SERVER_SCHEDULES=${QWEN_SERVER_SCHEDULES:-100000}
echo "$QWEN_SERVER_FUZZ_SECONDS s per target, seed $QWEN_SERVER_FUZZ_SEED, $QWEN_SERVER_SCHEDULES schedules"
code=0
cargo test --locked --test fuzz -- --test-threads 1 --nocapture || code=$?
# Optimised: schedules are many, and each is checked after every step.
cargo test --locked --test simulation scheduling_never_changes_the_output || code=$?
exit "$code"
