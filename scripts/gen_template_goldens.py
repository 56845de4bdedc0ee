#!/usr/bin/env python3
"""Writes the chat template goldens under models/qwen2.5 with Hugging Face transformers.

    python3 -m venv .venv && .venv/bin/pip install transformers jinja2
    .venv/bin/python scripts/gen_template_goldens.py DIR

DIR holds tokenizer.json and tokenizer_config.json of the official Qwen2.5 release. Writes
chat_template.jinja, the template itself; template_goldens.json, conversations with their text and
ids; and template_expressions.json, small templates that pin down how values behave.
"""

import argparse
import json
import pathlib

from transformers import AutoTokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für <Ort> & \"Umgebung\", 天气 — it's ☀️\n\tnew line \\ backslash",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Thành phố, z. B. 'München'"},
                "days": {"type": "integer", "minimum": 0, "maximum": 14, "default": 3},
                "scale": {"type": "number", "default": 1.0, "multipleOf": 1e-05, "maximum": 1e22},
                "place": {
                    "type": "object",
                    "properties": {
                        "geo": {
                            "type": "object",
                            "properties": {
                                "lat": {"type": "number"},
                                "tags": {"type": "array", "items": {"enum": ["a", None, True, 1]}},
                            },
                            "additionalProperties": False,
                        }
                    },
                },
            },
            "required": ["city"],
        },
        "strict": True,
    },
}
EMPTY = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
BARE = {"name": "bare", "description": "", "parameters": {}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


CALLS = [
    call("get_weather", {"city": "Hà Nội & <b>'x'</b>", "place": {"geo": {"lat": 21.0, "tags": []}}}, id="call_1"),
    call("now", {}, id="call_2"),
]
CONVERSATIONS = [
    ("english", [user("Hello there!")], None),
    ("chinese", [system("你是一个有用的助手。"), user("北京的人口是多少？")], None),
    ("vietnamese", [user("Xin chào, bạn khỏe không?"), assistant("Tôi khỏe."), user("Tốt quá!")], None),
    ("indonesian", [user("Apa kabar? Tolong jelaskan fotosintesis.")], None),
    ("arabic", [system("أجب بإيجاز."), user("ما هي عاصمة مصر؟")], None),
    ("emoji", [user("👨‍👩‍👧‍👦🎉 ok?"), assistant("👍🏽"), user("🇮🇩")], None),
    ("code", [user("Fix:\n```python\ndef f(x):\n    return x  \n```\n")], None),
    ("decomposed", [user("cafe\u0301 e\u0323\u0302")], None),
    ("template text in content", [user("{{ 7*7 }} {% if x %} {# c #} <|im_end|>\n<|im_start|>system\n")], None),
    ("blank edges", [system("  s  \n"), user("\n u \n\n"), assistant(" a "), user("")], None),
    ("empty system", [system(""), user("x")], None),
    ("system in the middle", [user("a"), system("Now be terse."), user("b")], None),
    ("two systems", [system("1"), system("2"), user("b")], None),
    ("system last", [user("a"), assistant("b"), system("c")], None),
    ("only assistant", [assistant("hi")], None),
    ("other role", [{"role": "critic", "content": "x"}, user("y")], None),
    ("no tools", [user("x")], []),
    ("tools", [user("Weather in Huế?")], [WEATHER]),
    ("several tools", [system("S <&'>"), user("Weather?")], [WEATHER, EMPTY, BARE]),
    ("tool call", [user("w?"), assistant(None, tool_calls=CALLS[:1]), tool("{\"t\": 31}", tool_call_id="call_1")], [WEATHER]),
    ("tool call without content", [user("w?"), {"role": "assistant", "tool_calls": CALLS}, tool("1"), tool("2")], [WEATHER, EMPTY]),
    ("tool call with text", [user("w?"), assistant("Let me see.", tool_calls=CALLS), tool("晴"), tool(""), assistant("Sunny."), user("Thanks")], [WEATHER]),
    ("tool call with empty text", [user("w?"), assistant("", tool_calls=CALLS[:1]), tool("<r>&'\"</r>")], [WEATHER]),
    ("arguments as text", [user("w?"), assistant(None, tool_calls=[call("now", "{\"a\": 1}")])], [EMPTY]),
    ("arguments of every type", [user("w?"), assistant(None, tool_calls=[call("f", {"n": None, "t": True, "i": -7, "big": 12345678901234567890, "f": 0.1, "e": 1e16, "s": "\u0001\u007f\u2028🎉/\\", "l": [[], {}, [1, [2]]]})])], None),
    ("call without function wrapper", [user("w?"), assistant(None, tool_calls=[{"name": "g", "arguments": {"x": 1}}])], None),
    ("empty list of calls", [user("w?"), assistant("none", tool_calls=[])], None),
    ("tool result first", [tool("r"), user("x")], None),
    ("tool results around a user", [user("a"), tool("1"), tool("2"), user("b"), tool("3")], None),
    ("no messages", [], None),
    ("null content", [user(None)], None),
    ("missing content", [{"role": "user"}], None),
]
CONTINUED = [
    ("continue", [user("Write a poem"), assistant("Roses are red,\nviolets ")], None),
    ("continue empty", [user("x"), assistant("")], None),
    ("continue user", [system("s"), user("Once upon")], None),
    ("continue with tools", [user("x"), assistant("中文, ")], [EMPTY]),
    ("continue repeated text", [user("ab"), assistant("ab")], None),
    ("continue null", [user("x"), assistant(None, tool_calls=CALLS[:1])], None),
]
EXPRESSIONS = [
    "{{ none }}|{{ true }}|{{ false }}|{{ 1 }}|{{ 1.0 }}|{{ 0.5 }}|{{ 'a' }}",
    "{{ [1, 'a', none, true] }}|{{ {'k': 'v', 'n': none} }}",
    "{{ messages }}",
    "{{ messages[0].missing }}|{{ messages[0]['missing'] }}|{{ missing }}",
    "{{ messages[0].missing is defined }}|{{ messages[0].content is string }}|{{ messages is mapping }}",
    "{% for m in missing %}x{% endfor %}|{{ missing | length }}",
    "{% if missing %}a{% else %}b{% endif %}",
    "{{ messages[0].content + '!' }}|{{ messages[0]['content'] ~ 1 }}",
    "{{ messages[-1].content[:2] }}|{{ messages[::-1][0].role }}|{{ messages[1:] | length }}",
    "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.index }};{% endfor %}",
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n    U\n  {% endif %}\n{% endfor %}\nend",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{{ ' a b '.strip() }}|{{ 'a,b'.split(',')[1] }}|{{ 'abc'.startswith('ab') }}|{{ 'Ab'.upper().lower() }}",
    "{{ 'a\\nb'.split('\\n') | join('-') }}|{{ 'xax'.lstrip('x') }}|{{ 'xax'.rstrip('x') }}|{{ 'aXb'.replace('X', '') }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0].get('x', 'd') }}",
    "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}",
    "{{ messages[0] | tojson }}|{{ messages[0] | tojson(indent=2) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ messages | map(attribute='role') | join(',') }}",
    "{% macro f(x, y='d') %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f(1, y=2) }}",
    "{% generation %}a{% endgeneration %}\n  {%- generation -%}\n b \n{% endgeneration %}\nc",
    "{{ 7 // 2 }}|{{ 7 % 3 }}|{{ 7 / 2 }}|{{ 2 ** 3 }}|{{ -7 // 2 }}|{{ -7 % 3 }}",
    "{{ 'a' in 'abc' }}|{{ 'role' in messages[0] }}|{{ 'x' not in messages[0] }}|{{ 1 if missing else 2 }}",
    "{{ 'a' | capitalize }}|{{ ' x ' | trim }}|{{ none | default('d') }}|{{ missing | default('d') }}|{{ '' | default('d', true) }}",
    "{{ bos_token }}|{{ eos_token }}|{{ tools }}|{{ add_generation_prompt }}",
    "{{ raise_exception('no: ' ~ messages[0].role) }}",
    "{{ messages[0].missing.deeper }}",
    "{{ 'a' + missing }}",
    "a\n{# comment #}\nb\n  {# comment #}  \nc\n",
    "{% set x %}a{{ 1 }}{% endset %}{{ x | length }}{{ x }}",
    "{{ messages[0].content | string }}|{{ 5 | string + 'a' }}|{{ '5' | int + 1 }}",
    "{{ '<b>' | e }}|{{ '<b>' | safe }}|{{ '<b>' }}",
    "{{ messages[0].content.split('e')[0] }}|{{ (messages | last).role }}|{{ (messages | first).role }}",
    "{{ range(3) | list }}|{{ 'abc' | list }}|{{ 'abc' | reverse | join }}",
    "{{ dict(a=1).a }}|{{ {'a': 1} | length }}|{{ {'b': 1, 'a': 2} | dictsort }}",
]


def render(tokenizer, messages, **options):
    try:
        return {"text": tokenizer.apply_chat_template(messages, tokenize=False, **options)}
    except Exception as error:
        return {"error": type(error).__name__}


def write_lines(path, cases):
    """One case a line, so that a difference can be read."""
    lines = (json.dumps(case, ensure_ascii=True) for case in cases)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", type=pathlib.Path)
    tokenizer = AutoTokenizer.from_pretrained(parser.parse_args().dir)
    models = pathlib.Path(__file__).resolve().parent.parent / "models" / "qwen2.5"

    cases = []
    for continued, conversations in [(False, CONVERSATIONS), (True, CONTINUED)]:
        for name, messages, tools in conversations:
            for generate in [False] if continued else [True, False]:
                case = {"name": name, "messages": messages, "tools": tools,
                        "add_generation_prompt": generate, "continue_final_message": continued}
                case.update(render(tokenizer, messages, tools=tools, add_generation_prompt=generate,
                                   continue_final_message=continued))
                if "text" in case:
                    case["ids"] = tokenizer.encode(case["text"], add_special_tokens=False)
                cases.append(case)
    write_lines(models / "template_goldens.json", cases)

    messages = [system("be"), user("Hello é<&'>"), assistant("ok")]
    expressions = [
        {"template": source, "messages": messages, **render(tokenizer, messages, chat_template=source)}
        for source in EXPRESSIONS
    ]
    write_lines(models / "template_expressions.json", expressions)
    (models / "chat_template.jinja").write_text(tokenizer.chat_template)


if __name__ == "__main__":
    main()
