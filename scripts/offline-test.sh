#!/usr/bin/env bash
# Serves, answers and stops where there is no network, and shows that nothing even tried to reach one.
# usage: scripts/offline-test.sh [BINARY] [MODEL.gguf]
#
# Runs in a network namespace of its own that has nothing but a loopback. The kernel counts there what
# found no route and every datagram that was sent, a question to a name server too; both must stay zero. A
# second start, with a model that would have to be downloaded, shows that an attempt is noticed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
binary=$(realpath "${1:-$here/../target/release/qwen-server}")
model=$(realpath "${2:-$here/../models/tiny/mixed.gguf}")

if [ -z "${INSIDE_OFFLINE_TEST:-}" ]; then
    if ! unshare --map-root-user --net true 2>/dev/null; then
        echo "NOT TESTED: this machine does not let its users make network namespaces (unshare --net)"
        exit 0
    fi
    INSIDE_OFFLINE_TEST=yes exec unshare --map-root-user --net --kill-child bash "$here/offline-test.sh" "$binary" "$model"
fi

die() {
    echo "FAILED: $*"
    [ ! -s "$folder/log" ] || tail -n 20 "$folder/log"
    exit 1
}

# field PROTOCOL NAME: one of the kernel's counters for this namespace.
field() {
    awk -v protocol="$1:" -v name="$2" '
        $1 == protocol && !column { for (i = 2; i <= NF; i++) if ($i == name) column = i; next }
        $1 == protocol { print $column }' /proc/net/snmp
}

# How many packets were for somewhere else, and how many datagrams there were at all.
attempts() {
    local v6=0
    [ ! -r /proc/net/snmp6 ] || v6=$(awk '$1 == "Ip6OutNoRoutes" || $1 == "Udp6OutDatagrams" { sum += $2 } END { print sum + 0 }' /proc/net/snmp6)
    echo $(($(field Ip OutNoRoutes) + $(field Udp OutDatagrams) + v6))
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"; kill $(jobs -p) 2>/dev/null || true' EXIT
export HF_HOME=$folder/hub HF_ENDPOINT=http://192.0.2.1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY HF_HUB_OFFLINE
if command -v ip >/dev/null; then
    ip link set lo up
else
    # SIOCSIFFLAGS with IFF_UP and IFF_RUNNING.
    python3 -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x41))'
fi
[ "$(attempts)" = 0 ] || die "the counters do not begin at zero"

port=8000
"$binary" serve --model "$model" --port $port --usage-ledger "$folder/usage.db" >"$folder/log" 2>&1 &
server=$!
for _ in $(seq 300); do
    grep -q "ready on" "$folder/log" && break
    kill -0 "$server" 2>/dev/null || die "the server ended"
    sleep 0.1
done

# ask METHOD PATH [BODY]: fails unless it is answered with 200.
ask() {
    local status
    exec 3<>"/dev/tcp/127.0.0.1/$port"
    printf '%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %s\r\n\r\n%s' \
        "$1" "$2" "$(printf '%s' "${3:-}" | wc -c)" "${3:-}" >&3
    read -r _ status _ <&3
    cat <&3 >"$folder/answer"
    exec 3>&-
    [ "$status" = 200 ] || die "$1 $2: status $status: $(cat "$folder/answer")"
}

messages='"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5'
ask GET /health/ready
ask GET /v1/models
name=$(grep -o '"id":"[^"]*"' "$folder/answer" | head -n 1 | cut -d '"' -f 4)
ask POST /v1/chat/completions "{\"model\": \"$name\", $messages}"
ask POST /v1/chat/completions "{\"model\": \"$name\", $messages, \"stream\": true}"
ask POST /v1/chat/completions "{\"model\": \"$name\", $messages, \"response_format\": {\"type\": \"json_object\"}}"
ask POST /v1/embeddings "{\"model\": \"$name\", \"input\": \"hello\"}"
ask POST /v1/messages "{\"model\": \"$name\", $messages}"
ask GET /metrics
ask GET /docs
ask GET /admin/usage
"$binary" models >/dev/null || die "the catalogue needs a network"
kill "$server"
wait "$server" || die "exit code $? after SIGTERM"
"$binary" usage --ledger "$folder/usage.db"
[ "$(attempts)" = 0 ] || die "something tried to reach another machine ($(attempts) packets)"

# The same would have been noticed.
if "$binary" serve --model qwen2.5-0.5b-instruct --port $port >/dev/null 2>&1; then
    die "a model that is not here was served"
fi
[ "$(attempts)" -gt 0 ] || die "an attempt to download a model was not noticed"
echo "no attempt to reach another machine; a download that was tried was noticed"
