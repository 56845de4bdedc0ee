"""`/v1/messages` with the official Anthropic SDK and the real model."""

import anthropic
import pytest

from conftest import MODEL, REQUEST_TIMEOUT_S

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
ONE_CALL = {"type": "any", "disable_parallel_tool_use": True}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S)


# The SDK has no such parameter any more, but the protocol does.
GREEDY = {"extra_body": {"temperature": 0}}


def ask(text="What is the capital of France?", **options):
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": 60, **GREEDY, **options}


def test_a_message_answers(claude):
    message = claude.messages.create(**ask(system="Answer in one word."))
    assert "Paris" in message.content[0].text
    assert (message.stop_reason, message.role) == ("end_turn", "assistant")
    assert message._request_id


def test_tokens_are_counted_as_they_are_used(claude):
    options = ask(system="Be kind.")
    usage = claude.messages.create(**options).usage
    used = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    del options["max_tokens"]
    assert claude.messages.count_tokens(**options).input_tokens == used


def test_a_stream_says_the_same_as_a_whole_message(claude):
    whole = claude.messages.create(**ask("Count to five."))
    with claude.messages.stream(**ask("Count to five.")) as stream:
        text = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(text) == whole.content[0].text and 1 < len(text)
    assert final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_tool_is_called_and_its_result_taken(claude):
    options = {"model": MODEL, "max_tokens": 100, "tools": [WEATHER], **GREEDY}
    forced = {"tool_choice": ONE_CALL, "messages": [QUESTION], **options}
    message = claude.messages.create(**forced)
    assert message.stop_reason == "tool_use"
    call = next(block for block in message.content if block.type == "tool_use")
    assert call.name == "get_weather" and "Paris" in call.input["city"]
    with claude.messages.stream(**forced) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[-1].input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "17 degrees, rain"}
    messages = [
        QUESTION,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    answer = claude.messages.create(messages=messages, tool_choice={"type": "none"}, **options)
    assert [block.type for block in answer.content] == ["text"]


def test_ends_have_reasons(claude):
    assert claude.messages.create(**ask("Tell a story.", max_tokens=3)).stop_reason == "max_tokens"
    stopped = claude.messages.create(**ask("Count to five.", stop_sequences=["3"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "3")


def test_a_begun_answer_is_continued(claude):
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]
    message = claude.messages.create(model=MODEL, messages=messages, max_tokens=5, **GREEDY)
    assert message.content[0].text.strip().startswith("Paris")


def test_errors_have_their_classes(claude):
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(**ask(model="none"))
    assert caught.value.body["error"]["type"] == "not_found_error"
    image = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].type"):
        claude.messages.create(**ask([image]))
