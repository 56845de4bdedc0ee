"""Structured output as the official SDK asks for it, with the real model, also at temperature 2."""

import enum
import json
import re

import openai
import pydantic
import pytest

from conftest import MODEL

ASK = [{"role": "user", "content": "Describe a famous scientist."}]
HOT = {"temperature": 2, "top_p": 1, "n": 16, "seed": 11}


class Field(enum.Enum):
    PHYSICS = "physics"
    MATHS = "maths"
    OTHER = "other"


class Paper(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    year: int = pydantic.Field(ge=1500, le=2030)
    doi: str = pydantic.Field(pattern=r"^10\.\d{4}/[a-z]{3,6}$")


class Scientist(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(min_length=1, max_length=24)
    field: Field
    is_alive: bool
    papers: list[Paper] = pydantic.Field(min_length=1, max_length=2)
    rival: str | None = pydantic.Field(max_length=10)


def ask(client, messages=ASK, **options):
    options = {"max_tokens": 400, "temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def contents(answer):
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    return [choice.message.content for choice in answer.choices]


def test_parse_gives_the_pydantic_model(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Scientist, max_tokens=400, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, Scientist)
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_says_the_same_as_a_whole_answer(client):
    wanted = {"response_format": schema_format(Scientist.model_json_schema())}
    whole = contents(ask(client, **wanted))[0]
    stream = ask(client, stream=True, **wanted)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole
    # With log-probabilities every token is drawn, without them the forced ones are not.
    scored = ask(client, logprobs=True, **wanted)
    assert contents(scored)[0] == whole
    tokens = [entry.token for entry in scored.choices[0].logprobs.content]
    assert "".join(tokens).startswith(whole)


@pytest.mark.parametrize("seed", range(4))
def test_hot_samples_are_valid(client, seed):
    options = HOT | {"seed": seed, "presence_penalty": 1}
    answer = ask(client, response_format=schema_format(Scientist.model_json_schema()), **options)
    for content in contents(answer):
        Scientist.model_validate_json(content)


def test_guided_fields_hold_at_any_temperature(client):
    for extra, pattern in [
        ({"guided_choice": ["red", "reddish", "dark blue"]}, r"red|reddish|dark blue"),
        ({"guided_regex": r"\d{4}-(0[1-9]|1[0-2])"}, r"\d{4}-(0[1-9]|1[0-2])"),
        ({"structured_outputs": {"regex": "[a-f]{8}"}}, "[a-f]{8}"),
        ({"guided_grammar": 'root ::= ("ab" | "cd" [0-9]){2,3}'}, "(ab|cd[0-9]){2,3}"),
        ({"guided_grammar": 'start: "(" inner ")"\ninner: "x" | "y" "z"'}, r"\((x|yz)\)"),
        ({"guided_json": {"enum": ["é", 1, None]}}, '"é"|1|null'),
    ]:
        for content in contents(ask(client, extra_body=extra, **HOT)):
            assert re.fullmatch(pattern, content), (extra, content)


def test_json_object_needs_no_word_about_it(client):
    answer = ask(client, response_format={"type": "json_object"})
    assert isinstance(json.loads(contents(answer)[0]), dict)


def test_an_empty_schema_is_any_value_and_ends(client):
    answer = ask(client, extra_body={"guided_json": {}}, n=4, temperature=1, seed=1)
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            json.loads(choice.message.content)
    assert "stop" in {choice.finish_reason for choice in answer.choices}


def test_running_out_of_tokens_is_said(client):
    answer = ask(client, response_format=schema_format(Scientist.model_json_schema()), max_tokens=9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9


def test_completions_are_constrained_too(client):
    answer = client.completions.create(
        model=MODEL, prompt="The colour of the sky is", max_tokens=20, temperature=2, n=8, seed=1,
        extra_body={"guided_choice": [" blue", " grey"]})
    assert {choice.text for choice in answer.choices} <= {" blue", " grey"}


@pytest.mark.parametrize("fields, param", [
    ({"response_format": schema_format({"type": "strin"})}, "response_format.json_schema.schema"),
    ({"response_format": schema_format({"items": {"uniqueItems": True}})},
     "response_format.json_schema.schema.items.uniqueItems"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
     "response_format.json_schema.name"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"extra_body": {"guided_json": {"minimum": 2, "maximum": 1, "type": "integer"}}}, "guided_json"),
    ({"extra_body": {"guided_regex": "(?=x)"}}, "guided_regex"),
    ({"extra_body": {"guided_choice": []}}, "guided_choice"),
    ({"extra_body": {"guided_grammar": "start: nothing"}}, "guided_grammar"),
    ({"extra_body": {"guided_regex": "a", "guided_choice": ["a"]}}, "guided_choice"),
    ({"extra_body": {"structured_outputs": {"structural_tag": "{}"}}},
     "structured_outputs.structural_tag"),
])
def test_bad_constraints_are_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param
