"""Which language a caption is in: py3langid, fastText's interface, and the rough guess."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.data_tools.mining import counted
from tests.data_tools.tools import call, read
from vlp.data.format import ShardWriter
from vlp.data_tools import filter as filtering
from vlp.data_tools.filter.languages import Identifier

CAPTIONS = {
    "en": "a woman is riding her bicycle along the river in the evening",
    "de": "eine Frau fährt am Abend mit ihrem Fahrrad den Fluss entlang",
    "fr": "une femme roule à vélo le long de la rivière dans la soirée",
    "ru": "женщина едет на велосипеде вдоль реки вечером",
    "fi": "nainen ajaa polkupyörällä joen vartta pitkin illalla",
    "none": "12-34 !!",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "in", 3) as writer:
        for key, caption in CAPTIONS.items():
            writer.add(key, b"x", "jpg", [caption])
    return tmp_path / "in"


def test_py3langid_tells_languages_that_the_rough_guess_does_not(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--languages", "fi,en", "--language-model", "py3langid"]
    call(filtering, source, "--to", tmp_path / "out", *options)
    assert list(read(tmp_path / "out")) == ["en", "fi", "none"]
    out = capsys.readouterr().out
    assert counted(out, "captions dropped: another language") == 3
    assert counted(out, "captions kept: language unclear (--unclear drop refuses them)") == 1

    strict = [*options, "--min-probability", "0.999999", "--unclear", "drop"]
    with pytest.raises(ValueError, match=r"no sample of .* is left"):
        call(filtering, source, "--to", tmp_path / "none", *strict)
    assert counted(capsys.readouterr().out, "captions dropped: language unclear") > 1


class FastText:
    """The part of fasttext's interface that is used: labels, and the likeliest with its
    probability.
    """

    def get_labels(self) -> list[str]:
        return ["__label__en", "__label__fi"]

    def predict(self, text: str) -> tuple[tuple[str, ...], list[float]]:
        assert "\n" not in text, "fastText refuses it"
        if not text:
            return (), []
        return ("__label__fi" if "ö" in text else "__label__en",), [0.75]


def test_fasttext_s_labels_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package has no wheel: its interface stands in for it."""
    module: Any = types.ModuleType("fasttext")
    module.load_model = lambda path: FastText()
    monkeypatch.setitem(sys.modules, "fasttext", module)
    (tmp_path / "lid.bin").write_bytes(b"x")
    options = ["--languages", "fi", "--language-model", tmp_path / "lid.bin"]
    call(filtering, source, "--to", tmp_path / "out", *options, "--min-probability", "0.7")
    assert list(read(tmp_path / "out")) == ["fi", "none"]
    identifier = Identifier(str(tmp_path / "lid.bin"), 0.8)
    assert identifier.is_in("a\ndög", ("fi",)) is None
    assert identifier.is_in("a dög", ("fi", "unclear")) is True
    with pytest.raises(ValueError, match="does not know de; it tells apart en, fi, unclear"):
        identifier.check(("de",))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--language-model", "py3langid"], "belong to --languages CODES"),
        (["--languages", "en", "--min-probability", 0.5], "the rough guess gives none"),
        (["--languages", "en", "--language-model", "lid.txt"], "expected rough, py3langid or FILE"),
        (["--languages", "en", "--language-model", "none.bin"], "there is no such file"),
        (["--languages", "en", "--language-model", "{}/x.bin"], "fasttext is not installed; inst"),
        (["--languages", "tlh", "--language-model", "py3langid"], "does not know tlh; it tells"),
        (
            ["--languages", "en", "--language-model", "py3langid", "--min-probability", 1],
            r"--min-probability 1 must lie in \[0, 1\)",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "fasttext", None)  # as where it is not installed
    (tmp_path / "x.bin").write_bytes(b"x")
    options = [str(option).format(tmp_path) for option in options]
    with pytest.raises(ValueError, match=message):
        call(filtering, source, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_missing_extras_are_named_with_the_line_that_installs_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlp.data_tools.filter import languages, spotting

    languages._load.cache_clear()
    spotting._load.cache_clear()
    for name in ("py3langid", "py3langid.langid", "rapidocr_onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for options in (
        ["--languages", "en", "--language-model", "py3langid"],
        ["--ocr", "rapidocr", "--ocr-field", "t"],
    ):
        with pytest.raises(ValueError, match=r"not installed; install it with pip install 'vlp\["):
            call(filtering, source, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
