"""What clients send and are told stays between them and the model.

Distinctive strings are sent wherever a request has room for text, well and malformed, and are then
looked for in everything that others get to see: the log at its lowest level, metrics, what operators
ask, the files of the usage ledger, and errors that other clients are told.
"""

import base64
import http.client
import itertools
import json
import pathlib
import signal
import subprocess
import time

import pytest

from conftest import binary_path, MODEL, Server, TINY_MODEL

CHAT = "/v1/chat/completions"
# Paths for operators; those that a server does not have tell nothing either.
OPERATORS = ["/metrics", "/admin/usage", "/admin/state", "/admin/usage?by=key,model,hour&format=csv"]


class Canaries:
    """Strings that occur nowhere else."""

    def __init__(self):
        self.number = itertools.count(1)
        self.where = {}

    def make(self, where):
        canary = f"zqx{next(self.number):03}wjvkzq"
        self.where[canary] = where
        return canary

    def leaks(self, content):
        """Where what is found in `content` was sent."""
        return sorted({self.where[canary] for canary in self.where
                       if any(form in content for form in forms(canary))})


def forms(canary):
    """How a text may look in a log: as it is, encoded, or as tokens, which here are bytes."""
    raw = canary.encode()
    yield raw
    yield raw.hex().encode()
    # Wherever it begins in what was encoded, this part of it is the same.
    yield base64.b64encode(raw)[:12]
    yield ", ".join(str(byte) for byte in raw).encode()
    yield ",".join(str(byte) for byte in raw).encode()


def requests(canaries):
    """Paths and bodies with a canary in every place for text."""
    c = canaries.make
    tool = {"type": "function", "function": {
        "name": c("tool name"), "description": c("tool description"),
        "parameters": {"type": "object", "properties": {c("tool property"): {"type": "string"}}}}}
    schema = {"type": "object", "properties": {c("schema property"): {
        "type": "string", "enum": [c("schema value, which is the answer")]}}}
    schema["required"] = list(schema["properties"])
    call = {"id": c("call id"), "type": "function", "function": {
        "name": "f", "arguments": json.dumps({"a": c("tool arguments")})}}
    conversation = [
        {"role": "system", "content": c("system prompt")},
        {"role": "user", "content": c("user prompt"), "name": c("user name")},
        {"role": "assistant", "content": c("earlier answer"), "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": c("tool result")},
        {"role": "user", "content": c("last prompt")},
    ]
    short = [{"role": "user", "content": c("short prompt")}]
    base = {"model": MODEL, "max_tokens": 4}
    yield CHAT, base | {"messages": conversation, "user": c("user field"), "metadata": {"k": c("metadata")}}
    yield CHAT, base | {"messages": short, "tools": [tool], "tool_choice": "required", "max_tokens": 60}
    yield CHAT, base | {"messages": short, "max_tokens": 60, "response_format": {
        "type": "json_schema", "json_schema": {"name": c("schema name"), "schema": schema}}}
    yield CHAT, base | {"messages": short, "stop": [c("stop string")], "stream": True}
    yield CHAT, base | {"messages": short, "guided_choice": [c("forced answer")], "max_tokens": 40}
    yield CHAT, base | {"messages": short, "guided_regex": c("regular expression") + "[0-9]"}
    yield CHAT, base | {"messages": short, "cache_salt": c("cache salt"), "safety_identifier": c("safety id"),
                        "prompt_cache_key": c("cache key")}
    yield "/v1/completions", base | {"prompt": c("completion prompt"), "suffix": c("suffix")}
    yield "/v1/completions", base | {"prompt": c("echoed prompt"), "echo": True, "logprobs": 3}
    yield "/v1/fim/completions", base | {"prompt": c("beginning"), "suffix": c("end")}
    yield "/v1/embeddings", {"model": MODEL, "input": [c("embedded text")]}
    yield "/v1/responses", {"model": MODEL, "input": c("input"), "instructions": c("instructions"),
                            "max_output_tokens": 4}
    yield "/v1/messages", base | {"system": c("Anthropic system"), "messages": short}
    native = "/api/v1/services/aigc/text-generation/generation"
    yield native, {"model": MODEL, "input": {"messages": [{"role": "user", "content": c("native prompt")}]},
                   "parameters": {"max_tokens": 4}}
    yield "/tokenize", {"model": MODEL, "prompt": c("text to tokenize")}
    yield "/v1/chat/completions/render", base | {"messages": [{"role": "user", "content": c("rendered")}]}
    # What is refused.
    yield CHAT, ('{"messages": [{"role": "user", "content": "' + c("broken JSON")).encode()
    yield CHAT, base | {"messages": c("messages of the wrong type")}
    yield CHAT, base | {"messages": [{"role": c("unknown role"), "content": "x"}]}
    yield CHAT, base | {"messages": short, c("unknown field"): c("unknown value")}
    yield CHAT, base | {"messages": short, "strict_params": True, c("refused field"): 1}
    yield CHAT, base | {"messages": short, "temperature": c("text for a number")}
    yield CHAT, base | {"messages": [{"role": "user", "content": c("too long") * 60}]}
    yield CHAT, base | {"messages": short, "guided_regex": c("broken expression") + "("}
    yield CHAT, base | {"messages": short, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"type": c("unknown type"), "description": c("refused schema")}}}}
    yield CHAT, base | {"messages": short, "tools": [{"type": c("kind of tool")}]}
    yield CHAT, base | {"model": c("unknown model"), "messages": short}
    yield "/v1/" + c("unknown path"), base
    yield "/v1/embeddings", {"model": MODEL, "input": {"text": c("input of the wrong type")}}


def send(server, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"content-type": "application/json"} | headers)
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nobody_else_sees_what_a_client_sends(tmp_path, log_format):
    canaries = Canaries()
    ledger = tmp_path / "usage.db"
    flags = ["--log-level", "trace", "--log-format", log_format, "--usage-ledger", ledger]
    seen = {}
    with Server(*flags, model=TINY_MODEL) as server:
        # Else what is logged as tokens would not be found.
        assert server.tokenize(prompt=canaries.make("nowhere")) == list(b"zqx001wjvkzq")
        statuses = {}
        for path, body in requests(canaries):
            headers = {
                "authorization": f"Bearer {canaries.make('bearer key')}",
                "x-api-key": canaries.make("x-api-key"), "api-key": canaries.make("api-key"),
                "cookie": canaries.make("cookie"), "user-agent": canaries.make("user agent"),
            }
            status, _ = send(server, path, body, headers)
            statuses[path, json.dumps(body, default=repr)[:200]] = status
        assert sum(status == 200 for status in statuses.values()) >= 15, statuses
        assert sum(status >= 400 for status in statuses.values()) >= 11, statuses
        # Somebody else's requests, well and badly made.
        for body in ({}, {"model": MODEL}, b"{", {"model": MODEL, "messages": [], "stop": 5}):
            seen[f"error for {body}"] = send(server, CHAT, body, {})[1]
        for path in OPERATORS + ["/v1/models", "/health", "/version"]:
            seen[path] = server.request("GET", path).body
        server.wait_until_idle()
        assert server.stop() == 0
        seen["log"] = open(server.log.name, "rb").read()
    for path in tmp_path.iterdir():
        seen[path.name] = path.read_bytes()
    assert seen["log"].count(b"request finished") > 10, "nothing was logged"
    assert b"anonymous" in seen["usage.db"]
    leaks = {name: canaries.leaks(content) for name, content in seen.items()}
    assert not any(leaks.values()), {name: leak for name, leak in leaks.items() if leak}


def make_key(file, name, *flags):
    """Makes a key as operators do; the secret is the last word on standard output."""
    command = [binary_path(), "key", "add", name, "--file", file, *flags]
    return subprocess.run(map(str, command), capture_output=True, text=True, check=True).stdout.split()[-1]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_key_that_works_appears_nowhere(tmp_path, log_format):
    """Also not where it is spelt in part, sent in other places, used up, revoked or of the wrong role."""
    file, ledger = tmp_path / "keys.toml", tmp_path / "usage.db"
    keys = {"ann": make_key(file, "ann"), "few": make_key(file, "few", "--requests-per-minute", "1"),
            "ops": make_key(file, "ops", "--role", "admin"), "gone": make_key(file, "gone")}
    assert all(len(secret) > 40 for secret in keys.values())
    flags = ["--log-level", "trace", "--log-format", log_format, "--usage-ledger", ledger, "--api-keys", file]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    seen, statuses = {}, []
    with Server(*flags, model=TINY_MODEL) as server:
        for round_number in range(2):
            for name, secret in keys.items():
                ways = [{"authorization": f"Bearer {secret}"}, {"x-api-key": secret}, {"api-key": secret},
                        {"authorization": f"Basic {secret}"}, {"authorization": f"Bearer {secret}x"},
                        {"x-api-key": secret, "x-request-id": "of a client"}]
                for number, headers in enumerate(ways):
                    for path in (CHAT, "/tokenize", "/v1/messages", "/nothing"):
                        status, answer = send(server, path, body | {"prompt": "x"}, headers)
                        statuses.append(status)
                        seen[f"answer {round_number} {name} {number} {path}"] = answer
            subprocess.run([str(binary_path()), "key", "revoke", "gone", "--file", str(file)], check=False,
                           capture_output=True)
            server.process.send_signal(signal.SIGHUP)
            time.sleep(1.5)
        for path in OPERATORS + ["/v1/models", "/health", "/version"]:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", path, headers={"x-api-key": keys["ops"]})
            response = connection.getresponse()
            assert response.status == 200, path
            seen[path] = response.read()
            connection.close()
        environment = pathlib.Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        seen["command line"] = environment
        assert server.stop() == 0
        seen["log"] = open(server.log.name, "rb").read()
    for path in tmp_path.iterdir():
        seen[path.name] = path.read_bytes()
    assert {200, 401, 404, 429} <= set(statuses), statuses
    assert seen["log"].count(b"request finished") > 10 and b"ann" in seen["usage.db"]
    for name, secret in keys.items():
        # The part that is the same in all secrets says nothing.
        tail = secret.removeprefix("sk-qwen-")
        for form in (tail, tail[:16], tail[-16:], tail.encode().hex()):
            leaks = [where for where, content in seen.items() if form.encode() in content]
            assert not leaks, f"{name}: {leaks}"
