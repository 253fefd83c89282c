"""`vlp data pack` for large sets: pictures shrunk and encoded anew, and calls that are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.data.folder_material import pack, packed, put
from tests.data.material import picture
from vlp.data.picture import header, rgb

# An ICC profile names its colours in the bytes from 16 to 20.
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
OF_INKS = PROFILE[:16] + b"CMYK" + PROFILE[20:]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """A picture that shrinking changes little, and whose corners differ."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def originals() -> dict[str, bytes]:
    """Pictures by name, of every kind that is handled in its own way."""
    wide = smooth(96, 64)
    clear = wide.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 48, 64))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "photo.jpg": saved(wide, "JPEG", quality=95, icc_profile=PROFILE),
        "turned.jpg": saved(wide, "JPEG", quality=95, exif=turned),
        "gray.jpg": saved(wide.convert("L"), "JPEG", quality=95),
        "inks.jpg": saved(wide.convert("CMYK"), "JPEG", quality=95, icc_profile=OF_INKS),
        "clear.png": saved(clear, "PNG"),
        "deep.png": saved(Image.fromarray(np.full((64, 96), 40000, np.uint16)), "PNG"),
        "palette.gif": saved(wide.quantize(64), "GIF"),
        "plain.bmp": saved(wide, "BMP"),
        "exact.webp": saved(wide, "WEBP", lossless=True),
        "lossy.webp": saved(wide, "WEBP", quality=95),
        "new.avif": saved(wide, "AVIF", quality=95),
        "tiny.jpg": saved(smooth(20, 10), "JPEG"),
        "thin.png": saved(smooth(96, 1), "PNG"),
    }


@pytest.fixture
def photos(tmp_path) -> Path:
    for name, data in originals().items():
        put(tmp_path / "my photos", name, data=data)
        put(tmp_path / "my photos", f"{name}.txt", data=name.encode())
    return tmp_path / "my photos"


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (["--max-side", 48], {"JPEG": 5, "PNG": 5, "WEBP": 2, "AVIF": 1}),
        (["--max-side", 48, "--format", "jpeg"], {"JPEG": 13}),
        (["--format", "webp"], {"WEBP": 13}),
        (["--max-side", 48, "--format", "webp", "--lossless"], {"WEBP": 13}),
        (["--max-side", 48, "--format", "avif", "--lossless"], {"AVIF": 7, "PNG": 6}),
    ],
)
def test_pictures_are_shrunk_and_encoded_as_readers_see_them(
    tmp_path, photos, capsys, options, kinds
):
    assert pack(photos, "--to", tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out

    before = originals()
    side = 48 if "--max-side" in options else 96
    counted: dict[str, int] = {}
    n_pixels = n_bytes = 0
    for sample in packed(tmp_path / "out"):
        name = sample.captions[0]
        earlier, now = header(before[name]), header(sample.image)
        counted[now.kind] = counted.get(now.kind, 0) + 1
        n_pixels, n_bytes = n_pixels + now.width * now.height, n_bytes + len(sample.image)

        # Never enlarged, never distorted by more than a pixel, and named as what it is.
        longer = max(earlier.width, earlier.height)
        scale = min(1, side / longer)
        assert max(now.width, now.height) == min(side, longer)
        assert abs(now.height - max(1, earlier.height * scale)) <= 0.5
        assert sample.image_type == {"JPEG": "jpg"}.get(now.kind, now.kind.lower())

        # What a reader sees is what it saw, upright, on whatever lies behind.
        expected = rgb(before[name]).resize((now.width, now.height), Image.Resampling.LANCZOS)
        difference = np.asarray(rgb(sample.image), int) - np.asarray(expected, int)
        assert np.abs(difference).mean() < 6, name
        assert now.transparent == (name == "clear.png" and now.kind != "JPEG")
        if name == "tiny.jpg" and now.kind == "JPEG":
            assert sample.image == before[name]
        if "--lossless" in options and header(before[name]).lossless:
            assert now.lossless, name
        profile = Image.open(BytesIO(sample.image)).info.get("icc_profile")
        assert bool(profile) == (name == "photo.jpg"), name

    assert counted == kinds
    all_pixels = 11 * 96 * 64 + 20 * 10 + 96
    assert f"pixels {all_pixels:,} → {n_pixels:,} ({n_pixels / all_pixels:.1%})" in printed
    assert f"bytes {sum(map(len, before.values())):,} → {n_bytes:,}" in printed
    assert f"shrunk {12 if side == 48 else 0} of 13 images" in printed
    assert ("1 images with transparency lie on white" in printed) == ("jpeg" in options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-side", 0], "--max-side 0 must be at least 1"),
        (["--format", "webp", "--quality", 101], "--quality 101 must be from 1 to 100"),
        (["--quality", 80], "add --max-side or --format"),
        (["--lossless"], "keep leaves lossless pictures"),
    ],
)
def test_wrong_options_of_pictures_end_before_the_folder_is_read(
    tmp_path, capsys, options, message
):
    assert pack(tmp_path / "absent", "--to", tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err


def test_a_picture_that_the_new_format_cannot_hold_is_named_before_anything_is_written(
    tmp_path, capsys
):
    put(tmp_path / "set", "long.png", data=saved(Image.new("RGB", (16400, 1)), "PNG"))
    put(tmp_path / "set", "long.txt", data=b"a line")
    assert pack(tmp_path / "set", "--to", tmp_path / "out", "--format", "webp") == 1
    assert "more than WEBP holds" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    options = ["--format", "webp", "--max-side", 400]
    assert pack(tmp_path / "set", "--to", tmp_path / "out", *options) == 0


KILLED = """
import os, signal, sys
import vlp.data.format, vlp.data.picture, vlp.data.trees, vlp.data_tools.pack
from vlp.cli import main

ends = []
for at in range(1, 40):
    if os.fork():
        ends.append(os.wait()[1])
        if ends[-1] == 0:
            break
        continue
    n_renames = 0

    def watch(event, details):
        global n_renames
        n_renames += event == "os.rename"
        if event == "os.rename" and n_renames == 3 + at % 3:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os._exit(main(sys.argv[1:]))
print(len(ends), ends[-1], set(ends[:-1]))
"""


def test_a_killed_call_goes_on_and_ends_with_the_same_bytes(tmp_path):
    """Killed at changing renames until one ends well: shards, statistics and lists are those of an
    undisturbed call. Families of three do not meet the ends of shards of four."""
    for i in range(17):
        put(tmp_path / "set", f"{i:02}.png", data=saved(picture(i), "PNG"))
        record = {"caption": f"text {i}", "origin": f"family {i // 3}"}
        put(tmp_path / "set", f"{i:02}.json", data=json.dumps(record).encode())

    options = ["--samples-per-shard", 4, "--max-side", 24, "--layout", "clip_benchmark"]
    assert pack(tmp_path / "set", "--to", tmp_path / "whole", *options) == 0
    arguments = ["data", "pack", tmp_path / "set", "--to", tmp_path / "killed", *options]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    n_calls, last, others = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert int(n_calls) >= 3 and (last, others) == ("0", "{9}")
    assert "of 6 shards are finished already" in done.stderr

    files = {}
    for name in ("whole", "killed"):
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        files[name] = {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in paths
            if path.name != "_index.bin"
        }
    assert files["whole"] == files["killed"] and len(files["whole"]) >= 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "set", "whole"]


def test_unfinished_work_of_other_settings_stays_unless_overwriting_is_asked_for(
    tmp_path, photos, capsys
):
    leftover = put(tmp_path / ".out.partial", "_plan.txt", data=b"other")
    put(leftover, "00000.tar", data=b"of another call")
    assert pack(photos, "--to", tmp_path / "out") == 1
    assert "1 finished shards of other input or settings" in capsys.readouterr().err
    assert (leftover / "00000.tar").read_bytes() == b"of another call"

    assert pack(photos, "--to", tmp_path / "out", "--overwrite") == 0
    assert len(packed(tmp_path / "out")) == 13 and not leftover.exists()
