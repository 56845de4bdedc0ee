"""Frameworks that speak to DashScope, with nothing but the base URL changed."""

import os

# Without this LiteLLM asks the internet for a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dashscope
import litellm
import pydantic
import pytest
from langchain_community.chat_models import ChatTongyi
from langchain_community.embeddings import DashScopeEmbeddings
from langchain_community.llms import Tongyi
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_qwq import ChatQwen, ChatQwQ

from conftest import MODEL

COLOURS = "Name three primary colours, separated by commas."
WEATHER = "What is the weather in Paris?"
NAMED = {"type": "function", "function": {"name": "get_weather"}}
GREEDY = {"temperature": 0, "max_tokens": 48}


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"17 degrees and rain in {city}."


class Person(pydantic.BaseModel):
    """A person."""

    name: str = pydantic.Field(max_length=20)
    age: int


@pytest.fixture(autouse=True)
def base_url(server, monkeypatch):
    monkeypatch.setenv("DASHSCOPE_API_KEY", "none")
    monkeypatch.setenv("DASHSCOPE_API_BASE", server.url + "/compatible-mode/v1")
    monkeypatch.setattr(dashscope, "base_http_api_url", server.url + "/api/v1")
    monkeypatch.setattr(dashscope, "api_key", "none")


def joined(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def test_tongyi_completes():
    llm = Tongyi(model="qwen-turbo", model_kwargs=GREEDY)
    whole = llm.invoke(COLOURS)
    assert "red" in whole.lower()
    pieces = list(llm.stream(COLOURS))
    assert "".join(pieces) == whole and 3 < len(pieces)


@pytest.fixture
def tongyi():
    return ChatTongyi(model="qwen-plus", streaming=True, model_kwargs=GREEDY)


def test_chat_tongyi_streams(tongyi):
    whole = ChatTongyi(model="qwen-plus", model_kwargs=GREEDY).invoke(COLOURS)
    assert "red" in whole.content.lower()
    assert whole.response_metadata["finish_reason"] == "stop"
    chunks = list(tongyi.stream(COLOURS))
    assert joined(chunks).content == whole.content and 3 < len(chunks)


def test_chat_tongyi_calls_a_tool(tongyi):
    forced = tongyi.bind_tools([get_weather], tool_choice=NAMED)
    for answer in (forced.invoke(WEATHER), joined(forced.stream(WEATHER))):
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    messages = [
        HumanMessage(WEATHER), AIMessage(content="", tool_calls=[call]),
        ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"], name="get_weather")]
    final = tongyi.bind_tools([get_weather], tool_choice="none").invoke(messages)
    assert "17" in final.content


def test_chat_tongyi_tells_a_refusal_at_once(server, tongyi):
    mark = server.mark_log()
    with pytest.raises(ValueError, match="parameters.temperature"):
        tongyi.invoke(COLOURS, temperature=9)
    assert server.outcomes_since(mark) == []


def test_embeddings():
    vectors = DashScopeEmbeddings(model=MODEL).embed_documents(["a cat", "a dog"])
    assert [len(vector) for vector in vectors] == [896, 896]


@pytest.fixture(params=[ChatQwen, ChatQwQ])
def qwen(request):
    return request.param(model="qwen-plus", **GREEDY)


def test_langchain_qwq_chats(qwen):
    chunks = list(qwen.stream(COLOURS))
    assert "red" in joined(chunks).content.lower() and 3 < len(chunks)
    assert joined(chunks).usage_metadata["output_tokens"]
    assert "red" in qwen.invoke(COLOURS).content.lower()


def test_langchain_qwq_calls_a_tool():
    forced = ChatQwen(model="qwen-plus", **GREEDY).bind_tools([get_weather], tool_choice=NAMED)
    for answer in (forced.invoke(WEATHER), joined(forced.stream(WEATHER))):
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})


def test_langchain_qwq_keeps_a_schema_and_takes_thinking_options():
    model = ChatQwen(model="qwen-plus", enable_thinking=False, thinking_budget=16, **GREEDY)
    structured = model.with_structured_output(Person, method="json_mode")
    person = structured.invoke("Ada is 36 years old. Answer as JSON with the keys name and age.")
    assert (person.name, person.age) == ("Ada", 36)


def test_litellm_completes_streams_and_calls():
    ask = {"model": "dashscope/qwen-plus", **GREEDY}
    messages = [{"role": "user", "content": COLOURS}]
    whole = litellm.completion(messages=messages, **ask)
    assert "red" in whole.choices[0].message.content.lower()
    chunks = list(litellm.completion(messages=messages, stream=True, **ask))
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == \
        whole.choices[0].message.content
    tools = [{"type": "function", "function": {
        "name": "get_weather", "parameters": get_weather.args_schema.model_json_schema()}}]
    answer = litellm.completion(
        messages=[{"role": "user", "content": WEATHER}], tools=tools, tool_choice=NAMED, **ask)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and "Paris" in call.function.arguments


def test_litellm_knows_errors():
    ask = {"messages": [{"role": "user", "content": "x"}], "max_retries": 0}
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(model="dashscope/qwen-plus", top_p=7, **ask)
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(model="dashscope/nobody", **ask)
