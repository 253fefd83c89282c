"""Members that no reader looks at do not go into new shards, and are counted by kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.material import encoded, picture, write_shards, write_tar
from tests.data_tools.tools import call
from vlp.data_tools import filter as filtering
from vlp.data_tools import negatives, reshard
from vlp.data_tools._run.carried import LEFT_BEHIND

EXPECTED = {"members .xmp": 5, "members .seg.png": 2, "a .caption beside a .txt": 1}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Shards of three, two and no samples, with members of all kinds beside them, and one that a
    tool has written.
    """
    folder = write_shards(tmp_path / "in", 2, 2, start=9)
    (folder / "00000.tar").rename(folder / "9.tar")
    (folder / "00000_stats.json").rename(folder / "9_stats.json")
    (folder / "_index.bin").unlink(missing_ok=True)
    members: list[tuple[str, bytes]] = []
    for i in range(5):
        data = encoded(picture(i))
        members.append((f"{i}.png", data))
        members += [(f"{i}.txt", b"two words"), (f"{i}.xmp", b"x")]
        if i in (1, 4):
            members.append((f"{i}.seg.png", data))
    members.insert(2, ("0.caption", b"other words"))
    cut = 3 * 3 + 2  # before the fourth sample
    write_tar(folder / "0.tar", members[:cut])
    write_tar(folder / "1.tar", members[cut:])
    write_tar(folder / "2.tar", [("alone.webm", b"w")])
    return folder


@pytest.mark.parametrize(
    "tool, options",
    [
        (filtering, ["--min-words", 1]),
        (filtering, ["--max-repeats", 9]),
        (negatives, []),
        (reshard, ["--samples-per-shard", 1]),
        (reshard, ["--shuffle", 0, "--samples-per-shard", 3, "--renumber"]),
    ],
)
def test_what_nobody_reads_is_counted_once(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: Any, options: list
) -> None:
    out = tmp_path / "out"
    assert call(tool, foreign, *options, "--to", out) == 0
    printed = capsys.readouterr().out
    expected = {f"{LEFT_BEHIND}{kind}": n for kind, n in EXPECTED.items()}
    expected[f"{LEFT_BEHIND}members .webm"] = 1

    name = tool.__name__.rpartition(".")[2]
    marked: Counter[str] = Counter()
    for mark in out.glob(f"0*_{name}.json"):
        marked.update(json.loads(mark.read_text())["counts"])
    assert {kind: n for kind, n in marked.items() if kind.startswith(LEFT_BEHIND)} == expected
    for kind, n in expected.items():
        [line] = [line for line in printed.splitlines() if kind in line]
        assert line.split()[-1] == str(n)

    # New shards have nothing to leave behind.
    assert call(reshard, out, "--to", tmp_path / "again") == 0
    assert LEFT_BEHIND not in capsys.readouterr().out
