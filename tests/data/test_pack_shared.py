"""`vlp data pack` in pieces that processes share: the same bytes as in one, from any interruption
on.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from tests.data.folder_material import pack, put
from tests.data.test_pack_large import originals
from vlp.data_tools.pack import chunks
from vlp.data_tools.pack.pictures import Pictures

OPTIONS = ["--samples-per-shard", 6, "--max-side", 48, "--on-missing", "skip"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """26 photos in families of three that neither chunks nor shards end with, and three broken
    ones.
    """
    monkeypatch.setattr(chunks, "SIZE", 4)
    folder = tmp_path / "my photos"
    for turn in range(2):
        for i, (name, data) in enumerate(originals().items()):
            put(folder, f"{turn} {name}", data=data)
            record = {"caption": name, "origin": f"family {(13 * turn + i) // 3}"}
            put(folder, f"{turn} {name}.json", data=json.dumps(record).encode())
    for i, data in enumerate([b"no picture", b"", originals()["photo.jpg"][:400]]):
        put(folder, f"0 {i} broken.jpg", data=data)
        put(folder, f"0 {i} broken.txt", data=b"broken")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "_index.bin"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_processes_write_the_bytes_of_one(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for processes in (1, 2):
        assert pack(photos, "--to", tmp_path / "out", *OPTIONS, "--processes", processes) == 0
        told.append(capsys.readouterr())
        (tmp_path / "out").rename(tmp_path / str(processes))
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and sum(name.endswith(".tar") for name in one) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "my photos"]

    # What is counted, and why, is the same.
    assert told[0].out == told[1].out and "left out: 3 whose image cannot be used" in told[0].out
    assert "check: 8/8 chunks, 29 samples" in told[1].err


@pytest.mark.parametrize("at", [1, 9, 25])
def test_a_chunk_that_is_encoded_is_not_encoded_again(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    assert pack(photos, "--to", tmp_path / "whole", *OPTIONS) == 0
    real, n_encoded = Pictures.written, 0

    def interrupted(pictures: Pictures, data: bytes) -> Any:
        nonlocal n_encoded
        n_encoded += 1
        if n_encoded == at:
            raise KeyboardInterrupt
        return real(pictures, data)

    monkeypatch.setattr(Pictures, "written", interrupted)
    monkeypatch.setattr(chunks, "n_threads", lambda pool: 1)
    assert pack(photos, "--to", tmp_path / "out", *OPTIONS) == 128 + signal.SIGINT
    n_finished = len(list((tmp_path / ".out.partial" / "_made" / "encoded").glob("*.json")))
    assert n_finished == (at - 1) // 4 and not (tmp_path / "out").exists()

    n_encoded = at
    assert pack(photos, "--to", tmp_path / "out", *OPTIONS) == 0
    assert n_encoded - at == 26 - 4 * n_finished
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my photos", "out", "whole"]


def test_encoded_images_of_other_settings_stay_unless_overwriting_is_asked_for(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    from vlp.data_tools.pack.write import WriteShard

    with monkeypatch.context() as patches:
        patches.setattr(WriteShard, "__call__", interrupted)
        assert pack(photos, "--to", tmp_path / "out", *OPTIONS) == 128 + signal.SIGINT
    assert "0 finished shards and what is done of the others wait in" in capsys.readouterr().err
    other = [*OPTIONS, "--quality", 70]
    assert pack(photos, "--to", tmp_path / "out", *other) == 1
    told = capsys.readouterr().err
    assert "0 finished shards and 7 chunks of encoded images of other input or settings" in told
    assert pack(photos, "--to", tmp_path / "out", *other, "--overwrite") == 0


def test_a_call_goes_on_where_its_input_has_another_name(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was moved, or is named from another one: also of what stays as it came."""
    from vlp.data_tools.pack.write import WriteShard

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    assert pack(photos, "--to", tmp_path / "whole", *OPTIONS) == 0
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patches:
        patches.setattr(WriteShard, "__call__", interrupted)
        assert pack(photos.name, "--to", tmp_path / "out", *OPTIONS) == 128 + signal.SIGINT
    rows = sorted((tmp_path / ".out.partial" / "_made" / "encoded").glob("*.rows"))
    is_encoded = [bool(row[1]) for path in rows for row in json.loads(path.read_bytes())]
    assert 0 < sum(is_encoded) < len(is_encoded) == 26

    photos.rename(tmp_path / "moved")
    assert pack("moved", "--to", tmp_path / "out", *OPTIONS) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_work_is_kept_where_the_cluster_fails_and_not_the_input(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of an earlier version, of which nothing may come into the pack."""
    from vlp.data_tools._run.nodes import ClusterError
    from vlp.data_tools.pack import write

    assert pack(photos, "--to", tmp_path / "whole", *OPTIONS) == 0
    for error, stays in ((ValueError("odd"), False), (ClusterError("node 2 is odd"), True)):

        def fail(*_: object, error: ValueError = error) -> None:
            raise error

        with monkeypatch.context() as patches:
            patches.setattr(write, "_write_lists", fail)
            assert pack(photos, "--to", tmp_path / "out", *OPTIONS) == 1
        assert (tmp_path / ".out.partial").exists() == stays
    put(tmp_path / ".out.partial", "_checked.jsonl", data=b"{}")
    assert pack(photos, "--to", tmp_path / "out", *OPTIONS) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_whole_pack_is_tidied_by_the_call_after_one_that_was_killed(
    tmp_path: Path, photos: Path
) -> None:
    out = tmp_path / "out"
    assert pack(photos, "--to", out, *OPTIONS) == 0
    before = contents(out)
    put(out, "_plan.txt", data=b"0a" * 32)
    put(out, "_made/encoded/00000.made", data=b"pictures")
    assert pack(photos, "--to", out, *OPTIONS) == 1
    assert contents(out) == before

    # A file of the user's that bears that name stays.
    put(out, "_plan.txt", data=b"buy milk")
    assert pack(photos, "--to", out, *OPTIONS) == 1
    assert (out / "_plan.txt").read_bytes() == b"buy milk"


def test_a_killed_process_is_named_with_its_images_and_the_call_goes_on(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / ".out.partial" / "_made"
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 100
        while not killed and time.monotonic() < deadline:
            time.sleep(0.001)
            if list(made.glob("checked/*.json")):
                killed.append(active_children()[0])
                killed[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    status = pack(photos, "--to", tmp_path / "out", *OPTIONS, "--processes", 2)
    thread.join()
    assert status == 1 and len(killed) == 1
    told = capsys.readouterr().err
    # Two threads may look for the ended process at once, and one of them then finds no exit code.
    assert re.search(r"ended without a word \((SIGKILL, )?most often for want of memory\)", told)
    # Between two chunks it was at none.
    assert "It was at" not in told or re.search(r"It was at images '[01] .*' to '[01] .*'\n", told)
    assert pack(photos, "--to", tmp_path / "out", *OPTIONS) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", 0], "--processes 0 must be at least 1"),
        (["--samples-per-shard", 0], "--samples-per-shard 0 must be at least 1"),
    ],
)
def test_wrong_numbers_end_before_the_folder_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[Any], message: str
) -> None:
    assert pack(tmp_path / "absent", "--to", tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
