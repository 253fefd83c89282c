"""What foreign shards may hold and no tool may fall over: lone surrogates, odd class numbers, keys
that lead elsewhere.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.data.material import encoded, picture, write_tar
from tests.data_tools.tools import call, read
from vlp.data_tools import counting, dedup, negatives, reshard, sheet, stats
from vlp.data_tools import filter as filtering

TOOLS: list[tuple[ModuleType, list[Any]]] = [
    (filtering, ["--min-words", 1]),
    (filtering, ["--max-repeats", 9]),
    (reshard, []),
    (reshard, ["--renumber", "--shuffle", 1]),
    (dedup, []),
    (negatives, []),
    (counting, []),
    (stats, []),
]
NAMES = [f"{tool.__name__.rsplit('.')[-1]}{i}" for i, (tool, _) in enumerate(TOOLS)]
LONE = "two dogs on a red sofa \ud800"


def shard(path: Path, samples: dict[str, dict[str, Any]]) -> Path:
    members = []
    for i, (key, meta) in enumerate(samples.items()):
        members += [(f"{key}.png", encoded(picture(i))), (f"{key}.json", json.dumps(meta).encode())]
    return write_tar(path, members)


@pytest.mark.parametrize("tool, options", TOOLS, ids=NAMES)
def test_lone_surrogates_become_u_fffd_and_cost_nothing(
    tmp_path: Path, tool: ModuleType, options: list[Any]
) -> None:
    meta = {"captions": [LONE], "alt\udfff": "\udc80", "negatives": ["\ud800 x"]}
    shard(tmp_path / "in" / "0.tar", {"a": meta, "b": {"captions": ["two dogs"]}})
    assert call(tool, tmp_path / "in", "--to", tmp_path / "out", *options) == 0
    if tool is not stats:
        after = next(iter(read(tmp_path / "out").values()))
        assert after.captions == (LONE.replace("\ud800", "\ufffd"),)
        assert after.meta["alt\ufffd"] == "\ufffd"


def test_lone_surrogates_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shard(tmp_path / "in" / "0.tar", {"a": {"captions": [LONE], "negatives": ["\ud800 x"]}})
    for name in ("a.html", "a.png"):
        assert call(sheet, tmp_path / "in", "--to", tmp_path / name) == 0
    assert "dogs on a red sofa" in (tmp_path / "a.html").read_text()
    for tool in (negatives, counting):
        assert call(tool, tmp_path / "in", "--print", 3) == 0
    capsys.readouterr().out.encode()


@pytest.mark.parametrize("cls", [-1, True, 10**9, "3", 1.5, None])
def test_an_odd_class_number_does_not_cost_the_sample(tmp_path: Path, cls: Any) -> None:
    shard(tmp_path / "in" / "0.tar", {"a": {"captions": ["a dog"], "cls": cls}})
    call(reshard, tmp_path / "in", "--to", tmp_path / "out")
    assert read(tmp_path / "out")["a"].meta["cls"] == cls


@pytest.mark.parametrize("tool, options", TOOLS, ids=NAMES)
def test_keys_do_not_lead_out_of_the_folder(
    tmp_path: Path, tool: ModuleType, options: list[Any]
) -> None:
    keys = ["../../evil", "/etc/evil1", "a/../../evil2", "..\\..\\evil3", "./evil4"]
    shard(
        tmp_path / "x" / "in" / "0.tar",
        {key: {"captions": ["two dogs on a red sofa"]} for key in keys},
    )
    before = files(tmp_path)
    assert call(tool, tmp_path / "x" / "in", "--to", tmp_path / "x" / "out", *options) == 0
    new = files(tmp_path) - before
    assert new and all(name.startswith(("x/out/", "x/in/_index.bin")) for name in new)
    if tool is not stats:
        for key in read(tmp_path / "x" / "out"):
            assert not os.path.isabs(key) and ".." not in key.split("/") and "\\" not in key


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("image", ["../secret.png", "/SECRET", "link.png", "sub/../../secret.png"])
def test_given_images_lie_in_the_table_s_folder(tmp_path: Path, image: str) -> None:
    (tmp_path / "t" / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "t" / "link.png").symlink_to(tmp_path / "secret.png")
    image = image.replace("/SECRET", str(tmp_path / "secret.png"))
    table = tmp_path / "t" / "given.jsonl"
    table.write_text(json.dumps({"key": "a", "negatives": ["x"], "image": image}))
    with pytest.raises(ValueError, match=r"given\.jsonl:1: .* leads out of the folder"):
        negatives.read_given(table)
    (tmp_path / "t" / "sub" / "own.png").write_bytes(b"own")
    table.write_text(json.dumps({"key": "a", "negatives": ["x"], "image": "sub/own.png"}))
    assert len(negatives.read_given(table)[1]) == 1
