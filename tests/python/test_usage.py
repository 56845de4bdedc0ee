"""The usage ledger through what happens to a process and to its disk."""

import asyncio
import random
import resource
import signal
import sqlite3
import subprocess
import threading
import time

import pytest

import wire
from conftest import Server, TINY_MODEL, binary_path, usage_of

CHAT = "/v1/chat/completions"
NUM_TOKENS = 3


class Load:
    """Clients that go on asking until there is no server, and remember when each was answered."""

    def __init__(self, server, num_clients=4):
        self.answered_at = []
        self.num_sent = 0
        self.num_broken = 0
        self.error = None
        self.is_over = False
        self.server = server
        self.thread = threading.Thread(target=self.run, args=[num_clients])
        self.thread.start()

    def run(self, num_clients):
        async def clients():
            await asyncio.gather(*(self.client() for _ in range(num_clients)))
        try:
            asyncio.run(clients())
        except Exception as error:
            self.error = error

    async def client(self):
        while not self.is_over:
            self.num_sent += 1
            request = wire.post(CHAT, wire.stream(max_tokens=NUM_TOKENS))
            reply = await wire.exchange(self.server.port, request)
            if reply is None or (reply.status == 200 and not wire.events(reply)[1]):
                self.num_broken += 1
                return
            wire.assert_finished(reply, NUM_TOKENS)
            self.answered_at.append(time.monotonic())

    def stop(self, num_broken=0):
        """Fails unless every request was answered, but for so many."""
        self.is_over = True
        self.thread.join()
        if self.error:
            raise self.error
        assert self.num_broken <= num_broken


def test_kill_9_loses_at_most_the_last_second(tmp_path):
    ledger, rng = tmp_path / "usage.db", random.Random(7)
    num_certain = num_possible = 0
    for _ in range(4):
        with Server("--usage-ledger", ledger, model=TINY_MODEL) as server:
            load = Load(server)
            time.sleep(rng.uniform(1.5, 3))
            server.kill()
            killed_at = time.monotonic()
            load.stop(num_broken=4)
        num_certain += sum(at < killed_at - 1 for at in load.answered_at)
        num_possible += load.num_sent
        usage = usage_of(ledger)
        assert num_certain <= usage["requests"] <= num_possible
        assert usage["errors"] == 0
        # What is written is whole: never a request without its tokens.
        assert NUM_TOKENS * num_certain <= usage["completion_tokens"] <= NUM_TOKENS * usage["requests"]
        # What was lost is lost; what is left is what the next one adds to.
        num_certain = num_possible = usage["requests"]
    assert num_certain > 50


def test_sigterm_loses_nothing(tmp_path):
    ledger = tmp_path / "usage.db"
    with Server("--usage-ledger", ledger, model=TINY_MODEL) as server:
        load = Load(server)
        time.sleep(0.5)
        load.stop()
        assert server.stop() == 0
    assert usage_of(ledger)["requests"] == len(load.answered_at) == load.num_sent


def test_requests_go_on_while_the_disk_is_full(tmp_path):
    """No file of the server may grow for a while, which needs no rights and no disk of its own."""
    ledger = tmp_path / "usage.db"
    # Python ignores the signal that comes with the limit, and the server inherits that.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    with Server("--usage-ledger", ledger, "--log-level", "warn", model=TINY_MODEL) as server:
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        load = Load(server)
        time.sleep(1.5)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (16 << 10, limits[1]))
        num_before = len(load.answered_at)
        wait_for(lambda: server.metrics()["qwen_ledger_write_failures_total"] >= 2)
        assert server.metrics()["qwen_ledger_unwritten_requests"] > 0
        assert len(load.answered_at) > num_before + 20, "nobody waits for a disk"
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        wait_for(lambda: server.metrics()["qwen_ledger_unwritten_requests"] == 0)
        load.stop()
        assert server.stop() == 0
        assert server.log_tail().count("cannot write the usage ledger") == 1, server.log_tail()
    usage = usage_of(ledger)
    assert usage["requests"] == load.num_sent
    assert usage["completion_tokens"] == NUM_TOKENS * load.num_sent


def test_requests_go_on_while_another_process_holds_the_file(tmp_path):
    ledger = tmp_path / "usage.db"
    with Server("--usage-ledger", ledger, model=TINY_MODEL) as server:
        other = sqlite3.connect(ledger, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        load = Load(server)
        wait_for(lambda: server.metrics()["qwen_ledger_write_failures_total"] >= 1)
        # Reading is possible all the time.
        assert usage_of(ledger)["requests"] == 0
        other.execute("COMMIT")
        other.close()
        wait_for(lambda: server.metrics()["qwen_ledger_unwritten_requests"] == 0)
        load.stop()
    assert usage_of(ledger)["requests"] == load.num_sent


def wait_for(is_so, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


@pytest.mark.parametrize("make, message", [
    (lambda path: path.mkdir(), "cannot use"),
    (lambda path: path.write_text("not a database, but somebody's notes\n" * 100), "cannot use"),
    (lambda path: sqlite3.connect(path).execute("CREATE TABLE notes (text)"), "no usage ledger"),
])
def test_a_ledger_that_cannot_be_is_a_reason_not_to_start(tmp_path, make, message):
    path = tmp_path / "usage.db"
    make(path)
    command = [binary_path(), "serve", "--model", TINY_MODEL, "--port", "0", "--usage-ledger", path]
    result = subprocess.run(command, capture_output=True, timeout=30, text=True)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert lines[-2].startswith("error: ") and message in lines[-2] and str(path) in lines[-2], lines
    assert lines[-1].startswith("hint: "), lines
