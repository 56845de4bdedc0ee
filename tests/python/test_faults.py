"""What goes wrong around a server: it is killed, told to stop, or meets clients that misbehave.

The model is a tiny one, because only the machinery around it is looked at. After each fault the
server must be ready, hold no cache block, and have counted what was asked of it.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import random
import resource
import socket
import struct
import time

import pytest

import wire
from conftest import MODEL, Server, TINY_MODEL, free_port, usage_of

CHAT = "/v1/chat/completions"
SEED = 20_261


@pytest.fixture(autouse=True)
def many_files():
    """Both sides of thousands of connections need a descriptor each; servers inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "usage.db"


def start(ledger, *flags, port=None):
    return Server("--usage-ledger", ledger, *flags, model=TINY_MODEL, port=port)


def answers(server):
    """Whether a request is answered as it should be; takes part in the count."""
    reply = asyncio.run(wire.exchange(server.port, wire.post(CHAT, wire.stream(max_tokens=3))))
    wire.assert_finished(reply, 3)


def assert_counted(server, ledger, requests, errors=0):
    """The server is whole, and after its end the ledger has exactly these counts."""
    server.wait_until_idle()
    assert server.request("GET", "/health/ready").status == 200
    assert server.stop() == 0, server.log_tail()
    usage = usage_of(ledger)
    assert (usage["requests"], usage["errors"]) == (requests, errors), usage


@contextlib.asynccontextmanager
async def open_stream(port, body, **socket_options):
    """A stream of which so much is read that it is known to run."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **socket_options)
    writer.write(wire.post(CHAT, body))
    await writer.drain()
    await asyncio.wait_for(reader.readuntil(b"data: "), wire.TIMEOUT_S)
    try:
        yield reader, writer
    finally:
        writer.close()


# Kill -9 -------------------------------------------------------------------------------------------

async def in_prefill(server):
    """Long prompts that nobody has computed yet."""
    prompts = ["".join(random.choices("abcdefgh", k=400)) for _ in range(24)]
    requests = [wire.post(CHAT, wire.stream(prompt, max_tokens=9)) for prompt in prompts]
    tasks = [asyncio.create_task(wire.exchange(server.port, request)) for request in requests]
    await asyncio.sleep(0.03)
    server.kill()
    await asyncio.gather(*tasks)


async def in_decode(server):
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(open_stream(server.port, wire.stream()))
        server.kill()


async def while_draining(server):
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(open_stream(server.port, wire.stream(n=8)))
        server.terminate()
        await asyncio.sleep(0.02)
        assert server.process.poll() is None, "it was to be killed while it finishes"
        server.kill()


@pytest.mark.parametrize("phase", [in_prefill, in_decode, while_draining])
def test_after_kill_9_the_same_port_serves_again(ledger, phase):
    port = free_port()
    for _ in range(3):
        with start(ledger, port=port) as server:
            answers(server)
            time.sleep(1)
            asyncio.run(phase(server))
    with start(ledger, port=port) as server:
        answers(server)
    # What was answered a second before is there; the killed requests may be or not.
    assert usage_of(ledger)["requests"] >= 4


def test_kill_9_while_loading_leaves_nothing_behind(ledger):
    port = free_port()
    for step in range(12):
        server = start(ledger, port=port)
        time.sleep(step * 0.01)
        server.kill()
    with start(ledger, port=port) as server:
        answers(server)
        assert_counted(server, ledger, 1)


# SIGTERM -------------------------------------------------------------------------------------------

def test_sigterm_under_load_finishes_what_was_accepted(ledger):
    async def load(server):
        requests = [wire.post(CHAT, wire.stream(f"{number}", n=2)) for number in range(80)]
        tasks = [asyncio.create_task(wire.exchange(server.port, request)) for request in requests]
        await asyncio.sleep(0.2)
        server.terminate()
        late = []
        for _ in range(20):
            late.append(asyncio.create_task(
                wire.exchange(server.port, wire.post(CHAT, wire.stream(max_tokens=2)))))
            await asyncio.sleep(0.01)
        return await asyncio.gather(*tasks), await asyncio.gather(*late)

    with start(ledger, "--max-num-seqs", 8, "--shutdown-timeout", 60) as server:
        began_at = time.monotonic()
        replies, late = asyncio.run(load(server))
        assert server.wait() == 0, server.log_tail()
        assert time.monotonic() - began_at < 90
    finished = sum(reply is not None and reply.status == 200 for reply in replies)
    assert finished > 0
    for reply in replies:
        if reply.status == 200:
            wire.assert_finished(reply, 2 * 400)
        else:
            wire.assert_sent_away(reply, 503)
    refused = [reply for reply in late if reply is not None and reply.status != 200]
    for reply in refused:
        wire.assert_sent_away(reply, 503)
    known = [reply for reply in [*replies, *late] if reply is not None]
    usage = usage_of(ledger)
    assert usage["requests"] == len(known)
    assert usage["errors"] == sum(reply.status != 200 for reply in known)


def test_what_takes_longer_than_the_drain_ends_with_an_error(ledger):
    async def load(server):
        requests = [wire.post(CHAT, wire.stream(n=16)) for _ in range(100)]
        tasks = [asyncio.create_task(wire.exchange(server.port, request)) for request in requests]
        await asyncio.sleep(0.5)
        server.terminate()
        return await asyncio.gather(*tasks)

    with start(ledger, "--max-num-seqs", 16, "--max-queue", 8000, "--shutdown-timeout", 0) as server:
        replies = asyncio.run(load(server))
        assert server.wait() == 0, server.log_tail()
    broken = 0
    for reply in replies:
        if reply.status != 200:
            wire.assert_sent_away(reply, 503)
            broken += 1
            continue
        chunks, is_whole = wire.events(reply)
        if not is_whole:
            assert chunks[-1]["error"]["code"] == "shutting_down", chunks[-1]
            broken += 1
    assert broken > 0, "all of it was finished in no time"


def test_a_second_sigterm_stops_at_once():
    async def load(server):
        async with open_stream(server.port, wire.stream(n=16)):
            requests = [wire.post(CHAT, wire.stream(n=16)) for _ in range(100)]
            tasks = [asyncio.create_task(wire.exchange(server.port, one)) for one in requests]
            await asyncio.sleep(0.2)
            server.terminate()
            await asyncio.sleep(0.2)
            assert server.process.poll() is None, "nothing was left to be finished"
            server.terminate()
            began_at = time.monotonic()
            await asyncio.to_thread(server.wait)
            took_s = time.monotonic() - began_at
            await asyncio.gather(*tasks)
            return took_s

    flags = ("--max-num-seqs", 16, "--max-queue", 8000, "--shutdown-timeout", 60)
    server = Server(*flags, model=TINY_MODEL)
    server.wait_until_ready()
    assert asyncio.run(load(server)) < 2


# Clients -------------------------------------------------------------------------------------------

def test_connections_that_are_reset_midway(ledger):
    """SO_LINGER with zero seconds: the server's next write meets a reset, not an end."""
    async def load(server, rng):
        async def one():
            async with open_stream(server.port, wire.stream(n=rng.randint(1, 4))) as (reader, writer):
                for _ in range(rng.randint(0, 5)):
                    await reader.readuntil(b"data: ")
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(20)))

    with start(ledger, "--max-num-seqs", 16) as server:
        asyncio.run(load(server, random.Random(SEED)))
        answers(server)
        assert_counted(server, ledger, 201)


def test_half_a_request_holds_up_nobody(ledger):
    whole = wire.post(CHAT, wire.stream(max_tokens=2))
    body_at = whole.index(b"\r\n\r\n") + 4

    with start(ledger) as server:
        halves = []
        for number in range(200):
            raw = socket.create_connection(("127.0.0.1", server.port))
            # Half a head, or a head and half a body.
            end = body_at // 2 if number % 2 else body_at + 20
            raw.sendall(whole[:end])
            halves.append(raw)
        for _ in range(20):
            answers(server)
        for raw in halves:
            raw.close()
        # A head is what makes a request; one that never gets its body is refused.
        assert_counted(server, ledger, 20 + 100, errors=100)


def test_idle_connections_take_no_place(ledger):
    with start(ledger) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2000)]
        for _ in range(20):
            answers(server)
        assert server.request("GET", "/health/ready").status == 200
        for raw in idle:
            raw.close()
        assert_counted(server, ledger, 20)


def test_a_thousand_queued_streams(ledger):
    async def load(server):
        requests = [wire.post(CHAT, wire.stream(str(number), max_tokens=150))
                    for number in range(1000)]
        return await asyncio.gather(*(wire.exchange(server.port, one) for one in requests))

    with start(ledger, "--max-num-seqs", 8, "--max-queue", 300) as server:
        replies = asyncio.run(load(server))
        refused = [reply for reply in replies if reply.status != 200]
        for reply in refused:
            wire.assert_sent_away(reply, 429)
        for reply in replies:
            if reply.status == 200:
                wire.assert_finished(reply, 150)
        assert 0 < len(refused) < 1000 - 300
        answers(server)
        assert_counted(server, ledger, 1001, errors=len(refused))


def test_a_client_that_never_reads(ledger):
    """Its answer is larger than all buffers between; blocks are free nevertheless."""
    async def load(server):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                raw = socket.socket()
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                raw.connect(("127.0.0.1", server.port))
                raw.setblocking(False)
                reader, writer = await asyncio.open_connection(sock=raw, limit=256)
                stack.callback(writer.close)
                body = wire.stream(n=16, logprobs=True, top_logprobs=20)
                writer.write(wire.post(CHAT, body))
                await writer.drain()
                reader._transport.pause_reading()
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.wait_until_idle)
            reply = await wire.exchange(server.port, wire.post(CHAT, wire.stream(max_tokens=3)))
            wire.assert_finished(reply, 3)

    with start(ledger) as server:
        asyncio.run(load(server))
        assert_counted(server, ledger, 5)


# Memory ---------------------------------------------------------------------------------------------


def address_space(server):
    """Bytes of address space that the server has taken."""
    status = open(f"/proc/{server.process.pid}/status").read()
    return int(status.split("VmSize:")[1].split()[0]) * 1024


@pytest.mark.parametrize("spare_mib", [0, 8, 60])
def test_without_memory_requests_are_refused_and_the_server_goes_on(ledger, spare_mib):
    """The limit of address space is lowered to what is taken; what is held in reserve is all there is."""
    text = "".join(random.Random(SEED).choices("abcdefgh", k=7_000_000))

    def send(server, number):
        body = json.dumps(wire.chat(text if number % 2 else "x", max_tokens=3)).encode()
        try:
            return server.request("POST", CHAT, body).status
        except OSError:
            # Refused before its body was read.
            return None

    def flood(server):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return set(pool.map(lambda number: send(server, number), range(32)))

    with start(ledger, "--max-body-size", "8MiB") as server:
        pid = server.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (address_space(server) + (spare_mib << 20), hard))
        seen = set().union(*(flood(server) for _ in range(3)))
        assert seen <= {200, 400, 500, 503, None}, seen
        assert server.process.poll() is None, server.log_tail()
        assert server.request("GET", "/health/live").status == 200
        # What was freed is enough for small requests, even below the limit.
        answers(server)
        resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))
        assert flood(server) == {200, 400}
        answers(server)


# Nonsense ------------------------------------------------------------------------------------------

VALUES = [None, True, -1, 0, 1e400, 10**30, "", "x" * 3000, [], {}, [[]], {"a": {}}, "\ud800", "\0"]
FIELDS = ["model", "messages", "max_tokens", "n", "stream", "stop", "tools", "tool_choice", "logprobs",
          "response_format", "stream_options", "temperature", "seed", "logit_bias", "prompt", "input"]


def nonsense(rng):
    """A request that no client should send, and whether HTTP itself would refuse it."""
    paths = [CHAT, "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses",
             "/api/v1/services/aigc/text-generation/generation"]
    path = rng.choice(paths)
    body = wire.chat("x", max_tokens=2, prompt="x", input="x")
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    data = json.dumps(body).encode()
    kind = rng.randrange(6)
    if kind == 0:
        cut = rng.randrange(len(data))
        data = data[:cut]
    elif kind == 1:
        data = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    elif kind == 2:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
    request = wire.post(path, data)
    if kind == 3:
        at = rng.randrange(request.index(b"\r\n\r\n"))
        request = request[:at] + bytes([rng.randrange(256)]) + request[at + 1:]
    elif kind == 4:
        request = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 300))) + b"\r\n\r\n"
    return request


def test_thousands_of_malformed_requests():
    async def load(server, rng):
        statuses = {}
        for _ in range(50):
            requests = [nonsense(rng) for _ in range(60)]
            tasks = []
            for request in requests:
                tasks.append(asyncio.wait_for(send_and_stop(server.port, request), 20))
            for request, reply in zip(requests, await asyncio.gather(*tasks)):
                status = reply.status if reply else None
                statuses[status] = statuses.get(status, 0) + 1
                assert status is None or status < 500, (request, reply)
        return statuses

    async def send_and_stop(port, request):
        """Says that nothing will follow, so that no half request is waited for. But not at once:
        who says so has left, and is not answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            reply = asyncio.ensure_future(reader.read(-1))
            await asyncio.wait([reply], timeout=0.2)
            writer.write_eof()
            return wire.parse(await reply)
        except OSError:
            return None
        finally:
            writer.close()

    with Server(model=TINY_MODEL) as server:
        statuses = asyncio.run(load(server, random.Random(SEED)))
        assert statuses.get(400, 0) > 1000, statuses
        server.wait_until_idle()
        answers(server)
        assert server.json("GET", "/v1/models")["data"][0]["id"] == MODEL
