"""Sounds and frames of shards that tools write into a store."""

from __future__ import annotations

from pathlib import Path

from tests.data.loopback_store import Store
from tests.data.test_member_index import N, member_loader, write
from tests.data_tools.in_stores import options, server, vlp
from vlp.data import index_file
from vlp.data.member_file import NAME, open_members

__all__ = ["server"]


def test_tools_leave_places_of_members_beside_shards_in_a_store(
    server: Store, tmp_path: Path
) -> None:
    """Else whoever trains on them would fetch all shards at the start to find their members."""
    write(tmp_path / "clips", prefix="clip")
    assert vlp("filter", tmp_path / "clips", "--min-words", 1, "--to", "s3://bucket/out") == 0
    names = {path.name for path in (server.root / "out").iterdir()}
    assert not [name for name in names if name.endswith((".members", ".index"))]
    assert open_members(server.root / "out" / NAME).keys() == {f"0000{k}.tar" for k in range(3)}

    index_file._handles.clear()
    server.served.clear()
    storage = options(server)
    source = {"name": "remote", "path": "s3://bucket/out/", "window": 3, "storage": storage}
    loader = member_loader(source)
    assert not [name for name in server.served if name.endswith(".tar")]
    batch = next(loader)
    lengths = dict(zip(batch.key, batch.modality_lengths.tolist(), strict=True))
    assert lengths == {f"clip{i}": [10 if i % 3 else 0, min(i % 4, 2)] for i in range(N)}

    # A call that does nothing but end leaves it as it is.
    whole = (server.root / "out" / NAME).read_bytes()
    assert vlp("filter", tmp_path / "clips", "--min-words", 1, "--to", "s3://bucket/out") == 0
    assert (server.root / "out" / NAME).read_bytes() == whole
