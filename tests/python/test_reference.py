"""The real model against transformers in float32 on the same weights (reference.json)."""

import json
import pathlib

import pytest

from conftest import MODEL, ROOT

NAMES = [prompt["name"] for prompt in json.loads(
    (pathlib.Path(ROOT) / "models" / MODEL / "reference.json").read_text())["prompts"]]
# Closer than this the order of the two best tokens is a matter of rounding.
NEAR_TIE = 0.1
MAX_MEAN_DIFFERENCE = 0.02


def reference_logprobs(prompt):
    """Log-probability of each generated token: greedy, so the best of its step."""
    for step, token in zip(prompt["per_step_top5"], prompt["generated_ids"]):
        assert step["top_ids"][0] == token
        yield step["top_logprobs"][0]


def num_certain_tokens(prompt):
    """How many generated tokens come before the first near tie."""
    for index, step in enumerate(prompt["per_step_top5"]):
        if step["top_logprobs"][0] - step["top_logprobs"][1] < NEAR_TIE:
            return index
    return len(prompt["generated_ids"])


def teacher_forced(client, prompt):
    """The server's log-probabilities of the reference's tokens."""
    given = prompt["prompt_ids"] + prompt["generated_ids"]
    answer = client.completions.create(
        model=MODEL, prompt=given, echo=True, logprobs=1, max_tokens=1, temperature=0)
    logprobs = answer.choices[0].logprobs.token_logprobs
    assert logprobs[0] is None
    return logprobs[len(prompt["prompt_ids"]):len(given)]


@pytest.mark.parametrize("name", NAMES)
def test_prompt_ids_equal_the_reference(server, reference, name):
    prompt = reference[name]
    body = {"messages": prompt["messages"], "add_generation_prompt": True}
    if prompt["tools"]:
        body["tools"] = prompt["tools"]
    assert server.tokenize(**body) == prompt["prompt_ids"]
    assert server.tokenize(prompt=prompt["prompt_text"]) == prompt["prompt_ids"]
    assert server.detokenize(prompt["prompt_ids"]) == prompt["prompt_text"]


def test_chat_prompts_have_the_reference_length(client, reference):
    for prompt in reference.values():
        tools = {"tools": prompt["tools"]} if prompt["tools"] else {}
        answer = client.chat.completions.create(
            model=MODEL, messages=prompt["messages"], max_tokens=1, **tools)
        assert answer.usage.prompt_tokens == len(prompt["prompt_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_agrees_until_the_first_near_tie(server, client, reference, name):
    prompt = reference[name]
    certain = num_certain_tokens(prompt)
    answer = client.completions.create(
        model=MODEL, prompt=prompt["prompt_ids"], temperature=0,
        max_tokens=len(prompt["generated_ids"]), extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    assert choice.model_extra["prompt_token_ids"] == prompt["prompt_ids"]
    assert choice.model_extra["token_ids"][:certain] == prompt["generated_ids"][:certain]
    if certain == len(prompt["generated_ids"]):
        text, _, _ = prompt["generated_text"].partition("<|im_end|>")
        assert choice.text == text
        assert choice.finish_reason == ("stop" if "<|im_end|>" in prompt["generated_text"] else "length")


def test_given_texts_have_the_reference_log_probabilities(client, reference):
    differences = []
    for name, prompt in reference.items():
        expected = list(reference_logprobs(prompt))
        got = teacher_forced(client, prompt)
        assert len(got) == len(expected)
        of_this = [abs(a - b) for a, b in zip(got, expected)]
        mean = sum(of_this) / len(of_this)
        print(f"{name}: mean difference {mean:.4f}, largest {max(of_this):.4f}")
        differences += of_this
    assert sum(differences) / len(differences) <= MAX_MEAN_DIFFERENCE


def test_first_step_has_the_reference_top_tokens(client, reference):
    for prompt in reference.values():
        answer = client.completions.create(
            model=MODEL, prompt=prompt["prompt_ids"], logprobs=5, max_tokens=1, temperature=0)
        top = answer.choices[0].logprobs.top_logprobs[0]
        for entry in prompt["first_top5"][:3]:
            assert entry["token"] in top, (entry, top)
            assert abs(top[entry["token"]] - entry["logprob"]) < 0.3
