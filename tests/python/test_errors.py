"""Whatever is sent, the answer is a 4xx in OpenAI's shape, and the server goes on."""

import json
import random

import openai
import pytest

from conftest import MODEL

MESSAGES = [{"role": "user", "content": "hi"}]
ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


def assert_refused(answer):
    assert 400 <= answer.status < 500, answer
    error = json.loads(answer.body)["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["message"], str)
    return error


@pytest.fixture(autouse=True)
def still_alive(server):
    yield
    assert server.request("GET", "/health/ready").status == 200
    assert server.process.poll() is None


@pytest.mark.parametrize("field, value", [
    ("temperature", "hot"),
    ("temperature", -1),
    ("temperature", 1e30),
    ("top_p", 0),
    ("top_p", 1.5),
    ("n", 0),
    ("n", 10**9),
    ("n", 1.5),
    ("max_tokens", -1),
    ("max_tokens", 10**30),
    ("max_tokens", "many"),
    ("seed", 10**30),
    ("stop", [["nested"]]),
    ("stream", "yes"),
    ("logprobs", "yes"),
    ("top_logprobs", 10**6),
    ("presence_penalty", 99),
    ("frequency_penalty", -99),
    ("logit_bias", {"not a token": 1}),
    ("logit_bias", {"5": 10**9}),
    ("logit_bias", {"99999999": 1}),
    ("repetition_penalty", 0),
    ("min_p", 2),
])
def test_bad_values_name_their_field(server, field, value):
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "logprobs": True, field: value}
    error = assert_refused(server.request("POST", "/v1/chat/completions", body))
    assert error["param"] is not None and error["param"].startswith(field), error


@pytest.mark.parametrize("messages", [
    None, [], {}, "hi", [1], [{}], [{"role": "user"}], [{"role": "nobody", "content": "x"}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "audio"}]}],
])
def test_bad_messages(server, messages):
    body = {"model": MODEL, "messages": messages, "max_tokens": 2}
    error = assert_refused(server.request("POST", "/v1/chat/completions", body))
    assert error["param"] is not None and error["param"].startswith("messages"), error


@pytest.mark.parametrize("prompt", [
    None, {}, 5, [[[1]]], [-1], [10**12], [999_999_999], ["a", 1], [[1], "a"], [1.5], [],
])
def test_bad_prompts(server, prompt):
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
    error = assert_refused(server.request("POST", "/v1/completions", body))
    assert error["param"] is not None and error["param"].startswith("prompt"), error


def test_sdk_sees_its_exceptions(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature="hot")
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")


def test_too_long_a_prompt_is_refused_by_name(client):
    limit = client.models.retrieve(MODEL).model_extra["max_model_len"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[9707] * (limit + 1), max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * (limit + 1)}])
    assert caught.value.code == "context_length_exceeded"


def test_unknown_paths_and_methods(server):
    assert server.request("GET", "/v1/nothing").status == 404
    assert_refused(server.request("POST", "/v1/nothing", {}))
    answer = server.request("GET", "/v1/chat/completions")
    assert answer.status == 405
    assert_refused(answer)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_garbage_is_refused(server, path):
    rng = random.Random(path)
    bodies = [rng.randbytes(4096) for _ in range(8)]
    bodies += [
        b"", b"null", b"[]", b"3", b'"text"', b"{", b"{}", b"\xff\xfe{}", b'{"model": 1}',
        b"[" * 4096, b'{"a":' * 800, b'{"messages":' + b"[" * 4000,
        b'{"model": "x", "messages": [{"role": "user", "content": "\xc3\x28"}]}',
        b'{"temperature": 1e999}', b'{"max_tokens": ' + b"9" * 4000 + b"}",
        json.dumps({"model": MODEL, "prompt": "x", "messages": 7, "tokens": "x", "stop": {}}).encode(),
    ]
    for body in bodies:
        assert_refused(server.request("POST", path, body))


def test_mutated_requests_never_break_the_server(server):
    rng = random.Random(5)
    valid = json.dumps({
        "model": MODEL, "messages": MESSAGES, "max_tokens": 1, "temperature": 0.5, "top_p": 0.9,
        "stop": ["x"], "logit_bias": {"5": 1}, "seed": 1, "n": 1, "stream": False}).encode()
    for _ in range(40):
        body = bytearray(valid)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        answer = server.request("POST", "/v1/chat/completions", bytes(body))
        assert answer.status < 500, (answer, bytes(body))
        if answer.status != 200:
            assert_refused(answer)
