"""The release binary with the real model, started once for all tests that only ask it things.

QWEN_SERVER_BIN (default target/release/qwen-server) and QWEN_SERVER_TEST_MODEL (the GGUF file) say
what to run. A missing one is a failure, never a skip.
"""

import collections
import ctypes
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = "qwen2.5-coder-0.5b-instruct"
# One or two random layers and 512 tokens of context: for whatever does not depend on what a model says.
TINY_MODEL = ROOT / "models" / "tiny" / "mixed.gguf"
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
REQUEST_TIMEOUT_S = 300

Answer = collections.namedtuple("Answer", "status headers body")


def binary_path():
    default = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release" / "qwen-server"
    path = pathlib.Path(os.environ.get("QWEN_SERVER_BIN", default))
    assert path.is_file(), f"no server binary at {path}: build it, or set QWEN_SERVER_BIN"
    return path


def model_path():
    path = pathlib.Path(os.environ.get("QWEN_SERVER_TEST_MODEL", ""))
    assert path.is_file(), "QWEN_SERVER_TEST_MODEL must name the GGUF file of the real model"
    return path


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_with_parent():
    """Runs in the child: a server must not outlive tests that were killed."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def node_is_recent():
    if not shutil.which("node") or not shutil.which("npm"):
        return False
    version = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)", version)
    return found is not None and int(found[1]) >= 20


# Node is optional: without it its tests count neither as passed nor as skipped.
collect_ignore = [] if node_is_recent() else ["test_node.py"]


def pytest_ignore_collect(collection_path, config):
    """Leaves out what takes minutes unless it is asked for."""
    is_slow = collection_path.name == "test_many_samples.py"
    return True if is_slow and config.option.markexpr != "slow" else None


def pytest_report_header():
    if collect_ignore:
        return "NOT TESTED: the clients for Node, because Node 20 or later is not installed"
    return None


class Server:
    """A running `qwen-server serve`."""

    def __init__(self, *flags, model=None, port=None):
        self.port = port or free_port()
        self.log = tempfile.NamedTemporaryFile(prefix="qwen-server-", suffix=".log")
        model = model or model_path()
        command = [binary_path(), "serve", "--model", model, "--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", self.port, *flags]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent, restore_signals=False)
        self.url = f"http://127.0.0.1:{self.port}"
        self.v1 = self.url + "/v1"

    def __enter__(self):
        self.wait_until_ready()
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            code = self.stop()
            assert code == 0, f"exit code {code} after SIGTERM\n{self.log_tail()}"

    def log_tail(self):
        return pathlib.Path(self.log.name).read_text(errors="replace")[-4000:]

    def mark_log(self):
        """Where the log ends now."""
        return len(pathlib.Path(self.log.name).read_text(errors="replace"))

    def outcomes_since(self, mark):
        """How each request ended that has ended since."""
        text = pathlib.Path(self.log.name).read_text(errors="replace")[mark:]
        return re.findall(r'request finished.*outcome="?(\w+)', text)

    def wait_until_ready(self):
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            code = self.process.poll()
            assert code is None, f"the server ended with exit code {code}\n{self.log_tail()}"
            try:
                if self.request("GET", "/health/ready").status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"not ready after {READY_TIMEOUT_S} s\n{self.log_tail()}")

    def kill(self):
        """What no program can prepare for."""
        self.process.kill()
        self.process.wait()

    def wait_until_idle(self, timeout_s=30):
        """Until nothing runs or waits and every block is free, as /metrics tells; fails if not."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert self.process.poll() is None, f"the server died\n{self.log_tail()}"
            metrics = self.metrics()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            busy = {name: metrics[f"vllm:{name}"] for name in names if metrics[f"vllm:{name}"] != 0}
            if not busy:
                return metrics
            assert time.monotonic() < deadline, f"still busy after {timeout_s} s: {busy}"
            time.sleep(0.05)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self):
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running {STOP_TIMEOUT_S} s after SIGTERM\n{self.log_tail()}")

    def stop(self):
        self.terminate()
        return self.wait()

    def client(self):
        return openai.OpenAI(
            base_url=self.v1, api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S)

    def async_client(self):
        return openai.AsyncOpenAI(
            base_url=self.v1, api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S)

    def request(self, method, path, body=None):
        """One plain HTTP request; `body` is sent as it is when it is bytes, else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)
        try:
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def json(self, method, path, body=None):
        answer = self.request(method, path, body)
        assert answer.status == 200, f"{path}: {answer.status} {answer.body[:500]!r}"
        return json.loads(answer.body)

    def tokenize(self, **body):
        return self.json("POST", "/tokenize", {"model": MODEL, **body})["tokens"]

    def detokenize(self, tokens):
        return self.json("POST", "/detokenize", {"model": MODEL, "tokens": tokens})["prompt"]

    def metrics(self):
        """Every metric by name, summed over its labels."""
        values = collections.defaultdict(float)
        for line in self.request("GET", "/metrics").body.decode().splitlines():
            if found := re.match(r"([a-zA-Z_:][\w:]*)(?:\{.*\})? ([^ ]+)", line):
                values[found[1]] += float(found[2])
        return values


def usage_of(ledger):
    """What a usage ledger says in all."""
    command = [binary_path(), "usage", "--ledger", ledger, "--format", "json", "--by", "key"]
    result = subprocess.run(command, capture_output=True, timeout=30, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["total"]


@pytest.fixture(scope="session")
def server():
    with Server() as running:
        yield running
        assert running.process.poll() is None, f"the server died\n{running.log_tail()}"


@pytest.fixture(scope="session")
def client(server):
    return server.client()


@pytest.fixture(scope="session")
def reference():
    path = ROOT / "models" / MODEL / "reference.json"
    return {prompt["name"]: prompt for prompt in json.loads(path.read_text())["prompts"]}
