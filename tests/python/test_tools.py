"""Tool calls as the official SDK makes them, with the real model, in every mode."""

import json

import openai
import pytest

from conftest import MODEL

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {"type": "function", "function": {
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 40},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city"],
    },
}}
TIME = {"type": "function", "function": {
    "name": "get_time", "description": "The time of day",
    "parameters": {"type": "object", "properties": {}},
}}
TOOLS = [WEATHER, TIME]


def named(name):
    return {"type": "function", "function": {"name": name}}


def ask(client, messages=ASK, **options):
    options = {"tools": TOOLS, "max_tokens": 400, "temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def check_call(call):
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert isinstance(arguments["city"], str) and arguments.get("unit", "C") in ("C", "F")
        assert set(arguments) <= {"city", "unit"}
    else:
        assert (call.function.name, arguments) == ("get_time", {})
    return arguments


def calls_of(choice):
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert len({call.id for call in calls}) == len(calls)
    return calls


def fold(stream):
    """Content, calls and the finish reason of a stream, after checking the rules of fragments."""
    content, calls, finish = "", [], None
    for chunk in stream:
        for choice in chunk.choices:
            assert finish is None, "nothing comes after the end"
            finish = choice.finish_reason
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                if part.index == len(calls):
                    assert part.id and part.type == "function" and part.function.name
                    assert part.function.arguments == ""
                    calls.append([part.id, part.function.name, ""])
                else:
                    assert part.index == len(calls) - 1
                    assert part.id is None and part.function.name is None
                    with pytest.raises(ValueError):
                        json.loads(calls[-1][2])
                    calls[-1][2] += part.function.arguments
            if finish:
                assert not choice.delta.content and not choice.delta.tool_calls
    for _, _, arguments in calls:
        json.loads(arguments)
    return content, calls, finish


def test_auto_calls_where_a_tool_helps(client):
    choice = ask(client).choices[0]
    call = calls_of(choice)[0]
    assert call.function.name == "get_weather" and check_call(call)["city"] == "Paris"
    assert not choice.message.content


def test_auto_answers_where_none_does(client):
    hello = [{"role": "user", "content": "Say hello in French."}]
    for tools in (TOOLS, openai.NOT_GIVEN):
        choice = ask(client, hello, tools=tools, max_tokens=20).choices[0]
        if choice.finish_reason != "tool_calls":
            assert choice.message.tool_calls is None and choice.message.content


@pytest.mark.parametrize("choice, names", [
    ("required", {"get_weather", "get_time"}),
    (named("get_time"), {"get_time"}),
    (named("get_weather"), {"get_weather"}),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("get_time")]}},
     {"get_time"}),
])
@pytest.mark.parametrize("temperature", [0, 2])
def test_forced_calls_come_and_fit(client, choice, names, temperature):
    answer = ask(client, tool_choice=choice, temperature=temperature, n=4, seed=5, max_tokens=1000)
    for one in answer.choices:
        calls = calls_of(one)
        assert 1 <= len(calls) <= 8 and not one.message.content
        for call in calls:
            check_call(call)
            assert call.function.name in names


def test_allowed_tools_leave_out_the_others(client):
    allowed = {"type": "allowed_tools",
               "allowed_tools": {"mode": "auto", "tools": [named("get_time")]}}
    message = ask(client, tool_choice=allowed, max_tokens=100).choices[0].message
    assert {call.function.name for call in message.tool_calls or []} <= {"get_time"}


def test_none_is_text(client):
    choice = ask(client, tool_choice="none", max_tokens=30).choices[0]
    assert choice.message.tool_calls is None and choice.message.content
    assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_that_may_not_be_parallel_are_single(client, choice):
    two = [{"role": "user", "content": "What is the weather in Paris, and in Rome? Call the tool."}]
    answer = ask(client, two, tool_choice=choice, parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls or []) <= 1
    if choice == "required":
        check_call(calls_of(answer.choices[0])[0])


@pytest.mark.parametrize("choice", ["auto", "required", named("get_weather")])
def test_a_stream_has_the_fragments_of_the_answer(client, choice):
    whole = ask(client, tool_choice=choice).choices[0]
    content, calls, finish = fold(ask(client, tool_choice=choice, stream=True))
    assert finish == whole.finish_reason == "tool_calls"
    assert content == (whole.message.content or "")
    assert [(name, arguments) for _, name, arguments in calls] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    if choice != "auto":
        chunks = list(ask(client, tool_choice=choice, stream=True))
        parts = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.tool_calls]
        assert 3 < len(parts), "arguments come as they are written"


def test_the_stream_helper_of_the_sdk_accumulates(client):
    with client.chat.completions.stream(
            model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required",
            parallel_tool_calls=False, max_tokens=200, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    check_call(calls_of(final)[0])


def test_results_are_answered(client):
    call = calls_of(ask(client, tool_choice=named("get_weather")).choices[0])[0]
    history = ASK + [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"},
    ]
    said = {"tool_choice": "none", "max_tokens": 60}
    choice = ask(client, history, **said).choices[0]
    assert choice.finish_reason == "stop" and "18" in choice.message.content
    # Content in parts, and a second round.
    history[-1]["content"] = [{"type": "text", "text": "18 degrees and sunny"}]
    assert ask(client, history, **said).choices[0].message.content == choice.message.content
    history += [{"role": "assistant", "content": choice.message.content},
                {"role": "user", "content": "And what time is it?"}]
    check_call(calls_of(ask(client, history, tool_choice=named("get_time")).choices[0])[0])


def test_a_strict_schema_holds_when_hot(client):
    strict = {"type": "function", "function": {"name": "save", "strict": True, "parameters": {
        "type": "object",
        "properties": {"size": {"type": "integer", "minimum": 1, "maximum": 9},
                       "kind": {"enum": ["a", "b"]}},
        "required": ["size", "kind"],
        "additionalProperties": False,
    }}}
    answer = ask(client, tools=[strict], tool_choice=named("save"), temperature=2, n=8, seed=1)
    for choice in answer.choices:
        arguments = json.loads(calls_of(choice)[0].function.arguments)
        assert set(arguments) == {"size", "kind"}
        assert arguments["size"] in range(1, 10) and arguments["kind"] in "ab"


def test_a_call_that_is_cut_says_so_and_leaves_no_scraps(client):
    for max_tokens in (1, 4, 12):
        for choice in ("required", named("get_weather")):
            cut = ask(client, tool_choice=choice, max_tokens=max_tokens).choices[0]
            assert cut.finish_reason == "length" and not cut.message.content
            content, calls, finish = [], [], None
            for chunk in ask(client, tool_choice=choice, max_tokens=max_tokens, stream=True):
                content.append(chunk.choices[0].delta.content or "")
                finish = finish or chunk.choices[0].finish_reason
            assert ("".join(content), finish) == ("", "length")


def test_a_format_leaves_room_for_calls(client):
    answer = ask(client, n=4, temperature=1, seed=3, response_format={"type": "json_object"})
    for choice in answer.choices:
        if choice.finish_reason == "tool_calls":
            for call in choice.message.tool_calls:
                check_call(call)
        else:
            assert isinstance(json.loads(choice.message.content), dict)
    assert calls_of(ask(client, tool_choice="required",
                        response_format={"type": "json_object"}).choices[0])


def test_functions_are_answered_as_functions(client):
    functions = [tool["function"] for tool in TOOLS]
    choice = ask(client, tools=openai.NOT_GIVEN, functions=functions,
                 function_call={"name": "get_weather"}).choices[0]
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    call = choice.message.function_call
    assert call.name == "get_weather" and json.loads(call.arguments)["city"]


def function(**fields):
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize("fields, param", [
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    (function(name=""), "tools[0].function.name"),
    (function(parameters=[]), "tools[0].function.parameters"),
    (function(parameters={"type": "string"}), "tools[0].function.parameters.type"),
    (function(strict="yes"), "tools[0].function.strict"),
    ({"tools": [TIME, TIME]}, "tools[1].function.name"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": named("other")}, "tool_choice.function.name"),
    ({"tools": openai.NOT_GIVEN, "tool_choice": "required"}, "tool_choice"),
    ({**function(parameters={"properties": {"x": {"not": {}}}}), "tool_choice": "required"},
     "tools[0].function.parameters.properties.x.not"),
    (function(strict=True, parameters={"properties": {"x": {"not": {}}}}),
     "tools[0].function.parameters.properties.x.not"),
])
def test_bad_tools_are_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param


def test_a_schema_that_was_not_promised_may_be_anything(client):
    loose = function(parameters={"properties": {"x": {"not": {}}}})
    assert ask(client, **loose, max_tokens=5).choices[0].finish_reason
