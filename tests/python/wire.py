"""HTTP by hand, for clients that no library would be, and for more of them than threads."""

import asyncio
import collections
import json

from conftest import MODEL

TIMEOUT_S = 60

Reply = collections.namedtuple("Reply", "status headers body")


def post(path, body, **headers):
    """The bytes of a request after whose answer the connection ends."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "localhost", "content-type": "application/json", "content-length": len(data),
             "connection": "close"} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def chat(text, **fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def stream(text="for ever", **fields):
    """A chat that goes on for as long as it may, with its usage at the end."""
    fields = {"max_tokens": 400, "ignore_eos": True} | fields
    return chat(text, stream=True, stream_options={"include_usage": True}, **fields)


async def exchange(port, request):
    """Sends bytes and reads to the end. `None` if the connection broke or was refused."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return None
    try:
        writer.write(request)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(-1), TIMEOUT_S)
    except OSError:
        return None
    finally:
        writer.close()
    return parse(answer)


def parse(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].startswith("HTTP/1.1 "):
        return None
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Reply(int(lines[0].split(" ")[1]), headers, body)


def unchunked(body):
    data = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        if not size:
            break
        length = int(size, 16)
        data, body = data + body[:length], body[length + 2:]
    return data


def events(reply):
    """The JSON of a stream's events, and whether it came to its end."""
    # What follows the last empty line is half an event, of a stream that broke off.
    whole = reply.body.decode(errors="replace").split("\n\n")[:-1]
    data = [event[6:] for event in whole if event.startswith("data: ")]
    is_whole = bool(data) and data[-1] == "[DONE]"
    return [json.loads(one) for one in data if one != "[DONE]"], is_whole


def assert_finished(reply, num_tokens=None):
    """A stream that was answered to its end. Returns its usage."""
    assert reply is not None and reply.status == 200, reply
    chunks, is_whole = events(reply)
    assert is_whole, reply.body[-300:]
    usage = chunks[-1]["usage"]
    assert num_tokens is None or usage["completion_tokens"] == num_tokens
    return usage


def assert_sent_away(reply, *statuses):
    """A refusal that says when to come back."""
    assert reply.status in statuses, reply
    assert int(reply.headers["retry-after"]) >= 1
    error = json.loads(reply.body)["error"]
    assert error["message"] and error["code"]
