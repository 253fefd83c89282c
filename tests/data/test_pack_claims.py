"""What the JSON of a sample says of its picture is true of the picture that is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.folder_material import pack, packed, put
from tests.data.material import encoded, picture, write_tar
from tests.data_tools.test_reshard import members, reshard
from vlp.data_tools.pack import claims

SIDEWAYS = 6  # an Exif orientation


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    return encoded(picture(7, (96, 40)), "JPEG", exif=exif)


def told_of(data: bytes) -> dict[str, Any]:
    """What a data set may say of a PNG of 96 × 40 pixels."""
    return {
        "width": 96,
        "height": 40.0,
        "original_width": 500,
        "WIDTH": 96,
        "format": "PNG",
        "ext": ".png",
        "mime_type": "image/png",
        "file_size": len(data),
        "md5": hashlib.md5(data).hexdigest().upper(),
        "sha256": hashlib.sha256(b"as it was fetched").hexdigest(),
        "id": hashlib.sha256(data).hexdigest(),
        "class": "png",
    }


def expected(claimed: dict[str, Any], now: bytes) -> dict[str, Any]:
    true = {
        "width": 48,
        "height": 20.0,
        "format": "JPEG",
        "ext": ".jpg",
        "mime_type": "image/jpeg",
        "file_size": len(now),
        "md5": hashlib.md5(now).hexdigest().upper(),
    }
    earlier = {f"original_{name}": claimed[name] for name in true}
    return {**earlier, **claimed, **true}


@pytest.mark.parametrize("source", ["folder", "table", "shards"])
def test_a_json_is_true_of_the_picture_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    data, small = encoded(picture(1, (96, 40))), encoded(picture(2, (30, 20)), "JPEG")
    records = {
        "a": {"caption": "a", **told_of(data)},
        "b": {"caption": "b", "width": 30, "height": 20, "format": "PNG"},
    }
    folder = tmp_path / "in"
    put(folder, "a.png", data=data)
    put(folder, "b.jpg", data=small)
    options = ["--to", tmp_path / "out", "--max-side", 48, "--format", "jpeg"]
    if source == "folder":
        for name, record in records.items():
            put(folder, f"{name}.json", data=json.dumps(record).encode())
        status = pack(folder, *options)
    elif source == "table":
        lines = [json.dumps({"image": f"{name}", **of}) for name, of in records.items()]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        status = pack(folder, "--captions", tmp_path / "rows.jsonl", *options)
    else:
        content = [("a.png", data), ("a.json", json.dumps(records["a"]).encode())]
        write_tar(folder / "0.tar", [*content, *members("b", small, records["b"])])
        status = reshard(folder, *options)
    assert status == 0
    assert "the JSON of 1 images told their size" in capsys.readouterr().out

    first, second = packed(tmp_path / "out")
    wanted = expected(told_of(data), first.image)
    assert {name: first.meta.get(name) for name in wanted} == wanted
    # It keeps its bytes, and what was wrong of it before.
    assert second.image == small
    assert (second.meta["width"], second.meta["format"]) == (30, "PNG")
    assert not [name for name in second.meta if name.startswith("original_")]


def test_a_pack_of_pictures_as_they_came_has_the_json_that_came(tmp_path: Path) -> None:
    record = {"caption": "a", **told_of(encoded(picture(0)))}
    put(tmp_path / "in", "a.png")
    put(tmp_path / "in", "a.json", data=json.dumps(record).encode())
    assert pack(tmp_path / "in", "--to", tmp_path / "out") == 0
    [sample] = packed(tmp_path / "out")
    assert {name: sample.meta[name] for name in told_of(b"")} == told_of(encoded(picture(0)))


def test_claims_of_each_form() -> None:
    """Each (what came, what stands there) with what must stand there; {} where it stays."""
    wide, upright = encoded(picture(7, (96, 40))), encoded(picture(7, (20, 48)), "JPEG")
    shrunk = encoded(picture(7, (48, 20)), "JPEG")
    trials: list[tuple[bytes, bytes, dict, dict]] = [
        (turned(), upright, {"width": 96, "height": 40}, {"width": 20, "height": 48}),
        (turned(), upright, {"width": 40, "height": 96}, {"width": 20, "height": 48}),
        (wide, shrunk, {"width": 40, "height": 96}, {}),
        (wide, shrunk, {"width": 96}, {"width": 48}),
        (wide, shrunk, {"width": "96", "height": "40"}, {"width": "48", "height": "20"}),
        (wide, shrunk, {"width": None, "height": 40}, {}),
        (wide, shrunk, {"format": "gif", "ext": "jpg", "size": [96, 40], "bytes": True}, {}),
        (wide, shrunk, {"extension": "PNG"}, {"extension": "JPG"}),
        (shrunk, shrunk, {"width": 48}, {}),
        (turned(), upright, {"format": "jpg"}, {}),
        (wide, shrunk, {"original_md5": hashlib.md5(wide).hexdigest(), "hash": "f" * 64}, {}),
    ]  # fmt: skip
    for came, written, claimed, true in trials:
        assert claims.mended(claims.of(claimed), came, written) == true, claimed
    assert len(trials) == 11
