"""The client of `dashscope` 2, in each of the protocols that it speaks."""

MODEL = "qwen-plus"
QUESTION = [{"role": "user", "content": "Name three primary colours, separated by commas."}]
BASES = {"native": "/api/v1", "openai": "/compatible-mode/v1", "anthropic": "/apps/anthropic"}


def check(url, protocol):
    # Only this generation of the package has them.
    from dashscope.v2 import errors
    from dashscope.v2.client import Client

    options = {"model": MODEL, "messages": QUESTION, "max_tokens": 48, "temperature": 0}
    with Client(api_key="none", base_url=url + BASES[protocol], protocol=protocol) as client:
        answer = client.chat.completions.create(**options)
        assert "red" in answer.output_text.lower(), answer
        assert 0 < answer.usage.output_tokens
        chunks = list(client.chat.completions.create(stream=True, **options))
        deltas = [chunk.delta.content or "" for chunk in chunks if chunk.delta]
        assert "".join(deltas) == answer.output_text and 3 < len(deltas)
        try:
            client.chat.completions.create(**{**options, "model": "nobody"})
        except errors.NotFoundError as error:
            assert "nobody" in str(error)
        else:
            raise AssertionError("an unknown model was served")


CASES = {
    f"case_protocol_{protocol}": lambda url, protocol=protocol: check(url, protocol)
    for protocol in BASES
}
NAMES = list(CASES)
