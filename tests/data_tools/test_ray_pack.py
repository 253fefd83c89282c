"""`vlp data pack`, `sheet` and `inspect` on a Ray cluster: the same bytes, a lost node, a killed
call.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.folder_material import pack
from tests.data.loopback_store import Store
from tests.data.material import write_tar
from tests.data.test_pack_shared import OPTIONS, photos  # noqa: F401  # a fixture
from tests.data_tools.in_stores import content, forget_all
from tests.data_tools.ray_cluster import Nodes, contents, joined
from vlp.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def running() -> Iterator[Nodes]:
    with joined() as made:
        yield made


def tar_and_table(photos: Path, folder: Path) -> list[Path]:  # noqa: F811
    """Write the pictures as `photos.tar` and `photos.jsonl`; returns them."""
    pictures = sorted(path for path in photos.iterdir() if path.suffix not in (".txt", ".json"))
    write_tar(folder / "photos.tar", [(path.name, path.read_bytes()) for path in pictures])
    rows = [{"image": path.name, "caption": path.name, "class": path.suffix} for path in pictures]
    (folder / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return pictures


def test_all_inputs_become_the_same_bytes_on_a_cluster(
    running: Nodes,
    tmp_path: Path,
    photos: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With relative paths."""
    monkeypatch.chdir(tmp_path)
    pictures = tar_and_table(photos, Path())
    for path in pictures:
        copy = Path("classes", path.suffix[1:], path.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())

    table = ["--captions", "photos.jsonl", "--on-missing", "skip"]
    trials: list[tuple[str, list[Any]]] = [
        (photos.name, OPTIONS),
        (photos.name, ["--on-missing", "skip"]),
        (photos.name, ["--on-missing", "skip", "--format", "avif", "--part", "1,2/3"]),
        ("photos.tar", [*table, "--format", "webp", "--lossless", "--samples-per-shard", 5]),
        ("photos.tar", [*table, "--layout", "clip_benchmark", "--template", "a {}."]),
        ("classes", ["--on-missing", "skip", "--samples-per-shard", 3, "--max-side", 40]),
    ]
    for source, options in trials:
        assert pack(source, *options, "--to", "out") == 0
        here = capsys.readouterr().out
        Path("out").rename("here")
        assert pack(source, *options, "--to", "out", "--ray", running.address) == 0
        assert capsys.readouterr().out == here
        assert contents(Path("here")) == contents(Path("out")) and len(contents(Path("out"))) > 1
        for folder in ("here", "out"):
            shutil.rmtree(folder)
    assert len(trials) == 6 and not list(Path().glob(".*"))


def test_a_look_at_samples_is_the_same_on_a_cluster(
    running: Nodes,
    tmp_path: Path,
    photos: Path,  # noqa: F811
) -> None:
    shards = tmp_path / "shards"
    assert pack(photos, *OPTIONS, "--to", shards) == 0
    for name, where in (("here", []), ("there", ["--ray", running.address])):
        (tmp_path / name).mkdir()
        for file in ("sheet.html", "sheet.png"):
            to = ["--samples", "9", "--to", str(tmp_path / name / file)]
            assert main(["data", "sheet", str(shards), *to, *where]) == 0
        to = ["--json", str(tmp_path / name / "looks.json")]
        assert main(["data", "inspect", str(shards), *to, *where]) == 0
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    looks = [json.loads(of.pop("looks.json")) for of in (here, there)]
    assert here == there and len(here) == 2
    # But for how fast it was.
    told = [{k: look[k] for k in look if not k.endswith("_a_s")} for look in looks]
    assert told[0] == told[1] and told[0]["samples_read"] == 26


def test_a_lost_node_and_a_killed_call_cost_no_byte(
    running: Nodes,
    tmp_path: Path,
    photos: Path,  # noqa: F811
) -> None:
    """Chunks of a node that is lost begin anew. A call that is killed goes on without the cluster,
    and one without goes on there.
    """
    assert pack(photos, *OPTIONS, "--to", tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    marks = {"checked": 2, "encoded": 3, "shards": 1}
    n_lost = 0
    for kind, after in marks.items():
        made = tmp_path / f".{kind}.partial" / "_made" / kind
        with running.losing_second(made, "*.json", after):
            options = [*OPTIONS, "--to", tmp_path / kind, "--ray", running.address]
            assert pack(photos, *options) == 0
        n_lost += 1
        assert contents(tmp_path / kind) == whole, kind

        out, command = tmp_path / f"{kind} killed", "import sys, vlp.cli; sys.exit(vlp.cli.main())"
        made = tmp_path / f".{out.name}.partial" / "_made" / kind
        options = ["data", "pack", photos, *OPTIONS, "--to", out, "--ray", running.address]
        set_size = f"import vlp.data_tools.pack.chunks as chunks; chunks.SIZE = 4; {command}"
        tool = subprocess.Popen([sys.executable, "-c", set_size, *map(str, options)])
        deadline = time.monotonic() + 200
        while len(list(made.glob("*.json"))) < after and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(tool.pid, signal.SIGKILL)
        tool.wait()
        assert pack(photos, *OPTIONS, "--to", out) == 0 or contents(out) == whole
        assert contents(out) == whole
    assert n_lost == 3 and not list(tmp_path.glob(".*"))


def test_nodes_pack_out_of_a_store_into_one(
    running: Nodes,
    server: Store,
    tmp_path: Path,
    photos: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nodes need see no folder of the machine of the call. What an earlier pack left stays until
    every picture is checked, and a call that is stopped goes on.
    """
    root = server.root
    tar_and_table(photos, root)
    here = [root / "photos.tar", "--captions", root / "photos.jsonl", *OPTIONS]
    there = ["s3://bucket/photos.tar", "--captions", "s3://bucket/photos.jsonl", *OPTIONS]
    on_ray = ["--to", "s3://bucket/out", "--ray", running.address]

    layouts: list[list[Any]] = [[], ["--layout", "clip_benchmark"], ["--format", "webp"]]
    for n, options in enumerate(layouts):
        whole = tmp_path / f"whole{n}"
        assert pack(*here, *options, "--to", whole) == 0
        again = ["--overwrite"] if n else []
        forget_all(monkeypatch)
        assert pack(*there, *options, *again, *on_ray) == 0
        assert content(root / "out") == content(whole) and len(content(whole)) > 5
    assert pack(*there, *on_ray) == 1 and "is not empty" in capsys.readouterr().err

    # Refused for its pictures, it leaves the earlier pack alone.
    before = content(root / "out")
    strict = [option for option in there if option not in ("--on-missing", "skip")]
    forget_all(monkeypatch)
    assert pack(*strict, "--overwrite", *on_ray) == 1
    assert content(root / "out") == before

    # Stopped before its end; other settings are refused, and the same command goes on.
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr("vlp.data_tools.pack.write._write_lists", interrupted)
        assert pack(*there, "--overwrite", *on_ray) == 128 + signal.SIGINT
    assert "5 finished shards and what is done of the others wait in" in capsys.readouterr().err
    forget_all(monkeypatch)
    assert pack(*there, "--quality", 50, *on_ray) == 1
    assert "s3://bucket/out holds unfinished work of other input" in capsys.readouterr().err
    forget_all(monkeypatch)
    assert pack(*there, *on_ray) == 0
    assert "pack: 5 of 5 shards are finished already" in capsys.readouterr().err
    assert content(root / "out") == content(tmp_path / "whole0")


def test_nodes_pack_a_folder_of_a_store(
    running: Nodes,
    server: Store,
    tmp_path: Path,
    photos: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each node fetches the pictures of its own chunks."""
    shutil.copytree(photos, server.root / "folder")
    layouts: list[list[Any]] = [[*OPTIONS], ["--on-missing", "skip"]]
    for n, options in enumerate(layouts):
        assert pack(photos, *options, "--to", tmp_path / f"whole{n}") == 0
        for to in (f"s3://bucket/out{n}", str(tmp_path / f"out{n}")):
            forget_all(monkeypatch)
            on_ray = ["--to", to, "--ray", running.address]
            assert pack("s3://bucket/folder", *options, *on_ray) == 0
        whole = content(tmp_path / f"whole{n}")
        assert content(server.root / f"out{n}") == whole and len(whole) >= 3
        assert content(tmp_path / f"out{n}") == whole
    assert not list((tmp_path / "cache" / "packs").glob("*"))
