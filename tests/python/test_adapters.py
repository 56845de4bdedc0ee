"""Adapters with the official SDK, on a tiny model: loaded at the start and while the server runs."""

import shutil

import openai
import pytest

from conftest import MODEL, ROOT, Server

TINY = ROOT / "models" / "tiny"
BASE = TINY / "hf-sharded"
ADAPTER, OTHER = TINY / "lora-qwen2-all", TINY / "lora-qwen2-patterns"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(OTHER, root / "other")
    return root


@pytest.fixture(scope="module")
def adapted(root):
    flags = ["--lora-modules", f"first={ADAPTER}", "--lora-root", root, "--max-lora-rank", "8"]
    with Server(*flags, model=BASE) as running:
        yield running


def say(server, model, text="The quick brown fox"):
    answer = server.client().completions.create(
        model=model, prompt=text, max_tokens=16, temperature=0, logprobs=0)
    assert answer.model == model
    return answer.choices[0].logprobs.token_logprobs


def test_models_are_listed_with_their_parents(adapted):
    models = {model.id: model for model in adapted.client().models.list()}
    assert models["first"].parent == MODEL and models["first"].root == str(ADAPTER)
    assert models[MODEL].parent is None


def test_an_adapter_answers_for_itself_and_unknown_names_do_not(adapted):
    assert say(adapted, "first") != say(adapted, MODEL)
    assert say(adapted, "first") == say(adapted, "first")
    with pytest.raises(openai.NotFoundError):
        say(adapted, "second")


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(adapted, root):
    before = [say(adapted, model) for model in ("first", MODEL)]
    answer = adapted.request("POST", "/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "other"})
    assert (answer.status, answer.body) == (200, b"Success: LoRA adapter 'second' added successfully.")
    second = say(adapted, "second")
    assert second not in before
    by_path = {"lora_name": "second", "lora_path": str(root / "other"), "load_inplace": True}
    assert adapted.request("POST", "/v1/load_lora_adapter", by_path).status == 200
    assert say(adapted, "second") == second
    assert adapted.metrics()["qwen_adapters"] == 2
    for path, status in [(str(ADAPTER), 400), ("../x", 400), ("missing", 404)]:
        body = {"lora_name": "third", "lora_path": path}
        assert adapted.request("POST", "/v1/load_lora_adapter", body).status == status
    assert adapted.request("POST", "/v1/unload_lora_adapter", {"lora_name": "second"}).status == 200
    with pytest.raises(openai.NotFoundError):
        say(adapted, "second")
    assert [say(adapted, model) for model in ("first", MODEL)] == before
    adapted.wait_until_idle()
    assert adapted.metrics()["qwen_adapters"] == 1


def test_an_adapter_that_does_not_fit_ends_the_start_with_one_line():
    server = Server("--lora-modules", f"x={TINY / 'lora-qwen3-all'}", model=BASE)
    assert server.wait() != 0
    assert "it was made for another model" in server.log_tail()
