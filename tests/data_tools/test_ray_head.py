"""A call on a Ray cluster whose head is lost."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.material import encoded, picture
from tests.data_tools.ray_cluster import joined
from vlp.cli import main
from vlp.data.format import ShardWriter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_call_without_its_head_says_what_stays_and_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two nodes need most of a minute for them, which is longer than a head may be silent.
    source = tmp_path / "in"
    with ShardWriter(source, 1) as writer:
        for i in range(400):
            writer.add(None, encoded(picture(i % 8, (16, 16))), "png", ["a text"])
    reader = ["--ocr", "tests.data_tools.ray_works:read_slowly"]
    out, marks = tmp_path / "out", "0*_filter.json"
    command = ["data", "filter", source, *reader, "--max-overlap", 0.5, "--to", out, "--ray"]
    with joined() as running:
        tool = subprocess.Popen(
            [sys.executable, "-m", "vlp.cli", *map(str, command), running.address],
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 200
        while len(list(out.glob(marks))) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        # The nodes have their cores and files, but nobody tells them what to do.
        running.cluster.head_node.kill_gcs_server(check_alive=False)
        told = tool.communicate()[1]
        n_finished = len(list(out.glob(marks)))
    assert tool.returncode == 1 and 3 <= n_finished < 400, told
    expected = r"vlp: the head of the Ray cluster at \S+ has not answered for \d+ s .* goes on "
    assert re.search(expected, told) and "GCS" not in told, told

    monkeypatch.setattr("tests.data_tools.ray_works.time.sleep", lambda seconds: None)
    assert main([*map(str, command[:-1])]) == 0
    assert f"{n_finished} of 400 shards are finished already" in capsys.readouterr().err
    assert len(list(out.glob("*.tar"))) == 400
