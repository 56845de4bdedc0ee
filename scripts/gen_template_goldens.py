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
    "{{ missing | list }}|{{ missing | join(',') }}|{{ missing | length }}|{{ missing | count }}",
    "{{ missing | trim }}|{{ missing | upper }}|{{ missing | string }}|{{ missing | first }}|{{ missing | last }}",
    "{{ missing ~ 'a' }}|{{ missing == none }}|{{ not missing }}|{{ 'x' in missing }}|{{ missing == missing2 }}",
    "{{ none ~ 'a' }}|{{ none | string }}|{{ none | trim }}",
    "{{ none | length }}",
    "{{ missing | tojson }}",
    "{{ none is none }}|{{ none is defined }}|{{ messages is sequence }}|{{ messages is iterable }}|{{ 'a' is iterable }}|{{ 1 is number }}|{{ true is boolean }}|{{ true is true }}|{{ false is false }}|{{ 'a' is sequence }}",
    "{{ messages[0] is mapping }}|{{ messages[0] is iterable }}|{{ messages[0] is string }}|{{ 1 is integer }}|{{ 1.0 is float }}|{{ true is number }}|{{ true is integer }}",
    "{{ 'äbc'[0] }}|{{ 'äbc'[-2:] }}|{{ 'äbc'[::-1] }}|{{ 'äbc' | length }}|{{ 'a,b,,c'.split(',') }}|{{ ' a  b '.split() }}",
    "{{ 'x<think>\\na\\n</think>\\n\\nb'.split('</think>')[-1].lstrip('\\n') }}|{{ 'x<think>\\na\\n</think>b'.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}",
    "{{ 'abc'.find('c') }}|{{ 'abc'.find('x') }}|{{ 'a b'.title() }}|{{ 'abc'.endswith(('x', 'c')) }}|{{ 'aba'.count('a') }}|{{ 'a\\nb\\n'.splitlines() }}|{{ 'a-b-c'.rsplit('-', 1) }}|{{ 'a-b-c'.split('-', 1) }}",
    "{{ 'abc'.removeprefix('a') }}|{{ 'abc'.removesuffix('c') }}|{{ 'a-b'.partition('-') }}|{{ 'ab'.partition('-') }}",
    "{{ '%s-%d' | format('a', 1) }}|{{ '{}-{}'.format('a', 1) }}",
    "{{ 1e22 }}|{{ 0.00001 }}|{{ 1e16 }}|{{ 123456789.125 }}|{{ messages[0] is sequence }}",
    "{{ 0.1 + 0.2 }}|{{ 10 / 4 }}|{{ 4 / 2 }}|{{ 2.5 // 1 }}|{{ 1 + true }}|{{ 3 * 'ab' }}",
    "{{ 'a' 'b' }}|{{ \"\\u00e9\\n\\t\\\\\" }}|{{ 'it\\'s' }}",
    "{{ ['it\\'s', 'a\"b', '\\n', 'é', '\\u0001'] }}",
    "  {%+ if true %}\na\n  {%- endif +%}\nb",
    "{% if true -%}\n  a\n{%- endif %}\n\n\nb  {{- ' c ' -}}  d",
    "\n\na\n  {{ 'b' }}\n\t{% set z = 1 %}\n{{ z }}\n\n",
    "{% for m in messages if m.role != 'user' %}{{ loop.length }}{{ m.role }}{% else %}none{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}-{{ loop.nextitem.role if not loop.last }};{% endfor %}",
    "{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{% endfor %}{{ x }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}|{% set ns = namespace() %}{% set ns.l = [] %}{% set ns.l = ns.l + ['x'] %}{{ ns.l }}",
    "{% set l = [] %}{% set _ = l.append(1) %}{{ l }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages | map(attribute='content') | list }}|{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | list }}",
    "{{ [3, 1, 2] | sort }}|{{ [1, 2, 2] | unique | list }}|{{ [1, 2] | sum }}|{{ [3, 1] | max }}|{{ [1, 2, 3] | batch(2) | list }}",
    "{{ {'a': {'b': [1, 2.5, none, true, 'x']}} | tojson }}|{{ [1] | tojson }}|{{ 'é<\\u2028' | tojson }}|{{ 1e22 | tojson }}",
    "{{ {'b': 1, 'a': []} | tojson(indent=4) }}|{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}|{{ [1, 2] | tojson(separators=(',', ':')) }}|{{ 'é' | tojson(ensure_ascii=true) }}",
    "{{ messages[0].content is defined and messages[0].content is not none }}|{{ (messages[0].x or 'y') }}|{{ '' or none }}|{{ 1 and 0 }}",
    "{{ 1 < 2 < 3 }}|{{ 'a' < 'b' }}|{{ 1 == 1.0 }}|{{ 1 == true }}|{{ '1' == 1 }}|{{ [1] == [1] }}|{{ none == false }}",
    "{{ messages[5] }}|{{ messages[5] is defined }}|{{ messages[-1].role }}|{{ messages['x'] }}",
    "{{ 'a' | replace('a', 'b') }}|{{ 'a b' | title }}|{{ 'abc' | truncate(2) }}|{{ ['a'] | first }}|{{ [] | first }}",
    "{{ 'a\\nb' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}|{{ 3.7 | int }}|{{ 3.14159 | round(2) }}|{{ -3 | abs }}",
    "{% call(x) f() %}{% endcall %}",
    "{% filter upper %}abc{% endfilter %}|{% raw %}{{ x }}{% endraw %}",
    "{{ messages[0].items() | list }}|{{ messages[0].keys() | list }}|{{ messages[0].values() | list }}|{{ messages[0] | list }}",
    "{% for k in messages[0] %}{{ k }},{% endfor %}|{{ 'x' if messages[0].role == 'system' }}|{{ 'x' if false }}",
    "{{ dict(a=1).a }}|{{ {'a': 1} | length }}|{{ {'b': 1, 'a': 2} | dictsort }}",
]


def split_expressions(sources):
    """`{{ a }}|{{ b }}` is two templates, so that one difference does not hide another."""
    for source in sources:
        parts = source.replace("}}|{{", "}}\0{{").split("\0")
        yield from parts if all(part.count("{{") == 1 and "{%" not in part for part in parts) else [source]


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
        for source in split_expressions(EXPRESSIONS)
    ]
    write_lines(models / "template_expressions.json", expressions)
    (models / "chat_template.jinja").write_text(tokenizer.chat_template)


if __name__ == "__main__":
    main()
