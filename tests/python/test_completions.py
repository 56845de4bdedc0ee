"""/v1/completions, /tokenize and /detokenize."""

import pytest

from conftest import MODEL

PROMPT = "def fibonacci(n):\n    "


def complete(client, prompt=PROMPT, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def test_text_and_token_ids_give_the_same(server, client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    ids = server.tokenize(prompt=PROMPT)
    assert complete(client, ids).choices[0].text == answer.choices[0].text
    assert answer.usage.prompt_tokens == len(ids)


def test_several_prompts(server, client):
    other = "The capital of Italy is"
    singles = [complete(client, prompt).choices[0].text for prompt in (PROMPT, other)]
    both = complete(client, [PROMPT, other])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert [choice.text for choice in both.choices] == singles
    ids = [server.tokenize(prompt=prompt) for prompt in (PROMPT, other)]
    assert [choice.text for choice in complete(client, ids).choices] == singles


def test_stream_equals_the_answer(client):
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    answer = complete(client)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == answer.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_default_is_sixteen_tokens(client):
    answer = client.completions.create(
        model=MODEL, prompt="One, two,", temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_echo_with_logprobs(server, client):
    answer = complete(client, echo=True, logprobs=2, max_tokens=3)
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    num_tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == num_tokens
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == num_tokens
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert "".join(logprobs.tokens) == choice.text
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])


def test_echo_alone_scores_the_prompt(client):
    scored = complete(client, echo=True, logprobs=1, max_tokens=0).choices[0]
    generated = complete(client, echo=True, logprobs=1, max_tokens=1).choices[0]
    assert scored.text == PROMPT
    assert scored.logprobs.token_logprobs == generated.logprobs.token_logprobs[:-1]


def test_forced_and_generated_log_probabilities_agree(server, client):
    """Scoring what was generated gives what was said while generating, to the bit."""
    generated = complete(
        client, logprobs=1, max_tokens=8, extra_body={"return_token_ids": True}).choices[0]
    token_ids = generated.model_extra["token_ids"]
    ids = server.tokenize(prompt=PROMPT) + token_ids
    scored = complete(client, ids, echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert scored.token_logprobs[-len(token_ids):] == generated.logprobs.token_logprobs


def test_penalties_and_stop_tokens(server, client):
    prompt = "one two three one two three one two three one two three"
    first = complete(client, prompt, max_tokens=1, extra_body={"return_token_ids": True})
    (token,) = first.choices[0].model_extra["token_ids"]
    penalised = complete(client, prompt, max_tokens=8, frequency_penalty=2, presence_penalty=2)
    assert penalised.choices[0].text != complete(client, prompt, max_tokens=8).choices[0].text
    stopped = complete(client, prompt, extra_body={"stop_token_ids": [token]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == 1


@pytest.mark.parametrize("text", [
    "Hello, world!",
    "你好，世界。今天天气很好！",
    "Xin chào thế giới, hôm nay trời đẹp.",
    "مرحبا بالعالم",
    "🦀👩‍👩‍👧 naïve café",
    "fn main() {\n\tprintln!(\"{}\", 1_000);\n}\n",
    "   leading and trailing   \n\n",
])
def test_tokenize_and_detokenize_round_trip(server, text):
    assert server.detokenize(server.tokenize(prompt=text)) == text
