#!/usr/bin/env python3
"""Measure perplexity of a text, with qwen-server and with llama.cpp, on the same tokens.

    scripts/perplexity.py --model FILE --text FILE [--peer PATH] [--peer-model FILE] [--server-args "…"]

As `llama-perplexity` defines it: the text's tokens are cut into windows of --context tokens, each is read from its
beginning, and the mean negative log-likelihood of the second half of each is raised to the power of e. Lower is
better; the file's own loss by quantisation is in both numbers, so their ratio is what the server adds. Prints one line
of JSON. Needs Python 3.9 or later and nothing else; --peer is the program `llama-perplexity`.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

READY_TIMEOUT_S = 300


def post(port, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=1200) as response:
        return json.load(response)


def start_server(options):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [options.server, "serve", "--model", options.model, "--port", str(port), "--log-level", "warn"]
    command += ["--served-model-name", "model", *shlex.split(options.server_args)]
    server = subprocess.Popen(command)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode}; its message is above")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
            return server, port
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    server.kill()
    sys.exit(f"the server was not ready within {READY_TIMEOUT_S} s")


def window_loss(port, window):
    """Sum of the negative log-likelihoods of the tokens behind the first half, and how many they are."""
    body = {"model": "model", "prompt": window, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    scored = post(port, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
    first = len(window) // 2 + 1
    losses = [-scored[i][str(window[i])]["logprob"] for i in range(first, len(window))]
    return math.fsum(losses), len(losses)


def own_perplexity(options):
    server, port = start_server(options)
    try:
        text = pathlib.Path(options.text).read_text()
        tokens = post(port, "/tokenize", {"model": "model", "prompt": text})["tokens"]
        num_windows = min(len(tokens) // options.context, options.windows)
        loss = count = 0
        for index in range(num_windows):
            part, num = window_loss(port, tokens[index * options.context :][: options.context])
            loss, count = loss + part, count + num
            print(f"\r{index + 1} of {num_windows}: {math.exp(loss / count):.4f}", end="", file=sys.stderr)
        print(file=sys.stderr)
        return math.exp(loss / count), num_windows
    finally:
        server.terminate()
        server.wait(60)


def peer_perplexity(options):
    command = [options.peer, "-m", options.peer_model or options.model, "-f", options.text, "-c", str(options.context)]
    command += ["-b", str(max(options.context, 512)), "--chunks", str(options.windows), *shlex.split(options.peer_args)]
    environment = dict(os.environ, LD_LIBRARY_PATH=str(pathlib.Path(options.peer).parent))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
    if not found:
        sys.exit(f"no result from {' '.join(command)}:\n{done.stderr[-2000:]}")
    return float(found[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="what qwen-server loads")
    parser.add_argument("--text", required=True, help="file with the text to read, in UTF-8")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=1 << 30, help="at most this many windows")
    parser.add_argument("--server", default="target/release/qwen-server", help="the binary")
    parser.add_argument("--server-args", default="", help="further arguments for `serve`")
    parser.add_argument("--peer", help="path of llama-perplexity")
    parser.add_argument("--peer-model", help="what llama.cpp loads, if not the same")
    parser.add_argument("--peer-args", default="", help="further arguments for llama-perplexity")
    options = parser.parse_args()
    own, num_windows = own_perplexity(options)
    result = {"model": options.model, "args": options.server_args, "windows": num_windows, "qwen_server": round(own, 4)}
    if options.peer:
        peer = peer_perplexity(options)
        result.update(llama_cpp=peer, ratio=round(own / peer, 4))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
