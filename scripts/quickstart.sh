#!/usr/bin/env bash
# From a fresh clone to a running server: builds, gets the default model, starts, stays in front.
# usage: [HOST=127.0.0.1] [PORT=8000] scripts/quickstart.sh [more flags of `qwen-server serve`]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=scripts/ensure.sh
. "$here/ensure.sh"

host=${HOST:-127.0.0.1}
port=${PORT:-8000}
model=qwen2.5-coder-0.5b-instruct
case $host in
0.0.0.0 | ::) reach=127.0.0.1 ;;
*) reach=$host ;;
esac

# Whether anything listens on the port. In a subshell, so that the connection is closed at once.
port_is_taken() { (exec 3<>"/dev/tcp/$reach/$port") 2>/dev/null; }

is_ready() {
    (
        exec 3<>"/dev/tcp/$reach/$port"
        printf 'GET /health/ready HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$reach" >&3
        read -r -t 2 _ status _ <&3
        [ "$status" = 200 ]
    ) 2>/dev/null
}

fail_if_port_is_taken() {
    port_is_taken || return 0
    die "port $port on $reach is in use. Stop what listens there, or choose another: PORT=8001 $0"
}

case $port in
'' | *[!0-9]* | ??????*) die "PORT must be a number, not '$port'" ;;
esac
[ "$port" -ge 1 ] && [ "$port" -le 65535 ] || die "PORT must be in 1..65535, not $port"

fail_if_port_is_taken
ensure_c_compiler
ensure_cargo

say "building (a few minutes the first time)"
cargo build --release --locked
binary=$(cargo_target_dir)/release/qwen-server
[ -x "$binary" ] || die "the build left no $binary"

path=$(bash "$here/get-model.sh" "$binary" | tail -n 1)
[ -s "$path" ] || die "the model could not be found after fetching it"

# Building and downloading take a while: somebody may have taken the port meanwhile.
fail_if_port_is_taken

server=
stopping=
stop() {
    trap '' INT TERM HUP
    stopping=yes
    echo >&2
    say "stopping: running requests finish first"
    [ -z "$server" ] || kill -TERM "$server" 2>/dev/null || true
}
trap stop INT TERM HUP

say "starting on http://$host:$port"
# Job control gives the server its own process group: Ctrl-C reaches this script alone, which then
# asks the server once, politely.
set -m
"$binary" serve --model "$model" --host "$host" --port "$port" "$@" </dev/null &
server=$!
set +m

# wait is interrupted by the trapped signals, so it is asked until the server has ended.
wait_for_server() {
    local code=0
    while :; do
        code=0
        wait "$server" || code=$?
        kill -0 "$server" 2>/dev/null || return "$code"
    done
}

started=$SECONDS
announced=0
until [ -n "$stopping" ] || is_ready; do
    kill -0 "$server" 2>/dev/null || break
    if [ $((SECONDS - started)) -ge $((announced + 5)) ]; then
        announced=$((SECONDS - started))
        say "still loading ($announced s)"
    fi
    sleep 0.1
done

if [ -z "$stopping" ] && kill -0 "$server" 2>/dev/null; then
    say "ready after $((SECONDS - started)) s"
    cat <<EOF

Try it, in another terminal. With curl:

curl http://$reach:$port/v1/chat/completions \\
  -H 'Content-Type: application/json' \\
  -d '{"model": "$model", "messages": [{"role": "user", "content": "Write a haiku about Rust."}]}'

With Python (nothing to install; the openai package works too, base_url "http://$reach:$port/v1"):

python3 - <<'PY'
import json, urllib.request

body = {
    "model": "$model",
    "messages": [{"role": "user", "content": "Reverse a string in Python, one line."}],
}
request = urllib.request.Request(
    "http://$reach:$port/v1/chat/completions",
    data=json.dumps(body).encode(),
    headers={"Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as response:
    print(json.load(response)["choices"][0]["message"]["content"])
PY

Ctrl-C ends the server.
EOF
fi

code=0
wait_for_server || code=$?
if [ -n "$stopping" ]; then
    [ "$code" -eq 0 ] || die "the server ended with exit code $code"
    say "stopped"
    exit 0
fi
[ "$code" -eq 0 ] || die "the server ended by itself with exit code $code; its last lines are above"
