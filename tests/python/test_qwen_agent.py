"""Qwen-Agent with nothing but the base URL changed: native and OpenAI mode, with tools."""

import json

import pytest
from qwen_agent.agents import FnCallAgent
from qwen_agent.llm import get_chat_model
from qwen_agent.llm.base import ModelServiceError
from qwen_agent.settings import MAX_LLM_CALL_PER_RUN
from qwen_agent.tools.base import BaseTool, register_tool

COLOURS = [{"role": "user", "content": "Name three primary colours, separated by commas."}]
GREEDY = {"temperature": 0, "max_tokens": 48}


@register_tool("get_weather")
class Weather(BaseTool):
    description = "Get the current weather of a city."
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}},
        "required": ["city"],
    }
    asked = []

    def call(self, params, **kwargs):
        city = self._verify_json_format_args(params)["city"]
        Weather.asked.append(city)
        return f"17 degrees and rain in {city}."


def native(server, **options):
    return {"model": "qwen-max", "model_type": "qwen_dashscope", "api_key": "none",
            "base_http_api_url": server.url + "/api/v1", "generate_cfg": {**GREEDY, **options}}


def openai_mode(server, **options):
    return {"model": "qwen-max", "model_server": server.url + "/compatible-mode/v1",
            "api_key": "none", "generate_cfg": {**GREEDY, **options}}


@pytest.fixture(params=[native, openai_mode])
def configure(request, server):
    return lambda **options: request.param(server, **options)


def last(steps):
    result = None
    for result in steps:
        pass
    return result


@pytest.mark.parametrize("raw", [False, True])
def test_a_chat_streams(configure, raw):
    llm = get_chat_model(configure(use_raw_api=raw))
    steps = list(llm.chat(COLOURS, stream=True))
    texts = [step[-1]["content"] for step in steps if step]
    assert "red" in texts[-1].lower() and 3 < len(set(texts))
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))


def test_a_chat_answers_whole_and_in_deltas(configure):
    llm = get_chat_model(configure(use_raw_api=False))
    whole = llm.chat(COLOURS, stream=False)[-1]["content"]
    pieces = llm.chat(COLOURS, stream=True, delta_stream=True)
    assert "".join(piece[-1]["content"] for piece in pieces) == whole


def test_calls_in_the_text_pass_through(configure):
    """Without `raw`, tools are described in the prompt and calls are read from the text."""
    functions = [{"name": "get_weather", "description": Weather.description,
                  "parameters": Weather.parameters}]
    # A model of this size leaves the tags out, so it is held to them.
    form = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "[A-Z][a-z]+"\}\}\n</tool_call>'
    options = configure(use_raw_api=False)
    is_native = "base_http_api_url" in options
    options["generate_cfg"] |= (
        {"guided_regex": form} if is_native else {"extra_body": {"guided_regex": form}})
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = last(get_chat_model(options).chat(messages, functions=functions, stream=True))[-1]
    assert answer["function_call"]["name"] == "get_weather", answer
    assert json.loads(answer["function_call"]["arguments"])["city"] == "Paris"


def test_an_agent_of_twenty_steps(server, configure):
    """The agent calls a tool, reads its result and goes on, as often as an agent may at a time."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    options = {"use_raw_api": True, "tool_choice": named, "parallel_tool_calls": False}
    agent = FnCallAgent(function_list=["get_weather"], llm=configure(**options))
    Weather.asked.clear()
    mark = server.mark_log()
    question = {"role": "user", "content": "What is the weather in Paris, London and Rome?"}
    steps = last(agent.run([question]))
    assert [step["role"] for step in steps] == ["assistant", "function"] * MAX_LLM_CALL_PER_RUN
    assert len(Weather.asked) == MAX_LLM_CALL_PER_RUN == 20
    # One request for each step: nothing was tried again.
    assert server.outcomes_since(mark) == ["finished"] * MAX_LLM_CALL_PER_RUN


def test_errors_are_told_and_not_tried_again(server):
    mark = server.mark_log()
    llm = get_chat_model(native(server, max_retries=5, max_input_tokens=100_000, use_raw_api=False))
    with pytest.raises(ModelServiceError, match="maximum context length"):
        last(llm.chat([{"role": "user", "content": "x " * 40_000}], stream=True))
    assert server.outcomes_since(mark) == []
