"""64 streaming clients against 16 places and a KV cache that cannot hold them all."""

import asyncio
import random
import time

import pytest

from conftest import MODEL, Server

NUM_CLIENTS = 64
NUM_REQUESTS = 16
WORDS = """river stone cloud paper window garden bridge candle forest harbour lantern meadow mirror
mountain needle orchard pencil pocket ribbon saddle shadow silver spider summer table thunder timber
valley velvet village violin whistle winter wonder copper cotton desert engine feather finger""".split()


@pytest.fixture(scope="module")
def small_server():
    with Server("--max-num-seqs", 16, "--kv-cache-memory", "12MiB") as running:
        yield running


def make_request(number, **options):
    """Request `number` of 16: prompts of about 100 tokens; half greedy, half drawn with a seed."""
    rng = random.Random(number)
    words = " ".join(rng.choice(WORDS) for _ in range(60))
    text = f"Story {number}. Write a short story with some of these words: {words}"
    request = {
        "model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 48,
        "stream": True, "stream_options": {"include_usage": True}, "extra_body": {},
    }
    if number % 2:
        request |= {"temperature": 0.8, "top_p": 0.95, "seed": number}
    else:
        request |= {"temperature": 0}
    if number % 4 < 2:
        request["extra_body"] = {"ignore_eos": True}
    return request | options


async def run(client, request):
    """(text, finish reason, completion tokens) of one stream."""
    text, reason, usage = "", None, None
    async for chunk in await client.chat.completions.create(**request):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reason is None, "nothing may follow the finish chunk"
            text += choice.delta.content or ""
            reason = choice.finish_reason
    return text, reason, usage.completion_tokens


async def run_and_leave(client, request, num_chunks):
    """Reads a few chunks of text, then hangs up."""
    stream = await client.chat.completions.create(**request)
    async for chunk in stream:
        num_chunks -= any(choice.delta.content for choice in chunk.choices)
        if num_chunks <= 0:
            break
    await stream.close()


def test_every_stream_is_complete_and_equals_the_request_alone(small_server, server):
    async def crowd():
        async with small_server.async_client() as client:
            requests = [make_request(number % NUM_REQUESTS) for number in range(NUM_CLIENTS)]
            return await asyncio.gather(*(run(client, request) for request in requests))

    async def alone():
        async with server.async_client() as client:
            return [await run(client, make_request(number)) for number in range(NUM_REQUESTS)]

    together = asyncio.run(crowd())
    expected = asyncio.run(alone())
    assert small_server.metrics()["vllm:num_preemptions_total"] > 0, "the cache was not too small"
    for number, got in enumerate(together):
        text, reason, num_tokens = got
        assert got == expected[number % NUM_REQUESTS], f"client {number}"
        assert reason == ("length" if num_tokens == 48 else "stop")
        assert text


def test_blocks_are_free_within_a_second_after_clients_leave(small_server):
    async def crowd():
        async with small_server.async_client() as client:
            jobs = []
            for number in range(NUM_CLIENTS):
                if number % 2:
                    request = make_request(
                        number % NUM_REQUESTS, max_tokens=400, extra_body={"ignore_eos": True})
                    jobs.append(run_and_leave(client, request, num_chunks=2))
                else:
                    jobs.append(run(client, make_request(number % NUM_REQUESTS, max_tokens=8)))
            return await asyncio.gather(*jobs)

    results = [result for result in asyncio.run(crowd()) if result is not None]
    ended = time.monotonic()
    assert len(results) == NUM_CLIENTS // 2
    assert all(reason in ("stop", "length") for _, reason, _ in results)
    watched = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    while True:
        metrics = small_server.metrics()
        assert all(name in metrics for name in watched), sorted(metrics)
        if all(metrics[name] == 0 for name in watched):
            break
        held = {name: metrics[name] for name in watched}
        assert time.monotonic() - ended < 1, held
        time.sleep(0.05)


def test_leaving_together_in_the_middle(small_server):
    """Running streams are cut at the same moment; one request more is served."""
    async def crowd():
        async with small_server.async_client() as client:
            requests = [
                make_request(number, max_tokens=200, extra_body={"ignore_eos": True})
                for number in range(8)]
            tasks = [asyncio.create_task(run(client, request)) for request in requests]
            deadline = time.monotonic() + 30
            while small_server.metrics()["vllm:kv_cache_usage_perc"] == 0:
                assert time.monotonic() < deadline, "no request ever held a block"
                await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(crowd())
    deadline = time.monotonic() + 1
    while small_server.metrics()["vllm:kv_cache_usage_perc"] > 0:
        assert time.monotonic() < deadline, "blocks are still held a second after the clients left"
        time.sleep(0.05)
    answer = small_server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hi."}], max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length")
