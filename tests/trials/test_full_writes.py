"""A disk that runs full at any file that is written.

The command says so in one line, keeps what was there, leaves no part, and does its work once there
is room.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("limit", "n_least"),
    [
        pytest.param(1, 6, id="one"),
        pytest.param(1000, 60, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_a_disk_that_runs_full_at_any_write(small_world, tmp_path, limit, n_least):
    place = tmp_path / "small"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=80m none {place}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own")
    arguments = [place, small_world["shards"], small_world["config"], small_world["run"], limit]
    command = [sys.executable, "-m", "tests.trials.full_writes", *map(str, arguments)]
    inside = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    done = subprocess.run(inside, capture_output=True, text=True, cwd=ROOT, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]

    trials = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(trials) >= n_least and len({trial["name"] for trial in trials}) == 6
    for trial in trials:
        assert not (trial["partial"] or trial["changed"] or trial["torn"]), trial
        assert "Traceback" not in trial["said"] and trial["again"] == 0, trial
        if trial["status"]:
            assert trial["status"] == 1, trial
            for part in ("no space left for", str(place), "MB are free", "make room"):
                assert part in trial["said"], trial
        else:
            # An index that did not fit beside its shards lies in the cache.
            assert all(path.endswith("_index.bin") for path in trial["missing"]), trial
        assert trial["same_files"] or not trial["status"], trial
    assert sum(trial["status"] for trial in trials) > len(trials) * 0.6
