"""Filling in the middle, best_of, what a request becomes, and prefixes to keep."""

import json

import openai
import pytest

from conftest import MODEL, Server

PREFIX = "def add(a, b):\n    # the sum of a and b\n    return "
SUFFIX = "\n\nprint(add(1, 2))  # 3\n"


def fim(server, **body):
    body = {"model": MODEL, "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 32, **body}
    return server.json("POST", "/v1/fim/completions", {"temperature": 0, **body})


def test_suffix_fills_in_the_middle(client):
    answer = client.completions.create(
        model=MODEL, prompt=PREFIX, suffix=SUFFIX, max_tokens=32, temperature=0)
    choice = answer.choices[0]
    assert choice.text.startswith("a + b\n")
    plain = client.completions.create(model=MODEL, prompt=PREFIX, max_tokens=32, temperature=0)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
    assert "<|" not in choice.text


def test_fim_completions_agree_with_suffix(server, client):
    answer = fim(server)
    completion = client.completions.create(
        model=MODEL, prompt=PREFIX, suffix=SUFFIX, max_tokens=32, temperature=0)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == completion.choices[0].text
    assert answer["usage"]["completion_tokens"] == completion.usage.completion_tokens


def test_fim_streams_chunks_of_chats(server):
    stream = server.request("POST", "/v1/fim/completions", {
        "model": MODEL, "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 32, "temperature": 0,
        "stream": True})
    assert stream.status == 200
    chunks = [line[6:] for line in stream.body.decode().splitlines() if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]"
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks[:-1]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == fim(server)["choices"][0]["message"]["content"]


def test_the_best_of_several_are_likelier_than_the_rest(client):
    options = {"prompt": "The weather today is", "max_tokens": 8, "temperature": 1.5, "seed": 7}
    all_of_them = client.completions.create(model=MODEL, n=6, logprobs=0, **options)

    def mean(choice):
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    ranked = sorted(all_of_them.choices, key=mean, reverse=True)
    best = client.completions.create(model=MODEL, n=2, best_of=6, **options)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == all_of_them.usage.completion_tokens
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, n=3, best_of=2, **options)


def test_what_is_rendered_is_what_is_answered(server, client):
    messages = [{"role": "user", "content": "Say hi."}]
    rendered = server.json(
        "POST", "/v1/chat/completions/render", {"model": MODEL, "messages": messages})
    assert rendered["token_ids"] == server.tokenize(messages=messages)
    assert rendered["prompt"] == server.detokenize(rendered["token_ids"])
    assert rendered["prompt"].endswith("<|im_start|>assistant\n")
    chat = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0)
    same = client.completions.create(
        model=MODEL, prompt=rendered["token_ids"], max_tokens=8, temperature=0)
    assert same.choices[0].text == chat.choices[0].message.content
    rendered = server.json("POST", "/v1/completions/render", {
        "model": MODEL, "prompt": PREFIX, "suffix": SUFFIX})
    assert rendered[0]["prompt"] == (
        f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>")


def test_a_marked_prefix_survives_others():
    """The cache holds two long prompts; the marked one is still there after several others."""
    system = " ".join(f"Rule {i}: be brief." for i in range(55))
    part = {"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}
    with Server("--max-model-len", "1000", "--kv-cache-memory", "24MiB") as small:
        def ask(content, question="Hi"):
            answer = small.json("POST", "/v1/chat/completions", {
                "model": MODEL, "max_tokens": 1, "temperature": 0, "messages": [
                    {"role": "system", "content": content},
                    {"role": "user", "content": question}]})
            return answer["usage"]["prompt_tokens_details"]
        first = ask([part])
        assert first["cached_tokens"] == 0 and 300 < first["cache_write_tokens"]
        assert first["cache_write_tokens"] == first["cache_creation_input_tokens"]
        plain = ask(system.replace("brief", "plain"))
        assert "cache_write_tokens" not in plain
        for word in "abcde":
            ask(system.replace("Rule", f"Law {word}"))
        again = ask([part], "Who are you?")
        assert first["cache_write_tokens"] <= again["cached_tokens"]
        assert again["cache_write_tokens"] == 0
        assert ask(system.replace("brief", "plain"))["cached_tokens"] < 100
