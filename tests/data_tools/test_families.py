"""Samples of one origin stay side by side and in one shard: in `vlp data reshard`, `filter` and the
writer of all tools.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.material import encoded, picture, write_tar
from tests.data_tools.tools import call, read
from vlp.config import Captions
from vlp.data.format import ShardWriter
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.units import Origins
from vlp.data_tools import filter as filtering
from vlp.data_tools import reshard
from vlp.data_tools._run.shards import samples


def families(folder: Path) -> list[list[tuple[Any, int]]]:
    """Of each shard the runs of one origin: (origin, samples)."""
    result = []
    for path in sorted(folder.glob("*.tar")):
        origins = [sample.meta.get("origin") for sample in samples(path, Counter())]
        result.append([(origin, len(list(run))) for origin, run in itertools.groupby(origins)])
    return result


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--shuffle", 3),
        ("--shuffle", 4, "--renumber", "--processes", 2),
        ("--megabytes-per-shard", 0.02, "--shuffle", 1),
    ],
)
def test_families_stay_together(tmp_path: Path, options: tuple) -> None:
    """Also where the cut between two shards of the input goes through one, and where one is larger
    than a shard.
    """
    sizes, n = {f"o{i}": 1 + i % 4 for i in range(12)} | {"large": 9}, 0
    keys = [(origin, v) for origin, size in sizes.items() for v in range(size)]
    (tmp_path / "in").mkdir()
    for shard in range(0, len(keys), 5):
        members = []
        for origin, v in keys[shard : shard + 5]:
            told = {"captions": ["x"], "origin": origin, "v": v}
            members += [
                (f"{origin}-{v}.png", encoded(picture(v))),
                (f"{origin}-{v}.json", json.dumps(told).encode()),
            ]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
    assert any(
        run[-1][0] == next_run[0][0]
        for run, next_run in itertools.pairwise(families(tmp_path / "in"))
    )
    call(
        reshard,
        tmp_path / "in",
        "--to",
        tmp_path / "out",
        *(options or ()),
        "--samples-per-shard",
        6,
    )
    found = families(tmp_path / "out")
    assert dict(run for shard in found for run in shard) == sizes and sum(map(len, found)) == len(
        sizes
    )
    assert all(sum(n for _, n in shard) <= 6 for shard in found if ("large", 9) not in shard)
    order = [sample.meta for sample in read(tmp_path / "out").values()]
    for origin, size in sizes.items():
        assert [meta["v"] for meta in order if meta["origin"] == origin] == list(range(size))
        n += 1
    assert n == 13 and ([meta["origin"] for meta in order] == [origin for origin, _ in keys]) == (
        not options
    )
    source = open_shards(Options(str(tmp_path / "out")), Captions())
    assert len(Origins(source, 3, False)) == sum(size >= 3 for size in sizes.values())
    call(filtering, tmp_path / "out", "--to", tmp_path / "some", "--drop", "v == 1")
    assert dict(run for shard in families(tmp_path / "some") for run in shard) == {
        o: n - (n > 1) for o, n in sizes.items()
    }


def test_a_writer_ends_no_shard_within_a_family(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 3) as writer:
        for origin, size in (("a", 2), ("b", 4), ("c", 1), (None, 4), ("d", 3), ("e", 1)):
            for _ in range(size):
                writer.add(None, b"x", "jpg", ["x"], {} if origin is None else {"origin": origin})
    assert families(tmp_path) == [
        [("a", 2), ("b", 4)],
        [("c", 1), (None, 2)],
        [(None, 2), ("d", 3)],
        [("e", 1)],
    ]
    assert len(read(tmp_path)) == 15
