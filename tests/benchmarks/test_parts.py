"""Benchmarks in parts go on where they stopped, and lose nothing to a part that fails."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.benchmarks import parts


def squared(settings, folder):
    """A part: leaves a file of its own, and fails for a negative number."""
    if settings["number"] < 0:
        raise ValueError("no negative numbers")
    (folder / "file").write_text("x")
    return {"squared": settings["number"] ** 2}


def test_finished_parts_are_kept_and_failed_ones_named(tmp_path):
    # The record of one part stands there already; that of an interrupted one left a folder alone.
    kept = {"settings": {"number": 2}, "commit": "abc", "cpu_s": 1.0, "squared": 5}
    (tmp_path / "two.json").write_text(json.dumps(kept))
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "rest").write_text("of an interrupted call")

    three, wrong = {"number": 3}, {"number": -1}
    wanted = {"two": {"number": 2}, "wrong": wrong, "three": three}
    with pytest.raises(RuntimeError, match="wrong: ValueError: no negative numbers"):
        parts.carry_out(squared, wanted, tmp_path, jobs=1)

    records = parts.all_finished(tmp_path, wanted)
    assert {name: record["squared"] for name, record in records.items()} == {"two": 5, "three": 9}
    assert not (tmp_path / "three" / "rest").exists()
    with pytest.raises(ValueError, match="other settings"):
        parts.finished(tmp_path, "two", three)

    # A later call starts nothing that has finished.
    written = (tmp_path / "three.json").read_text()
    (tmp_path / "three" / "file").unlink()
    parts.carry_out(squared, {"three": three}, tmp_path, jobs=1)
    assert (tmp_path / "three.json").read_text() == written
    assert not (tmp_path / "three" / "file").exists()


SLOW = """
import time
from pathlib import Path
from tests.benchmarks import parts

def pause(settings, folder):
    (folder / "began").write_text("")
    time.sleep(settings["seconds"])
    return {}

if __name__ == "__main__":
    waiting = {name: {"seconds": 15} for name in ("first", "second")}
    parts.carry_out(pause, waiting, Path("out").resolve(), jobs=1)
"""


def test_a_part_ends_with_the_call_that_is_killed(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    environment = os.environ | {"PYTHONPATH": str(parts.report.ROOT)}
    command = [sys.executable, "slow.py"]
    call = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    while not (tmp_path / "out/first/began").exists():
        assert call.poll() is None
        time.sleep(0.05)
    call.kill()

    # The output is at its end when the last process that may write to it has ended.
    call.communicate(timeout=10)
    assert not (tmp_path / "out/first.json").exists()
