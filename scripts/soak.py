#!/usr/bin/env python3
"""Mixed load for a long time, against a server that this script starts.

    python scripts/soak.py --minutes 30 --model models/tiny/mixed.gguf

Clients stream, ask for whole answers, leave midway, call tools, ask for JSON, embed, read slowly and
send nonsense, in rounds. Every other round is calm: nobody leaves. After each round every cache block
must be free; what clients were told, what /metrics says and what the usage ledger says must agree, to
the token in a calm round, within what those who left may have missed in the others. At the end memory
must have stopped growing. The exit code says whether all of that held. Needs nothing but Python.
"""

import argparse
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = "soak"
CHAT = "/v1/chat/completions"
STEADY_TIMEOUT_S = 60
REQUEST_TIMEOUT_S = 120
# Memory may differ by this much between the beginning and the end of what is measured, plus a part
# of its size: allocators do not give everything back.
MAX_GROWTH_BYTES = 8 << 20
MAX_GROWTH_PART = 0.05
COUNTS = ("requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"where": {"type": "string", "maxLength": 9}}}}}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {
    "type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["n"], "additionalProperties": False}}}


class Failure(Exception):
    """Something that must hold does not."""


def check(holds, message):
    if not holds:
        raise Failure(message)


class Server:
    """A server with a ledger of its own."""

    def __init__(self, options):
        self.folder = tempfile.TemporaryDirectory(prefix="soak-")
        self.binary = options.server
        self.ledger = os.path.join(self.folder.name, "usage.db")
        self.log_path = os.path.join(self.folder.name, "log")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        command = [options.server, "serve", "--model", options.model, "--served-model-name", MODEL,
                   "--port", str(self.port), "--usage-ledger", self.ledger, *options.flag]
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.wait_for(lambda: self.get("/health/ready").status == 200, "ready")
        except Failure:
            self.process.kill()
            raise

    def log_tail(self):
        return pathlib.Path(self.log_path).read_text(errors="replace")[-2000:]

    def wait_for(self, is_so, what):
        deadline = time.monotonic() + STEADY_TIMEOUT_S
        while True:
            check(self.process.poll() is None, f"the server ended\n{self.log_tail()}")
            try:
                if is_so():
                    return
            except OSError:
                pass
            check(time.monotonic() < deadline, f"not {what} after {STEADY_TIMEOUT_S} s")
            time.sleep(0.1)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)

    def get(self, path):
        connection = self.connect()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            response.text = response.read().decode()
            return response
        finally:
            connection.close()

    def metrics(self):
        values = {}
        for line in self.get("/metrics").text.splitlines():
            if found := re.match(r"([a-zA-Z_:][\w:]*)(?:\{.*\})? ([^ ]+)", line):
                values[found[1]] = values.get(found[1], 0) + float(found[2])
        return values

    def is_idle(self):
        metrics = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(metrics[f"vllm:{name}"] for name in names)

    def usage(self):
        """The counts of the ledger; it lags behind by less than a second."""
        time.sleep(1)
        command = [self.binary, "usage", "--ledger", self.ledger, "--by", "key", "--format", "json"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        check(result.returncode == 0, result.stderr)
        total = json.loads(result.stdout)["total"]
        return {name: total[name] for name in COUNTS}

    def rss_bytes(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) << 10

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(STEADY_TIMEOUT_S)
        check(code == 0, f"exit code {code} after SIGTERM\n{self.log_tail()}")

    def close(self):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


class Client(threading.Thread):
    """Sends one request after another, and adds up what it is told."""

    def __init__(self, server, rng, until, kinds):
        super().__init__(daemon=True)
        self.server, self.rng, self.until, self.kinds = server, rng, until, kinds
        self.counts = dict.fromkeys(COUNTS, 0)
        # What those who left may have been counted with beyond what they saw.
        self.missed = dict.fromkeys(COUNTS, 0)
        self.num_by_kind = {}
        self.failure = None

    def run(self):
        try:
            while time.monotonic() < self.until:
                kind = self.rng.choice(self.kinds)
                self.num_by_kind[kind] = self.num_by_kind.get(kind, 0) + 1
                getattr(self, kind)()
        except Exception as error:
            self.failure = f"{kind}: {error!r}"

    def words(self, most=24):
        """The beginning is often the same, so that there is something in the prefix cache."""
        start = self.rng.choice(["", "Once upon a time there was a server. ", "You are helpful. " * 3])
        return start + " ".join(self.rng.choice(["red", "green", "blue"]) for _ in range(self.rng.randrange(1, most)))

    def ask(self, **fields):
        messages = [{"role": "user", "content": self.words()}]
        return {"model": MODEL, "messages": messages, "max_tokens": self.rng.randrange(1, 60)} | fields

    def open(self, path, body):
        connection = self.server.connect()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"content-type": "application/json"})
        return connection, connection.getresponse()

    def send(self, path, body):
        """The answer and its JSON; counts the request."""
        connection, response = self.open(path, body)
        answer = json.loads(response.read())
        connection.close()
        self.counts["requests"] += 1
        if response.status != 200:
            self.counts["errors"] += 1
            check(response.status != 500, answer)
        return response, answer

    def told(self, usage):
        self.counts["prompt_tokens"] += usage["prompt_tokens"]
        self.counts["completion_tokens"] += usage.get("completion_tokens", 0)
        details = usage.get("prompt_tokens_details") or {}
        self.counts["cached_tokens"] += details.get("cached_tokens", 0)

    def answered(self, path, body):
        response, answer = self.send(path, body)
        check(response.status == 200, answer)
        self.told(answer["usage"])
        return answer

    # Kinds of requests -----------------------------------------------------------------------------

    def whole(self):
        self.answered(CHAT, self.ask(n=self.rng.choice([1, 1, 2]), ignore_eos=True))

    def text(self):
        body = {"model": MODEL, "prompt": [self.words(), self.words()], "max_tokens": 9}
        self.answered("/v1/completions", body)

    def tools(self):
        choice = self.rng.choice(["auto", "required"])
        self.answered(CHAT, self.ask(tools=TOOLS, tool_choice=choice, max_tokens=80))

    def json_schema(self):
        answer = self.answered(CHAT, self.ask(response_format=SCHEMA, max_tokens=200))
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop":
            check(0 <= json.loads(choice["message"]["content"])["n"] <= 99, choice)

    def embedding(self):
        body = {"model": MODEL, "input": [self.words() + "." for _ in range(self.rng.randrange(1, 5))]}
        self.answered("/v1/embeddings", body)

    def nonsense(self):
        path, body, status = self.rng.choice([
            (CHAT, b"{", 400), (CHAT, b"\xff\x00", 400), (CHAT, self.ask(model="none"), 404),
            (CHAT, self.ask(temperature="hot"), 400), (CHAT, self.ask(max_tokens=10**6), 400),
            ("/v1/embeddings", {"model": MODEL, "input": []}, 400),
            ("/v1/completions", {"model": MODEL, "prompt": "x", "n": 1000}, 400)])
        response, answer = self.send(path, body)
        check(response.status == status, answer)

    def stream(self, pause_s=0.0):
        fields = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        connection, response = self.open(CHAT, self.ask(**fields))
        check(response.status == 200, response.status)
        last = None
        for line in iter(response.readline, b""):
            time.sleep(pause_s)
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
                check("error" not in last, last)
            elif line.startswith(b"data: [DONE]"):
                self.counts["requests"] += 1
                self.told(last["usage"])
                connection.close()
                return
        raise Failure("a stream broke off")

    def slow_stream(self):
        self.stream(pause_s=0.01)

    def leave(self):
        """What it saw is the least that it was counted with."""
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = self.ask(stream=True, stream_options=options, max_tokens=250, ignore_eos=True)
        connection, response = self.open(CHAT, body)
        check(response.status == 200, response.status)
        usage, num_lines = None, self.rng.randrange(1, 40)
        while num_lines:
            line = response.readline()
            if line.startswith(b"data: {"):
                usage = json.loads(line[6:])["usage"]
                num_lines -= 1
        # Closing both, or the socket would live on in the response.
        response.close()
        connection.close()
        self.counts["requests"] += 1
        self.told(usage)
        self.missed["completion_tokens"] += 250 - usage["completion_tokens"]
        self.missed["cached_tokens"] += usage["prompt_tokens"]


CALM = ["whole", "text", "tools", "json_schema", "embedding", "nonsense", "stream", "stream", "slow_stream"]
ROUGH = [*CALM, "leave", "leave", "leave"]


class Soak:
    """Rounds of load, and what must hold between them."""

    def __init__(self, options):
        self.options = options
        self.server = Server(options)
        self.started_at = time.monotonic()
        self.memory = []
        self.is_over = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        self.num_by_kind = {}

    def watch(self):
        while not self.is_over.wait(0.5):
            try:
                self.memory.append((time.monotonic() - self.started_at, self.server.rss_bytes()))
            except (OSError, TypeError):
                return

    def round(self, number, until):
        is_calm = number % 2 == 1
        before = self.known()
        kinds = CALM if is_calm else ROUGH
        clients = [Client(self.server, random.Random(f"{self.options.seed} {number} {index}"), until, kinds)
                   for index in range(self.options.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(REQUEST_TIMEOUT_S + 60)
            check(not client.is_alive(), "a client never got its answer")
            check(client.failure is None, client.failure)
            for kind, num in client.num_by_kind.items():
                self.num_by_kind[kind] = self.num_by_kind.get(kind, 0) + num
        self.server.wait_for(self.server.is_idle, "idle, with every block free,")
        after = self.known()
        told = {name: sum(client.counts[name] for client in clients) for name in COUNTS}
        missed = {name: sum(client.missed[name] for client in clients) for name in COUNTS}
        self.compare(number, told, missed, {key: after[key] - before[key] for key in after})
        num_seconds = time.monotonic() - self.started_at
        rss_mib = self.server.rss_bytes() / (1 << 20)
        print(f"{num_seconds:7.0f} s  round {number:3} {'calm ' if is_calm else 'rough'}"
              f"  {told['requests']:6} requests  {told['errors']:5} refused"
              f"  {told['completion_tokens']:8} tokens  {rss_mib:7.1f} MiB", flush=True)

    def known(self):
        metrics = self.server.metrics()
        return self.server.usage() | {
            "metrics_prompt": int(metrics["vllm:prompt_tokens_total"]),
            "metrics_completion": int(metrics["vllm:generation_tokens_total"]),
        }

    def compare(self, number, told, missed, counted):
        """With nobody leaving, nothing was missed and all of these are equalities."""
        for name in COUNTS:
            least, most = told[name], told[name] + missed[name]
            check(least <= counted[name] <= most,
                  f"round {number}: {name}: clients were told {least} to {most}, the ledger says {counted[name]}")
        # Every prompt was let in, and left the queue.
        for name in ("prompt", "completion"):
            ledger, metrics = counted[f"{name}_tokens"], counted[f"metrics_{name}"]
            most = told[f"{name}_tokens"] + missed[f"{name}_tokens"]
            check(ledger <= metrics <= most,
                  f"round {number}: {name} tokens: the ledger says {ledger}, /metrics {metrics}, at most {most}")

    def check_memory(self):
        """Fits a line through what came after the first third, in which caches fill."""
        warm = self.memory[len(self.memory) // 3:]
        mean_time = sum(at for at, _ in warm) / len(warm)
        mean = sum(rss for _, rss in warm) / len(warm)
        square = sum((at - mean_time) ** 2 for at, _ in warm)
        slope = sum((at - mean_time) * (rss - mean) for at, rss in warm) / square
        growth = slope * (warm[-1][0] - warm[0][0])
        most = MAX_GROWTH_BYTES + MAX_GROWTH_PART * mean
        print(f"memory: {mean / (1 << 20):.1f} MiB on average after warming up, "
              f"{growth / (1 << 20):+.2f} MiB over {warm[-1][0] - warm[0][0]:.0f} s; "
              f"at most {most / (1 << 20):+.1f} MiB is flat")
        check(growth <= most, "memory grows")

    def run(self):
        end = self.started_at + 60 * self.options.minutes
        number = 0
        while number < 2 or time.monotonic() + self.options.round_s / 2 < end:
            self.round(number, time.monotonic() + self.options.round_s)
            number += 1
        self.is_over.set()
        self.watcher.join()
        self.check_memory()
        before = self.server.usage()
        self.server.stop()
        after = self.server.usage()
        check(before == after, f"the ledger changed at the end: {before}, then {after}")
        print("kinds: " + ", ".join(f"{kind} {num}" for kind, num in sorted(self.num_by_kind.items())))
        print("ledger: " + ", ".join(f"{name} {after[name]}" for name in COUNTS))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--round-s", type=float, default=20, help="length of a round in seconds")
    parser.add_argument("--server", default=str(ROOT / "target/release/qwen-server"))
    parser.add_argument("--model", default=str(ROOT / "models/tiny/mixed.gguf"))
    parser.add_argument("--flag", action="append", default=[], help="further flag of the server, as --flag=--x=y")
    options = parser.parse_args(arguments)
    soak = None
    try:
        soak = Soak(options)
        soak.run()
    except Failure as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    finally:
        if soak:
            soak.server.close()
    print("everything held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
