"""`vlp data filter --ocr`: captions that repeat the text in their picture, read by RapidOCR's own
weights, by a model of transformers, and by a function of the user's.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageStat

from tests.data_tools.mining import counted
from tests.data_tools.tools import call, read
from vlp.data.format import ShardWriter
from vlp.data_tools import filter as filtering
from vlp.data_tools.filter import spotting
from vlp.data_tools.filter.spotting import Spotter, overlap, runs_model

READER = "tests.data_tools.test_spotting:by_size"
TEXTS = {64: "GRAND OPENING SALE", 48: ["no", "parking"], 32: [], 16: "欢迎光临 hello"}


def by_size(pictures: list[Image.Image]) -> list[str | list[str]]:
    """What "stands" in a picture, by its width."""
    return [TEXTS[picture.width] for picture in pictures]


def of_mean(pictures: list[Image.Image]) -> list[str]:
    """A text that depends on the pixels alone."""
    means = [round(ImageStat.Stat(picture.convert("L")).mean[0]) for picture in pictures]
    return [f"caption {mean % 24} also" for mean in means]


def of_corners(pictures: list[Image.Image]) -> list[str]:
    """A picture's mode and size, and how its corners are, from the upper left on."""
    texts = []
    for picture in pictures:
        right, below = picture.width - 1, picture.height - 1
        places = [(0, 0), (right, 0), (0, below), (right, below)]
        lights = [sum(picture.getpixel(place)) / 3 for place in places]
        corners = " ".join("dark" if light < 100 else "light" for light in lights)
        texts.append(f"{picture.mode} {picture.width} {picture.height} {corners}")
    return texts


def broken(pictures: list[Image.Image]) -> list[str]:
    raise KeyError("x")


def too_few(pictures: list[Image.Image]) -> list[str]:
    return ["a"] * (len(pictures) - 1)


def numbers(pictures: list[Image.Image]) -> list[int]:
    return [1] * len(pictures)


def sign(lines: list[str], size: tuple[int, int] = (240, 110)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(30)
    for i, line in enumerate(lines):
        draw.text((8, 8 + 45 * i), line, fill="black", font=font)
    return picture


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "in", 3) as writer:
        for width, captions in {
            64: ["grand opening", "a shop on a street, grand opening", "a shop"],
            48: ["No parking!", "a sign at a gate says no parking"],
            32: ["no parking", ""],
            16: ["hello", "欢迎光临"],
        }.items():
            captions = [caption for caption in captions if caption]
            writer.add(f"w{width}", png(Image.new("RGB", (width, 20))), "png", captions)
        writer.add("broken", b"no picture", "jpg", ["grand opening"])
    return tmp_path / "in"


def test_captions_that_repeat_the_picture_s_text_go(source: Path, tmp_path: Path, capsys) -> None:
    options = ["--ocr", READER, "--max-overlap", "0.5", "--ocr-field", "text in it"]
    call(filtering, source, "--to", tmp_path / "out", *options)
    after = read(tmp_path / "out")
    assert {key: sample.captions for key, sample in after.items()} == {
        "w64": ("a shop on a street, grand opening", "a shop"),
        "w48": ("a sign at a gate says no parking",),
        "w32": ("no parking",),
    }
    texts = {key: sample.meta["text in it"] for key, sample in after.items()}
    assert texts == {"w64": ["GRAND OPENING SALE"], "w48": ["no", "parking"], "w32": []}
    out = capsys.readouterr().out
    name = "captions dropped: more than 0.5 of its words stand in the picture"
    assert counted(out, name) == 4 and counted(out, "dropped: no caption left") == 1
    assert counted(out, "pictures with text in them") == 3
    assert counted(out, "dropped: no readable picture") == 1

    # The texts alone, for rules of a later call.
    call(filtering, source, "--to", tmp_path / "kept", "--ocr", READER, "--ocr-field", "t")
    assert {len(s.captions) for s in read(tmp_path / "kept").values()} == {1, 2, 3}
    call(filtering, tmp_path / "kept", "--to", tmp_path / "b", "--drop", "t == parking")
    assert list(read(tmp_path / "b")) == ["w64", "w32", "w16"]
    again = ["--ocr", "field:t", "--max-overlap", "0.5", "--to", tmp_path / "again"]
    call(filtering, tmp_path / "kept", *again)
    assert {key: sample.captions for key, sample in read(tmp_path / "again").items()} == {
        key: sample.captions for key, sample in after.items()
    }


@pytest.mark.parametrize(
    "caption, texts, share",
    [
        ("", ["a"], 0),
        ("!?", ["!?"], 0),
        ("a red dog", [], 0),
        ("A red dog", ["RED", "dog house"], 2 / 3),
        ("hello world", ["HELLOWORLD"], 1),  # readers lose blanks
        ("he is in", ["HELLOISINGER"], 0),  # short words stand inside others by chance
        ("it's rock-n-roll", ["ROCK N ROLL", "its"], 1 / 2),
        ("50 apples", ["50% OFF"], 1 / 2),
        ("Straße", ["STRASSE"], 0),
        ("红色汽车", ["新款红色汽车上市"], 1),
    ],
)
def test_the_share_of_a_caption_s_words(caption: str, texts: list[str], share: float) -> None:
    assert overlap(caption, texts) == pytest.approx(share)


def test_rapidocr_reads_drawn_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        captions = ["Summer sale today", "a red shop front with a sign"]
        writer.add("sign", png(sign(["Summer sale", "today"])), "png", captions)
        writer.add("plain", png(sign([])), "png", ["Summer sale today"])
        writer.add("dot", png(sign([], (1, 1))), "png", ["Summer sale today"])
        writer.add("thin", png(sign(["Summer sale"], (5000, 9))), "png", ["a line"])
    options = ["--ocr", "rapidocr", "--max-overlap", "0.6", "--ocr-field", "ocr"]
    call(filtering, tmp_path / "in", "--to", tmp_path / "out", *options)
    after = read(tmp_path / "out")
    assert after["sign"].captions == ("a red shop front with a sign",)
    assert after["plain"].captions == ("Summer sale today",)
    joined = "".join(after["sign"].meta["ocr"]).lower().replace(" ", "")
    assert list(after) == ["sign", "plain", "dot", "thin"]
    assert "could not be read" not in capsys.readouterr().out
    assert "summersale" in joined and "today" in joined and after["plain"].meta["ocr"] == []


def test_readers_see_upright_first_pictures_in_colours(tmp_path: Path) -> None:
    """Of a turned JPEG, an animation, gray of 16 bits and a picture with transparency."""
    whole, exif = Image.new("RGB", (64, 40), "white"), Image.Exif()
    whole.paste("black", (0, 0, 32, 20))
    exif[ExifTags.Base.Orientation] = 8  # shown, it is turned by a quarter
    clear = whole.convert("RGBA")
    clear.putalpha(whole.convert("L").point(lambda value: 255 - value))
    wide = Image.fromarray(np.asarray(whole.convert("L")).astype(np.uint16) << 8)
    files = {kind: io.BytesIO() for kind in ("jpg", "gif", "tiff", "png")}
    whole.transpose(Image.Transpose.ROTATE_270).save(files["jpg"], "JPEG", exif=exif)
    whole.save(files["gif"], "GIF", save_all=True, append_images=[Image.new("RGB", (64, 40))])
    wide.save(files["tiff"], "TIFF")
    clear.save(files["png"], "PNG")
    with ShardWriter(tmp_path / "kinds") as writer:
        for kind, file in files.items():
            writer.add(kind, file.getvalue(), kind, ["a shop"])
    reader = "tests.data_tools.test_spotting:of_corners"
    options = ["--ocr", reader, "--ocr-field", "t"]
    call(filtering, tmp_path / "kinds", "--to", tmp_path / "out", *options)
    after = {key: sample.meta["t"] for key, sample in read(tmp_path / "out").items()}
    assert after == {key: ["RGB 64 40 dark light light light"] for key in files}


def test_what_runs_no_model_takes_no_gpu() -> None:
    names = {
        None: False,
        "rapidocr": False,
        "field:t": False,
        "a.b:f": True,
        "transformers:x": True,
    }
    assert {name: runs_model(name) for name in names} == names


def test_threads_are_read_from_a_list_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenMP reads OMP_NUM_THREADS, for nested teams."""
    for written, n_threads in (("2,1", 2), ("", -1), ("many", -1), ("3", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", written)
        assert spotting.n_threads() == n_threads


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ocr", READER], "--ocr alone does nothing: say --max-overlap SHARE, --ocr-field NAME"),
        (["--max-overlap", "0.5"], "belong to --ocr READER"),
        (["--ocr-field", "x"], "belong to --ocr READER, which is not given"),
        (["--ocr", READER, "--max-overlap", "1"], r"--max-overlap 1 must lie in \[0, 1\)"),
        (["--ocr", READER, "--max-overlap", "-0.1"], r"must lie in \[0, 1\)"),
        (["--ocr", READER, "--ocr-field", "caption"], "overwrite the field 'caption'"),
        (["--ocr", "tesseract"], "--ocr 'tesseract': expected rapidocr, transformers:MODEL"),
        (["--ocr", "transformers:"], "--ocr 'transformers:': expected"),
        (["--ocr", "field:", "--max-overlap", "0.5"], "--ocr 'field:': expected rapidocr"),
        (["--ocr", "field:nobody", "--max-overlap", "0.5"], "no sample has that field"),
        (["--ocr", "field:captions", "--ocr-field", "x"], "reads no picture; leave --ocr-field"),
        (["--ocr", "tests.data_tools.test_spotting:nowhere"], "no attribute 'nowhere'"),
        (["--ocr", "no.such.module:f"], "No module named 'no'"),
        (["--ocr", "transformers:/nowhere/at/all"], "/nowhere/at/all cannot be loaded"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    if "--ocr" in options and len(options) == 2 and READER not in options:
        options = [*options, "--ocr-field", "t"]
    with pytest.raises(ValueError, match=message):
        call(filtering, source, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("broken", r"broken failed for \d pictures: KeyError: 'x'"),
        (
            "too_few",
            r"too_few gave .* for \d pictures; return a text, or a list of texts, for each",
        ),
        ("numbers", r"numbers gave \[1"),
    ],
)
def test_a_function_s_mistakes_are_told(source: Path, tmp_path: Path, name, message) -> None:
    reader = f"tests.data_tools.test_spotting:{name}"
    with pytest.raises(ValueError, match=message):
        call(filtering, source, "--to", tmp_path / "o", "--ocr", reader, "--ocr-field", "t")


def test_a_model_of_transformers_reads(tmp_path: Path) -> None:
    """A tiny image-to-text model with random weights: batches go in, a text for each comes out."""
    from tests.data_tools.reading import tiny_reader

    spotter = Spotter.of(f"transformers:{tiny_reader(tmp_path / 'm')}", "cpu", None, "t")
    assert spotter is not None
    texts = spotter.texts([sign([]), sign(["x"]), Image.new("L", (9, 30))])
    assert len(texts) == 3 and all(isinstance(text, list) for text in texts)
