"""The clients for Node in tests/node, against the same server as everything else."""

import os
import re
import subprocess

from conftest import ROOT

NODE_TESTS = ROOT / "tests" / "node"
INSTALL_TIMEOUT_S = 300
TEST_TIMEOUT_S = 300


def test_clients_for_node(server):
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    subprocess.run(install, cwd=NODE_TESTS, check=True, timeout=INSTALL_TIMEOUT_S)
    files = sorted(path.name for path in NODE_TESTS.glob("*.test.mjs"))
    done = subprocess.run(
        ["node", "--test", *files], cwd=NODE_TESTS, capture_output=True, text=True,
        timeout=TEST_TIMEOUT_S,
        env={**os.environ, "QWEN_SERVER_URL": server.url, "NODE_PATH": ""})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"pass [1-9]", done.stdout), done.stdout[-2000:]
