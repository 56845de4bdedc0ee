"""/v1/embeddings with the official SDK, which asks for base64 by itself."""

import math
import struct

import openai
import pytest

from conftest import MODEL, Server

TEXTS = [
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The central bank raised interest rates by half a point.",
]


def embed(client, texts, **options):
    answer = client.embeddings.create(model=MODEL, input=texts, **options)
    return [entry.embedding for entry in answer.data]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b))


def test_base64_and_floats_are_the_same_numbers(client):
    as_base64 = embed(client, TEXTS)
    as_floats = embed(client, TEXTS, encoding_format="float")
    assert len(as_base64) == len(TEXTS) and len(as_base64[0]) == 896
    for one, other in zip(as_base64, as_floats):
        as_bytes = [struct.pack("<896f", *vector) for vector in (one, other)]
        assert as_bytes[0] == as_bytes[1]
        assert math.isclose(cosine(one, one), 1, abs_tol=1e-5)


def test_alone_and_in_company_are_the_same_numbers(server, client):
    alone = [embed(client, text)[0] for text in TEXTS]
    assert embed(client, TEXTS) == alone
    ids = [server.tokenize(prompt=text) for text in TEXTS]
    assert embed(client, ids) == alone
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert answer.usage.prompt_tokens == sum(len(one) for one in ids)


def test_what_means_the_same_is_closer(client):
    cat, kitten, bank = embed(client, TEXTS)
    assert cosine(cat, bank) < cosine(cat, kitten)
    assert cosine(kitten, bank) < cosine(cat, kitten)


def test_a_long_text_beside_generation(client):
    text = "Rust is a systems programming language. " * 200
    stream = client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=64, temperature=0, stream=True,
        extra_body={"ignore_eos": True})
    pieces = [next(stream).choices[0].text]
    during = embed(client, [text, "short"])
    pieces += [chunk.choices[0].text for chunk in stream]
    assert during == embed(client, [text, "short"])
    answer = client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=64, temperature=0,
        extra_body={"ignore_eos": True})
    assert "".join(pieces) == answer.choices[0].text


def test_other_sizes_are_refused(client):
    with pytest.raises(openai.BadRequestError) as refused:
        embed(client, "a", dimensions=256)
    assert refused.value.param == "dimensions"


def test_the_pooling_is_told_and_can_be_chosen(server, client):
    answer = client.embeddings.with_raw_response.create(model=MODEL, input="a b c")
    assert answer.headers["x-embedding-pooling"] == "mean"
    with Server("--embedding-pooling", "last") as last:
        assert last.json("GET", "/v1/models")["data"][0]["embedding_pooling"] == "last"
        vectors = embed(last.client(), TEXTS)
        assert vectors[0] != embed(client, TEXTS[0])[0]
        assert embed(last.client(), TEXTS) == vectors, "from the cache too"
