"""Goal: a thousand samples at temperature 2, and every one is what was asked for.

Slow, so only `pytest -m slow` runs it. Sixteen choices per request, because they share their steps.
A sample that runs out of tokens is not valid, so the schemas here have an end in sight.
"""

import json
import re

import pytest

from conftest import MODEL

NUM_CHOICES = 16
SEEDS = range(16)

ASK = [{"role": "user", "content": "Invent one. Answer with JSON."}]
HOT = {"temperature": 2, "top_p": 1, "n": NUM_CHOICES, "max_tokens": 250}

RECORD = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": -5, "maximum": 1000},
        "kind": {"enum": ["a", "ab", "b c"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["id", "kind", "ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "save", "strict": True, "parameters": RECORD}}
OTHER = {"type": "function", "function": {"name": "skip", "parameters": {
    "type": "object", "properties": {}, "additionalProperties": False}}}


def check_record(text):
    value = json.loads(text)
    assert set(value) <= set(RECORD["properties"]) and set(RECORD["required"]) <= set(value)
    assert type(value["id"]) is int and -5 <= value["id"] <= 1000
    assert value["kind"] in ["a", "ab", "b c"] and value["ok"] in [True, False, None]
    tags = value.get("tags", [])
    assert len(tags) <= 2 and all(isinstance(tag, str) and len(tag) <= 4 for tag in tags)


def check_calls(message):
    assert not message.content and 1 <= len(message.tool_calls)
    for call in message.tool_calls:
        if call.function.name == "save":
            check_record(call.function.arguments)
        else:
            assert (call.function.name, json.loads(call.function.arguments)) == ("skip", {})


def check_date(message):
    assert re.fullmatch(r"\d{4}-(0[1-9]|1[0-2]) [a-zé]{2,6}!", message.content)


ASKED = {
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "record", "strict": True, "schema": RECORD}}},
        lambda message: check_record(message.content)),
    "regex": ({"extra_body": {"guided_regex": r"\d{4}-(0[1-9]|1[0-2]) [a-zé]{2,6}!"}}, check_date),
    "call": (
        {"tools": [TOOL, OTHER], "tool_choice": "required", "parallel_tool_calls": False},
        check_calls),
    "named": (
        {"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "save"}}},
        check_calls),
}


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED)
def test_a_thousand_hot_samples_are_valid(client, asked):
    fields, check = ASKED[asked]
    num_valid = 0
    for seed in SEEDS:
        answer = client.chat.completions.create(
            model=MODEL, messages=ASK, seed=seed, **HOT, **fields)
        for choice in answer.choices:
            assert choice.finish_reason in ("stop", "tool_calls"), choice
            check(choice.message)
            num_valid += 1
    assert num_valid == NUM_CHOICES * len(SEEDS)
