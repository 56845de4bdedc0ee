"""/v1/chat/completions as the official SDK uses it."""

import json

from conftest import MODEL

ASK = [{"role": "user", "content": "Name three primary colours, separated by commas."}]
STORY = [{"role": "user", "content": "Invent a name for a planet and describe it."}]


def chat(client, messages=ASK, **options):
    options = {"max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_models_are_listed(client):
    models = list(client.models.list())
    assert MODEL in [model.id for model in models]
    one = client.models.retrieve(MODEL)
    assert one.object == "model"
    assert one.model_extra["max_model_len"] > 0


def test_answer_is_complete(client):
    answer = chat(client)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert "red" in choice.message.content.lower()
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 24


def test_max_tokens_ends_with_length(client):
    answer = chat(client, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 1
    answer = chat(client, max_tokens=None, max_completion_tokens=2)
    assert answer.usage.completion_tokens == 2


def test_stream_is_well_formed_and_equals_the_answer(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    answer = chat(client)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {MODEL}

    first, *contents, finish, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].finish_reason is None
    assert all(chunk.choices[0].finish_reason is None for chunk in contents)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert finish.choices[0].finish_reason == answer.choices[0].finish_reason
    assert not finish.choices[0].delta.content
    assert usage.choices == []
    assert usage.usage.completion_tokens == answer.usage.completion_tokens
    assert usage.usage.prompt_tokens == answer.usage.prompt_tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == answer.choices[0].message.content


def test_stream_without_usage_has_no_usage_chunk(client):
    chunks = list(chat(client, stream=True))
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason is not None


def test_stream_on_the_wire_ends_with_done(server):
    body = {"model": MODEL, "messages": ASK, "stream": True, "max_tokens": 3, "temperature": 0}
    answer = server.request("POST", "/v1/chat/completions", body)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"]
    events = [line for line in answer.body.decode().split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        choice = json.loads(event.removeprefix("data: "))["choices"][0]
        assert "finish_reason" in choice


def test_logprobs_describe_the_tokens(client):
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=8)
    choice = answer.choices[0]
    entries = choice.logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        ordered = [top.logprob for top in entry.top_logprobs]
        assert ordered == sorted(ordered, reverse=True)
    joined = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert joined.startswith(choice.message.content)


def test_streamed_logprobs_equal_the_answers(client):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 8}
    whole = [entry.logprob for entry in chat(client, **options).choices[0].logprobs.content]
    streamed = []
    for chunk in chat(client, stream=True, **options):
        if chunk.choices[0].logprobs:
            streamed += [entry.logprob for entry in chunk.choices[0].logprobs.content]
    assert streamed == whole


def test_n_choices(client):
    greedy = chat(client, n=2, max_tokens=8)
    assert [choice.index for choice in greedy.choices] == [0, 1]
    assert greedy.choices[0].message.content == greedy.choices[1].message.content
    assert greedy.usage.completion_tokens == 2 * chat(client, max_tokens=8).usage.completion_tokens
    drawn = chat(client, STORY, n=3, temperature=1.2, seed=7, max_tokens=16)
    assert len({choice.message.content for choice in drawn.choices}) > 1


def test_streamed_choices_equal_the_answers(client):
    options = {"n": 2, "temperature": 0.9, "seed": 11, "max_tokens": 12}
    whole = chat(client, STORY, **options)
    texts, reasons = ["", ""], [None, None]
    for chunk in chat(client, STORY, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_seed_makes_sampling_reproducible(client):
    def text(seed):
        answer = chat(client, STORY, temperature=1.0, seed=seed, max_tokens=16)
        return answer.choices[0].message.content

    assert text(1) == text(1)
    assert len({text(seed) for seed in (1, 2, 3)}) > 1


def test_stop_string_ends_the_text_and_never_leaks(client):
    whole = chat(client, STORY, max_tokens=24).choices[0].message.content
    stop = whole[len(whole) // 2:len(whole) // 2 + 4]
    expected = whole[:whole.index(stop)]

    answer = chat(client, STORY, max_tokens=24, stop=[stop, "never said"])
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"

    text, reason = "", None
    for chunk in chat(client, STORY, max_tokens=24, stop=stop, stream=True):
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason
    assert (text, reason) == (expected, "stop")


def test_logit_bias_and_top_k(server, client):
    (token,) = server.tokenize(prompt=" yes")
    forced = chat(client, max_tokens=3, logit_bias={str(token): 100})
    assert forced.choices[0].message.content.strip() == "yes yes yes"
    best_only = chat(client, temperature=1.0, extra_body={"top_k": 1})
    assert best_only.choices[0].message.content == chat(client).choices[0].message.content


def test_content_parts_and_conversation(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": ASK[0]["content"]}]}]
    assert chat(client, parts).choices[0].message == chat(client).choices[0].message
    conversation = [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": "The colour of the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And of grass?"},
    ]
    assert "green" in chat(client, conversation).choices[0].message.content.lower()


def test_a_repeated_prompt_comes_from_the_cache(client):
    words = " ".join(f"item {number * 37 % 101}," for number in range(90))
    messages = [{"role": "user", "content": f"Which number comes first? {words}"}]

    def ask():
        return chat(client, messages, max_tokens=12, logprobs=True)

    first, second = ask(), ask()
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens // 2
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert second.choices[0].message == first.choices[0].message
    assert second.choices[0].logprobs == first.choices[0].logprobs
