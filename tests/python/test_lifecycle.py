"""Health, metrics, idling and the end of a server."""

import os
import subprocess
import time

import openai
import pytest

from conftest import MODEL, Server, binary_path


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_health_and_version(server):
    for path in ("/health", "/health/live", "/health/ready"):
        assert server.request("GET", path).status == 200
    assert server.json("GET", "/version")["version"]


def test_metrics_count_what_was_done(server, client):
    before = server.metrics()
    answer = client.completions.create(
        model=MODEL, prompt="Count: 1, 2,", max_tokens=4, extra_body={"ignore_eos": True})
    # Each where it is known: choices by the engine, requests when their answer is on its way.
    counts = ("vllm:request_success_total", "vllm:time_to_first_token_seconds_count",
              "vllm:e2e_request_latency_seconds_count")
    deadline = time.monotonic() + 5
    while True:
        after = server.metrics()
        done = [after[name] - before[name] for name in counts]
        if done == [1, 1, 1]:
            break
        assert time.monotonic() < deadline, f"counted {done} of {counts} instead of one each"
        time.sleep(0.05)
    generated = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert generated == answer.usage.completion_tokens == 4
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0


def test_an_idle_server_sleeps(server):
    time.sleep(0.3)
    before = cpu_seconds(server.process.pid)
    time.sleep(2)
    assert cpu_seconds(server.process.pid) - before <= 0.1


def test_sigterm_lets_a_running_stream_finish():
    with Server() as server:
        stream = server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Tell a long story."}],
            max_tokens=48, temperature=0, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True})
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 4:
                server.terminate()
                time.sleep(0.2)
                assert_takes_no_new_work(server)
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage.completion_tokens == 48
        assert server.wait() == 0, server.log_tail()


def assert_takes_no_new_work(server):
    try:
        assert server.request("GET", "/health/ready").status == 503
    except OSError:
        pass
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        server.client().completions.create(model=MODEL, prompt="x", max_tokens=1)


@pytest.mark.parametrize("content", [
    b"", b"GGUF", b"not a model at all " * 50, b"GGUF\x03\0\0\0" + b"\xff" * 64,
])
def test_a_broken_model_file_is_one_line_and_an_exit_code(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    result = subprocess.run(
        [binary_path(), "serve", "--model", path, "--port", "0"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert result.returncode not in (0, -6, -11, 101), result
    errors = result.stderr.decode().strip().splitlines()
    assert "broken.gguf" in errors[-1], errors


def test_the_models_are_listed():
    result = subprocess.run([binary_path(), "models"], capture_output=True, timeout=30, text=True)
    assert result.returncode == 0
    assert MODEL in result.stdout
