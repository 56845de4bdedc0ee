"""A minute of scripts/soak.py, which people run for longer before they trust a build."""

import importlib.util

from conftest import ROOT, TINY_MODEL, binary_path


def test_a_minute_of_mixed_load(capsys):
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts" / "soak.py")
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    arguments = ["--minutes", "1", "--round-s", "14", "--server", str(binary_path()), "--model", str(TINY_MODEL)]
    code = soak.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err + captured.out
