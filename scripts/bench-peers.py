#!/usr/bin/env python3
"""Measure qwen-server beside llama.cpp's server: the same file, machine and clients, in turn.

    scripts/bench-peers.py --model FILE.gguf --llama-server PATH [--rounds 3] [--rows decode,...] [--out DIR]

Each round starts one server, measures all rows and stops it, then does the same with the other. Prints medians with
minimum and maximum and the ratio, and writes DIR/peers.json, peers.md and peers.svg. Needs Python 3.9 or later and
nothing else. Prompts are English words drawn anew for each request, so that no prefix cache helps but where a row
is about it. Leave the machine alone meanwhile.
"""

import argparse
import asyncio
import functools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body parent face "
    "level office door health person art war history party result change morning reason research moment air teacher "
    "force education blue green river mountain small large quick slow bright dark open early late north south east"
).split()
LOWER_IS_BETTER = "lower"
HIGHER_IS_BETTER = "higher"
# Row: name, unit, which way is better.
ROWS = {
    "decode": ("decode, one stream, short context", "tokens/s", HIGHER_IS_BETTER),
    "decode_8k": ("decode, one stream, 8k context", "tokens/s", HIGHER_IS_BETTER),
    "prefill_512": ("time to first token, 512 tokens", "s", LOWER_IS_BETTER),
    "prefill_2048": ("time to first token, 2,048 tokens", "s", LOWER_IS_BETTER),
    "prefill_8192": ("time to first token, 8,192 tokens", "s", LOWER_IS_BETTER),
    "streams_8": ("output of 8 streams", "tokens/s", HIGHER_IS_BETTER),
    "streams_16": ("output of 16 streams", "tokens/s", HIGHER_IS_BETTER),
    "streams_32": ("output of 32 streams", "tokens/s", HIGHER_IS_BETTER),
    "prefix": ("16 requests sharing 1,500 tokens, cold", "s", LOWER_IS_BETTER),
    "gap": ("p99 gap of 4 streams while 4,096 tokens arrive", "s", LOWER_IS_BETTER),
    "gap_ttft": ("first token of those 4,096", "s", LOWER_IS_BETTER),
    "ready": ("time to ready", "s", LOWER_IS_BETTER),
    "resident": ("resident memory when ready", "MB", LOWER_IS_BETTER),
    "resident_end": ("resident memory at the end", "MB", LOWER_IS_BETTER),
}
MEASURES = ["decode", "decode_8k", "prefill_512", "prefill_2048"]
MEASURES += ["streams_8", "streams_16", "streams_32", "prefix", "gap"]


@functools.cache
def model_name(port):
    """What the server calls its model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as response:
        return json.load(response)["data"][0]["id"]


class Answer:
    """What came of a request: when each piece arrived, and how many tokens there were."""

    def __init__(self):
        self.began = time.perf_counter()
        self.times = []
        self.num_prompt = self.num_output = 0

    @property
    def ttft(self):
        return self.times[0] - self.began

    @property
    def decode_rate(self):
        return (self.num_output - 1) / (self.times[-1] - self.times[0])


async def chat(port, messages, max_tokens, on_piece=None):
    """One streamed chat completion over a connection of its own."""
    body = {"model": model_name(port), "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(body).encode()
    answer = Answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" \
           f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(2000)).decode()}")
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        piece = json.loads(line[6:])
        if "error" in piece:
            raise RuntimeError(piece["error"])
        if usage := piece.get("usage"):
            answer.num_prompt, answer.num_output = usage["prompt_tokens"], usage["completion_tokens"]
        if any(choice["delta"].get("content") for choice in piece["choices"]):
            answer.times.append(time.perf_counter())
            if on_piece:
                on_piece()
    writer.close()
    return answer


class Bench:
    """The rows, measured on the server behind a port."""

    def __init__(self, port, seed):
        self.port = port
        self.random = random.Random(seed)

    def messages(self, num_tokens):
        # A word of the list is one token; the template and the question take some forty.
        words = " ".join(self.random.choice(WORDS) for _ in range(max(1, num_tokens - 40)))
        question = "Write a very long story with many chapters that uses these words."
        return [{"role": "system", "content": f"Assistant {self.random.randrange(10**6)}."},
                {"role": "user", "content": f"{words} {question}"}]

    async def run(self, row):
        if row == "decode":
            return {row: (await chat(self.port, self.messages(60), 128)).decode_rate}
        if row == "decode_8k":
            answer = await chat(self.port, self.messages(8192), 64)
            return {row: answer.decode_rate, "prefill_8192": answer.ttft}
        if row.startswith("prefill_"):
            return {row: (await chat(self.port, self.messages(int(row[8:])), 2)).ttft}
        if row.startswith("streams_"):
            return {row: await self.streams(int(row[8:]))}
        if row == "prefix":
            return {row: await self.prefix()}
        return await self.gap()

    async def streams(self, num_streams):
        began = time.perf_counter()
        answers = [chat(self.port, self.messages(100), 128) for _ in range(num_streams)]
        answers = await asyncio.gather(*answers)
        return sum(answer.num_output for answer in answers) / (time.perf_counter() - began)

    async def prefix(self):
        shared = " ".join(self.random.choice(WORDS) for _ in range(1500))
        asks = [[{"role": "system", "content": shared}, {"role": "user", "content": f"Tell me about number {i}."}]
                for i in range(16)]
        began = time.perf_counter()
        await asyncio.gather(*[chat(self.port, messages, 32) for messages in asks])
        return time.perf_counter() - began

    async def gap(self):
        num_pieces, are_running = [0] * 4, asyncio.Event()

        def counting(index):
            def count():
                num_pieces[index] += 1
                if min(num_pieces) == 24:
                    are_running.set()
            return count

        streams = [asyncio.create_task(chat(self.port, self.messages(60), 320, counting(i))) for i in range(4)]
        await are_running.wait()
        long = await chat(self.port, self.messages(4096), 4)
        during = []
        for stream in await asyncio.gather(*streams):
            pairs = zip(stream.times, stream.times[1:])
            during += [b - a for a, b in pairs if a < long.times[0] and long.began <= b]
        during.sort()
        return {"gap": during[int(0.99 * (len(during) - 1))], "gap_ttft": long.ttft}


class Server:
    """A server process, started and asked for its health until it is ready."""

    def __init__(self, command, port):
        self.port = port
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_until_ready(self):
        while True:
            if self.process.poll() is not None:
                sys.exit(f"the server ended with {self.process.returncode}; start it by hand to see why")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).read()
                return time.perf_counter() - self.began
            except (urllib.error.URLError, OSError):
                time.sleep(0.01)

    def resident_mb(self):
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmRSS"))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(command, port, rows, runs, seed):
    """All rows of one server, as lists of values."""
    values = {}
    server = Server(command, port)
    try:
        values["ready"] = [server.wait_until_ready()]
        values["resident"] = [server.resident_mb()]
        bench = Bench(port, seed)
        asyncio.run(chat(port, bench.messages(60), 8))
        for row in rows:
            for _ in range(runs.get(row, 1)):
                for name, value in asyncio.run(bench.run(row)).items():
                    values.setdefault(name, []).append(value)
                    print(f"  {row:14} {value:10.3f}", file=sys.stderr, flush=True)
        values["resident_end"] = [server.resident_mb()]
    finally:
        server.stop()
    return values


def ratio(row, ours, theirs):
    """How many times better we are."""
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    return ours / theirs if ROWS[row][2] == HIGHER_IS_BETTER else theirs / ours


def table(results):
    def cell(values):
        digits = 0 if 100 <= statistics.median(values) else 2
        low, median, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
        return f"{median} ({low} - {high})" if 1 < len(values) else median

    lines = ["| | unit | qwen-server | llama.cpp | times better |", "|---|---|---|---|---|"]
    for row, (name, unit, _) in ROWS.items():
        if row in results["ours"] and row in results["theirs"]:
            ours, theirs = results["ours"][row], results["theirs"][row]
            lines.append(f"| {name} | {unit} | {cell(ours)} | {cell(theirs)} | {ratio(row, ours, theirs):.1f} |")
    return "\n".join(lines) + "\n"


def plot(results):
    """Bars of how many times better, on one scale."""
    rows = [row for row in ROWS if row in results["ours"] and row in results["theirs"]]
    ratios = [ratio(row, results["ours"][row], results["theirs"][row]) for row in rows]
    scale = 380 / max(ratios)
    height = 26 * len(rows) + 40
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{height}" font-family="sans-serif" '
           f'font-size="13"><rect width="100%" height="100%" fill="white"/>'
           f'<text x="10" y="20" font-weight="bold">qwen-server, times better than llama.cpp</text>']
    for index, (row, value) in enumerate(zip(rows, ratios)):
        y = 34 + 26 * index
        out.append(f'<text x="335" y="{y + 14}" text-anchor="end">{ROWS[row][0]}</text>'
                   f'<rect x="345" y="{y}" width="{value * scale:.1f}" height="18" fill="#4c78a8"/>'
                   f'<text x="{350 + value * scale:.1f}" y="{y + 14}">{value:.1f}</text>')
    out.append(f'<line x1="{345 + scale:.1f}" x2="{345 + scale:.1f}" y1="30" y2="{height - 8}" stroke="#d62728" '
               'stroke-dasharray="4 3"/></svg>')
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--llama-server", required=True, help="llama.cpp's server binary")
    parser.add_argument("--qwen-server", default="target/release/qwen-server", help="our binary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(MEASURES), help="which ones, separated by commas")
    parser.add_argument("--repeat", default="decode=5,prefill_512=5,prefill_2048=3", help="runs a round")
    parser.add_argument("--out", default=".", help="directory for peers.json, peers.md and peers.svg")
    options = parser.parse_args()
    rows = options.rows.split(",")
    runs = {row: int(count) for row, count in (part.split("=") for part in options.repeat.split(","))}
    threads = str(len(os.sched_getaffinity(0)))
    commands = {
        "ours": [options.qwen_server, "serve", "--model", options.model, "--port", "8471"],
        "theirs": [options.llama_server, "-m", options.model, "--host", "127.0.0.1", "--port", "8472", "-np", "16",
                   "-cb", "-c", "65536", "-kvu", "-t", threads, "-tb", threads, "-fa", "on", "--jinja", "--offline"],
    }
    results = {"ours": {}, "theirs": {}}
    for number in range(options.rounds):
        for side, port in (("ours", 8471), ("theirs", 8472)):
            print(f"round {number + 1}: {side}", file=sys.stderr, flush=True)
            for row, values in measure(commands[side], port, rows, runs, random.randrange(10**9)).items():
                results[side].setdefault(row, []).extend(values)
            os.makedirs(options.out, exist_ok=True)
            with open(os.path.join(options.out, "peers.json"), "w", encoding="utf-8") as file:
                # Names of files, not where they are on this machine.
                named = {side: [os.path.basename(word) for word in words] for side, words in commands.items()}
                json.dump({"commands": named, "threads": threads, **results}, file, indent=1)
    for name, text in (("peers.md", table(results)), ("peers.svg", plot(results))):
        with open(os.path.join(options.out, name), "w", encoding="utf-8") as file:
            file.write(text)
    print(table(results))


if __name__ == "__main__":
    main()
