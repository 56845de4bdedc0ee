"""LangChain and LiteLLM as their users call them."""

import os

# Without this LiteLLM asks the internet for a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import langchain_openai
import litellm
import pydantic
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool

from conftest import MODEL

COLOURS = "Name three primary colours, separated by commas."
WEATHER = "What is the weather in Paris?"
PERSON = "Ada is 36 years old. Answer as JSON with the keys name and age."
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the current weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]}}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def chain(server):
    return langchain_openai.ChatOpenAI(
        model=MODEL, base_url=server.v1, api_key="none", temperature=0, max_tokens=64,
        max_retries=0)


@pytest.fixture(scope="module")
def complete(server):
    def ask(content, **options):
        return litellm.completion(
            model=f"openai/{MODEL}", api_base=server.v1, api_key="none", temperature=0,
            max_tokens=64, num_retries=0, messages=[{"role": "user", "content": content}],
            **options)
    return ask


def test_langchain_stream_equals_invoke(chain):
    whole = chain.invoke(COLOURS)
    assert "red" in whole.content.lower()
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chain.stream(COLOURS)) == whole.content


def test_langchain_calls_a_tool_and_reads_its_result(chain):
    forced = chain.bind_tools([get_weather], tool_choice="get_weather")
    answer = forced.invoke(WEATHER)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    streamed = None
    for chunk in forced.stream(WEATHER):
        streamed = chunk if streamed is None else streamed + chunk
    assert [call["args"] for call in streamed.tool_calls] == [{"city": "Paris"}]
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    bound = chain.bind_tools([get_weather], tool_choice="none")
    assert bound.invoke([HumanMessage(WEATHER), answer, result]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(chain, method):
    structured = chain.with_structured_output(Person, method=method)
    assert structured.invoke(PERSON) == Person(name="Ada", age=36)


def test_litellm_stream_equals_completion(complete):
    whole = complete(COLOURS)
    assert "red" in whole.choices[0].message.content.lower()
    chunks = list(complete(COLOURS, stream=True, stream_options={"include_usage": True}))
    folded = litellm.stream_chunk_builder(chunks)
    assert folded.choices[0].message.content == whole.choices[0].message.content
    assert folded.usage.completion_tokens == whole.usage.completion_tokens


def test_litellm_calls_a_tool(complete):
    options = {"tools": TOOLS, "tool_choice": NAMED}
    whole = complete(WEATHER, **options)
    folded = litellm.stream_chunk_builder(list(complete(WEATHER, stream=True, **options)))
    for answer in (whole, folded):
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert "Paris" in call.function.arguments


def test_litellm_parses_and_knows_errors(complete):
    answer = complete(PERSON, response_format=Person)
    assert Person.model_validate_json(answer.choices[0].message.content).age == 36
    with pytest.raises(litellm.ContextWindowExceededError):
        complete("x " * 40_000)
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        complete("x", top_p=7)
