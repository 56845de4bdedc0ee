"""The official SDK of DashScope, both of its generations, with nothing but the base URL changed.

The second one is installed into a directory of its own, which DASHSCOPE_2 names, and runs in
another process.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import dashscope
import dashscope_cases
import dashscope_protocols
from conftest import MODEL, ROOT, Server, binary_path, model_path

HERE = pathlib.Path(__file__).resolve().parent
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def second(server):
    """What became of each case with the newer package."""
    directory = os.environ.get("DASHSCOPE_2", ROOT / ".venv" / "dashscope2")
    assert pathlib.Path(directory, "dashscope").is_dir(), "DASHSCOPE_2 must name its directory"
    path = os.pathsep.join([str(directory), str(HERE)])
    done = subprocess.run(
        [sys.executable, HERE / "dashscope_cases.py", server.url], capture_output=True, text=True,
        timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["version"].startswith("2.")
    return outcome["results"]


def test_the_first_is_the_first():
    assert dashscope_cases.VERSION.startswith("1.26.")


@pytest.mark.parametrize("name", dashscope_cases.cases())
def test_first_generation(server, name):
    dashscope_cases.use(server.url)
    mark = server.mark_log()
    dashscope_cases.cases()[name](server.url)
    if "agent" in name:
        # One request each for twenty steps and the last answer: nothing was tried again.
        assert server.outcomes_since(mark) == ["finished"] * 21


@pytest.mark.parametrize("name", [*dashscope_cases.cases(), *dashscope_protocols.NAMES])
def test_second_generation(second, name):
    assert second[name] is None, second[name]


def test_names_are_configuration(tmp_path):
    config = tmp_path / "server.toml"
    config.write_text(f'[aliases]\n"text-embedding-*" = "{MODEL}"\nmine = "{MODEL}"\n')
    with Server("--no-dashscope-names", "--config", config) as server:
        dashscope_cases.use(server.url)
        answer = dashscope_cases.call(dashscope_cases.COLOURS, model="mine", max_tokens=2)
        assert answer.headers["x-served-model"] == MODEL
        assert dashscope_cases.call(dashscope_cases.COLOURS, model="qwen-plus").status_code == 404
        vectors = dashscope.TextEmbedding.call(model="text-embedding-v4", input="a cat")
        assert len(vectors.output["embeddings"]) == 1
        models = server.json("GET", "/v1/models")["data"]
        assert [model["id"] for model in models] == [MODEL, "mine"]


def test_a_name_for_a_model_that_is_not_there_is_refused():
    command = [binary_path(), "serve", "--model", model_path(), "--alias", "x=nobody", "--port", "0"]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "`--alias x=nobody`" in done.stderr, done.stderr
