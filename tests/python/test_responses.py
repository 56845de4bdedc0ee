"""`/v1/responses` with the official OpenAI SDK and the real model."""

import json

import openai
import pydantic
import pytest

from conftest import MODEL

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Capital(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=30)
    inhabitants: int = pydantic.Field(ge=0)


def ask(client, text="What is the capital of France?", **options):
    options = {"max_output_tokens": 60, "temperature": 0, **options}
    return client.responses.create(model=MODEL, input=text, **options)


def test_a_response_answers(client):
    response = ask(client, instructions="Answer in one word.")
    assert response.status == "completed"
    assert "Paris" in response.output_text
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_conversation_goes_on_from_a_stored_response(client):
    first = ask(client, "My name is Ludmila. Say hello to me.")
    second = ask(client, "What is my name?", previous_response_id=first.id)
    assert "Ludmila" in second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "user"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    unstored = ask(client, store=False)
    with pytest.raises(openai.BadRequestError, match=unstored.id):
        ask(client, "And?", previous_response_id=unstored.id)


def test_a_stream_says_the_same_as_a_whole_answer(client):
    whole = ask(client, "Count to five.")
    with client.responses.stream(
            model=MODEL, input="Count to five.", max_output_tokens=60, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and 1 < len(deltas)
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]


def test_parse_gives_the_pydantic_model(client):
    response = client.responses.parse(
        model=MODEL, input="Describe the capital of France.", text_format=Capital,
        max_output_tokens=100)
    assert isinstance(response.output_parsed, Capital)


def test_what_is_cut_is_incomplete(client):
    response = ask(client, "Tell me a long story.", max_output_tokens=5)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_tool_is_called_and_its_result_taken(client):
    question = {"role": "user", "content": "What is the weather in Paris?"}
    options = {
        "tools": [WEATHER], "parallel_tool_calls": False, "max_output_tokens": 100,
        "temperature": 0}
    response = client.responses.create(
        model=MODEL, input=[question], tool_choice="required", **options)
    call = next(item for item in response.output if item.type == "function_call")
    assert call.name == "get_weather" and "Paris" in json.loads(call.arguments)["city"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "17 degrees, rain"}
    answer = client.responses.create(
        model=MODEL, input=[question, *response.output, result], tool_choice="none", **options)
    assert [item.type for item in answer.output] == ["message"]
    with client.responses.stream(
            model=MODEL, input=[question], tool_choice="required", **options) as stream:
        events = list(stream)
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == done.arguments == call.arguments


def test_logprobs_are_included_when_asked_for(client):
    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    part = response.output[0].content[0]
    assert "".join(entry.token for entry in part.logprobs).startswith(part.text)
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


def test_flaws_are_named(client):
    for options, param in [
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **options)
        assert caught.value.param == param
