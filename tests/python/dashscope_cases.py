"""What clients of DashScope do, with whichever `dashscope` package is installed.

Each function that begins with `case_` takes the URL of a running server. `python dashscope_cases.py
URL` runs them all and prints one JSON object: what went wrong in each, or null. So the same cases
run in another process with another version of the package.
"""

import asyncio
import json
import sys
import traceback
from http import HTTPStatus

import dashscope
from dashscope import (
    AioGeneration, Generation, Models, MultiModalConversation, TextEmbedding, TextReRank,
    Tokenization)
from dashscope.version import __version__ as VERSION

import dashscope_protocols

HOSTED = "qwen-plus-2025-01-25"
LOCAL = "qwen2.5-coder-0.5b-instruct"
COLOURS = [{"role": "user", "content": "Name three primary colours, separated by commas."}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the current weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]}}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
GREEDY = {"temperature": 0, "max_tokens": 48}


def use(url):
    dashscope.base_http_api_url = url + "/api/v1"
    dashscope.api_key = "none"


def call(messages=None, **options):
    options = {"model": HOSTED, "result_format": "message", **GREEDY, **options}
    return Generation.call(messages=messages, **options)


def good(response):
    assert response.status_code == HTTPStatus.OK, response
    return response


def first(response):
    return good(response).output.choices[0]


def case_whole_answer(url):
    answer = call(COLOURS)
    choice = first(answer)
    assert "red" in choice.message.content.lower()
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert choice.message.reasoning_content == ""
    usage = answer.usage
    assert usage.input_tokens + usage.output_tokens == usage.total_tokens
    assert answer.request_id


def case_streams_add_up(url):
    whole = first(call(COLOURS)).message.content
    frames = [good(frame) for frame in call(COLOURS, stream=True, incremental_output=True)]
    pieces = [frame.output.choices[0].message.content for frame in frames]
    assert "".join(pieces) == whole and 3 < len(pieces) and pieces[-1] == ""
    ends = [frame.output.choices[0].finish_reason for frame in frames]
    assert ends[-1] == "stop" and set(ends[:-1]) == {"null"}
    counts = [frame.usage.output_tokens for frame in frames]
    assert counts == sorted(counts) and 0 < counts[0]
    # The package merges increments where the caller wants everything so far.
    for options in ({}, {"incremental_output": False}):
        frames = list(call(COLOURS, stream=True, **options))
        assert frames[-1].output.choices[0].message.content == whole, options
        texts = [good(frame).output.choices[0].message.content for frame in frames]
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:])), texts


def case_text_results(url):
    prompt = COLOURS[0]["content"]
    answer = good(Generation.call(model="qwen-turbo", prompt=prompt, **GREEDY))
    assert "red" in answer.output.text.lower() and answer.output.finish_reason == "stop"
    frames = list(Generation.call(
        model="qwen-turbo", prompt=prompt, stream=True, incremental_output=True, **GREEDY))
    assert "".join(good(frame).output.text for frame in frames) == answer.output.text
    assert frames[-1].output.finish_reason == "stop" and frames[0].output.finish_reason == "null"


def case_history_and_raw_prompts(url):
    history = [{"user": "My name is Ada.", "bot": "Hello Ada."}]
    answer = good(Generation.call(
        model="qwen-max", prompt="What is my name?", history=history, **GREEDY))
    assert "Ada" in answer.output.text
    raw = good(Generation.call(
        model="qwen-max", prompt="def add(a, b):\n    return", use_raw_prompt=True,
        temperature=0, max_tokens=8))
    assert "a + b" in raw.output.text


def case_stop_sequences(url):
    full = first(call(COLOURS)).message.content
    word = full.split(", ")[1]
    stopped = first(call(COLOURS, stop=[word]))
    assert word not in stopped.message.content and full.startswith(stopped.message.content)
    tokens = good(Tokenization.call(model=HOSTED, prompt=", " + word)).output["token_ids"]
    assert 1 < len(tokens)
    for stop in ([tokens], tokens):
        by_tokens = first(call(COLOURS, stop=stop))
        assert by_tokens.message.content == full.split(", " + word)[0], by_tokens
        assert by_tokens.finish_reason == "stop"


def case_tools(url):
    choice = first(call(WEATHER, tools=TOOLS, tool_choice=NAMED))
    assert choice.finish_reason == "tool_calls"
    (called,) = choice.message.tool_calls
    assert called["function"]["name"] == "get_weather" and called["type"] == "function"
    assert "Paris" in json.loads(called["function"]["arguments"])["city"]
    frames = list(call(
        WEATHER, tools=TOOLS, tool_choice=NAMED, stream=True, incremental_output=True))
    fragments = [
        fragment for frame in frames
        for fragment in good(frame).output.choices[0].message.get("tool_calls") or []]
    assert fragments[0]["id"] and fragments[0]["function"]["name"] == "get_weather"
    assert {fragment["id"] for fragment in fragments[1:]} == {""}
    joined = "".join(fragment["function"]["arguments"] for fragment in fragments)
    assert joined == called["function"]["arguments"]
    assert frames[-1].output.choices[0].finish_reason == "tool_calls"
    merged = list(call(WEATHER, tools=TOOLS, tool_choice=NAMED, stream=True))[-1]
    (whole,) = first(merged).message.tool_calls
    assert whole["function"]["arguments"] == called["function"]["arguments"]


def case_an_agent_of_twenty_steps(url):
    """A conversation in which each step calls a tool and reads its result."""
    add = {"type": "function", "function": {
        "name": "add", "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {
            "a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}
    forced = {"type": "function", "function": {"name": "add"}}
    messages = [{"role": "user", "content": "Add 1 to 0, and go on adding 1 to the result."}]
    for step in range(20):
        options = {"tools": [add], "tool_choice": forced, "parallel_tool_calls": False,
                   "max_tokens": 64, "seed": step}
        if step % 2 == 0:
            choice = first(call(messages, **options))
        else:
            # Everything so far, so the last frame is the whole call.
            choice = first(list(call(messages, stream=True, **options))[-1])
        (called,) = choice.message.tool_calls
        arguments = json.loads(called["function"]["arguments"])
        assert set(arguments) == {"a", "b"}, arguments
        messages.append({"role": "assistant", "content": choice.message.content,
                         "tool_calls": [dict(called)]})
        messages.append({"role": "tool", "content": str(arguments["a"] + arguments["b"]),
                         "tool_call_id": called["id"]})
    last = call(messages, tools=[add], tool_choice="none")
    assert first(last).message.content
    assert 0 < last.usage.prompt_tokens_details["cached_tokens"]


def case_formats(url):
    messages = [{"role": "user", "content": "Ada is 36. Answer as JSON with name and age."}]
    schema = {"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False}
    named = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for response_format in ({"type": "json_object"}, named):
        content = first(call(messages, response_format=response_format)).message.content
        person = json.loads(content)
        assert isinstance(person, dict)
    assert person == {"name": "Ada", "age": 36}


def case_several_choices_and_logprobs(url):
    answer = good(call(COLOURS, n=2, seed=7, temperature=1, logprobs=True, top_logprobs=2))
    assert [choice.index for choice in answer.output.choices] == [0, 1]
    for choice in answer.output.choices:
        entries = choice.logprobs["content"]
        assert entries[0]["logprob"] <= 0 and len(entries[0]["top_logprobs"]) == 2
    frames = list(call(COLOURS, n=2, seed=7, temperature=1, stream=True, incremental_output=True))
    text = ["", ""]
    for frame in frames:
        for choice in good(frame).output.choices:
            text[choice.index] += choice.message.content
    assert text == [choice.message.content for choice in answer.output.choices]


def case_a_begun_answer_is_continued(url):
    messages = [{"role": "user", "content": "What is the capital of France?"},
                {"role": "assistant", "content": "The capital of France is", "partial": True}]
    assert first(call(messages, max_tokens=4)).message.content.strip().startswith("Paris")


def case_a_marked_prefix_is_kept(url):
    rules = "".join(f"Rule {number}: be brief and kind. " for number in range(90))
    part = {"type": "text", "text": VERSION + rules, "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "system", "content": [part]}, *COLOURS]
    created = good(call(messages)).usage.prompt_tokens_details
    assert 512 < created["cache_creation_input_tokens"]
    hit = good(call(messages)).usage.prompt_tokens_details
    assert created["cache_creation_input_tokens"] <= hit["cached_tokens"] + 16
    assert hit["cache_creation_input_tokens"] == 0


def case_text_through_the_multimodal_endpoint(url):
    messages = [{"role": "user", "content": [{"text": COLOURS[0]["content"]}]}]
    options = {"model": "qwen3.5-plus", "messages": messages, **GREEDY}
    whole = first(MultiModalConversation.call(**options)).message.content
    assert "red" in whole[0]["text"].lower()
    frames = list(MultiModalConversation.call(**options, stream=True, incremental_output=True))
    contents = [good(frame).output.choices[0].message.content for frame in frames]
    assert "".join(part["text"] for content in contents for part in content) == whole[0]["text"]
    image = [{"role": "user", "content": [{"image": "https://localhost/x.png"}]}]
    refused = MultiModalConversation.call(model="qwen3.5-plus", messages=image)
    assert refused.status_code == 400 and "content[0].image" in refused.message


def case_tokens_embeddings_and_models(url):
    tokens = good(Tokenization.call(model=HOSTED, prompt="代码改变世界"))
    assert tokens.output["token_ids"] == [46100, 101933, 99489]
    assert tokens.output["tokens"] == ["代码", "改变", "世界"]
    assert tokens.usage["input_tokens"] == 3
    vectors = good(TextEmbedding.call(model=LOCAL, input=["a cat", "a dog"], text_type="query"))
    embeddings = vectors.output["embeddings"]
    assert [entry["text_index"] for entry in embeddings] == [0, 1]
    assert len(embeddings[0]["embedding"]) == 896 and 0 < vectors.usage["total_tokens"]
    models = good(Models.list()).output
    assert LOCAL in [model["model"] for model in models["models"]]
    assert good(Models.get("qwen-max")).output["model"] == "qwen-max"
    assert Models.get("nobody").status_code == 404


def case_refusals(url):
    for options, status, code, words in [
        ({"model": "gpt-4o"}, 404, "ModelNotFound", "gpt-4o"),
        ({"temperature": 7}, 400, "InvalidParameter", "parameters.temperature"),
        ({"enable_search": True}, 400, "InvalidParameter", "parameters.enable_search"),
        ({"plugins": {"calculator": {}}}, 400, "InvalidParameter", "X-DashScope-Plugin"),
        ({"result_format": "xml"}, 400, "InvalidParameter", "parameters.result_format"),
    ]:
        for stream in (False, True):
            response = call(COLOURS, stream=stream, **options)
            response = list(response)[0] if stream else response
            assert (response.status_code, response.code) == (status, code), response
            assert words in response.message and response.request_id, response
    long = [{"role": "user", "content": "x " * 40_000}]
    response = call(long)
    assert response.code == "InvalidParameter"
    assert response.message.startswith("Range of input length should be [1, 32767]")
    response = TextReRank.call(model="gte-rerank", query="a", documents=["b"])
    assert response.status_code == 400 and "cannot rank" in response.message


def case_asynchronous_calls(url):
    async def ask():
        answer = await AioGeneration.call(
            model=HOSTED, messages=COLOURS, result_format="message", **GREEDY)
        stream = await AioGeneration.call(
            model=HOSTED, messages=COLOURS, result_format="message", stream=True,
            incremental_output=True, **GREEDY)
        return answer, [frame async for frame in stream]

    answer, frames = asyncio.run(ask())
    pieces = [good(frame).output.choices[0].message.content for frame in frames]
    assert "".join(pieces) == first(answer).message.content


def cases():
    found = {name: value for name, value in globals().items() if name.startswith("case_")}
    if VERSION.startswith("2."):
        found |= dashscope_protocols.CASES
    return found


def failure(case, url):
    use(url)
    try:
        case(url)
    except Exception:  # pylint: disable=broad-except
        return traceback.format_exc(limit=4)
    return None


if __name__ == "__main__":
    results = {name: failure(case, sys.argv[1]) for name, case in cases().items()}
    print(json.dumps({"version": VERSION, "results": results}))
