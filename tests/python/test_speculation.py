"""Guessing ahead with the real model: the same answers, in fewer steps, and vLLM's metrics."""

import concurrent.futures

import pytest

from conftest import MODEL, Server, model_path

CODE = """def total_price(items, tax_rate):
    subtotal = 0
    for item in items:
        subtotal += item.price * item.quantity
    tax = subtotal * tax_rate
    return subtotal + tax
"""
EDIT = f"Rename the function to `price_with_tax` and change nothing else. Answer with the code only.\n\n{CODE}"
REQUESTS = [
    (EDIT, {"temperature": 0}),
    (EDIT, {"temperature": 0.7, "seed": 7}),
    ("Count from 1 to 30, separated by commas.", {"temperature": 0}),
    ("Name three rivers.", {"temperature": 1.0, "seed": 3, "stop": ["2."]}),
    ("Give me a JSON object with a name.", {"temperature": 0, "response_format": {"type": "json_object"}}),
]


def answers(server):
    """What the requests say, alone and at once."""

    def ask(request):
        prompt, options = request
        completion = server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=96, **options
        )
        choice = completion.choices[0]
        return choice.message.content, choice.finish_reason, completion.usage.completion_tokens

    alone = [ask(request) for request in REQUESTS]
    with concurrent.futures.ThreadPoolExecutor(len(REQUESTS)) as pool:
        return alone + list(pool.map(ask, REQUESTS))


@pytest.fixture(scope="module")
def plain(server):
    return answers(server)


def test_looking_up_changes_no_answer(plain):
    with Server("--speculative", "ngram") as server:
        assert answers(server) == plain
        metrics = server.metrics()
        accepted = metrics["vllm:spec_decode_num_accepted_tokens_total"]
        assert accepted == metrics["vllm:spec_decode_num_accepted_tokens_per_pos_total"]
        assert 20 < accepted <= metrics["vllm:spec_decode_num_draft_tokens_total"]


def test_a_draft_model_changes_no_answer(plain):
    # The model itself: always right, and no faster.
    with Server("--speculative", model_path(), "--num-speculative-tokens", "3") as server:
        assert answers(server) == plain
        assert server.metrics()["vllm:spec_decode_num_accepted_tokens_total"] > 0
