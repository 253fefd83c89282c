"""Which texts belong to which picture: a folder of files, a tar of them as shards, and the same tar
as webdataset streams it say the same.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from tests.data_tools.tools import call
from vlp.config import Captions
from vlp.data.sources import folder, shards, webdataset
from vlp.data_tools import validate

# Files beside one another -> the captions by picture (its name without extension).
LAYOUTS = [
    (["1.jpg", "1.txt"], {"1": "1.txt"}),
    (["1.jpg", "1.jpg.txt"], {"1": "1.jpg.txt"}),
    (["1.JPG", "1.JPG.txt"], {"1": "1.JPG.txt"}),
    (["1.JPG", "1.jpg.txt"], {"1": "1.jpg.txt"}),
    (["1.jpg", "1.jpg.json", "2.jpg", "2.jpg.json"], {"1": "1.jpg.json", "2": "2.jpg.json"}),
    (["1.jpg", "1.txt", "1.jpg.txt"], {"1": "1.txt"}),
    (["1.jpg", "1.txt", "1.jpg.json"], {"1": "1.jpg.json"}),
    (["1.v2.jpg", "1.v2.jpg.txt"], {"1.v2": "1.v2.jpg.txt"}),
    (["1.jpg.jpg", "1.jpg.txt"], {"1.jpg": "1.jpg.txt"}),
    (["1.jpg", "1.txt", "1.jpg.png", "1.jpg.txt"], {"1": "1.txt", "1.jpg": "1.jpg.txt"}),
    (["1.png", "1.txt", "1.jpg.txt"], {"1": "1.txt"}),
    (["a/1.jpg", "a/1.jpg.txt", "b/1.jpg", "b/1.txt"], {"a/1": "a/1.jpg.txt", "b/1": "b/1.txt"}),
]


def content(name: str) -> bytes:
    if name.endswith(".json"):
        return f'{{"caption": "{name}"}}'.encode()
    if name.endswith(".txt"):
        return name.encode()
    return encoded(picture(1), "PNG" if name.endswith("png") else "JPEG")


def captions_of(source, n: int) -> dict[str, str]:
    samples = [source[i] for i in range(n)]
    return {sample.key: " | ".join(sample.captions) for sample in samples}


@pytest.mark.parametrize(("names", "expected"), LAYOUTS)
def test_a_text_belongs_to_the_same_picture_in_folders_and_in_shards(tmp_path, names, expected):
    root = tmp_path / "files"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(name))
    files = folder.open(folder.Options(path=str(root)), Captions())
    assert captions_of(files, len(files)) == expected

    orders = [names, names[::-1], sorted(names), random.Random(1).sample(names, len(names))]
    for number, order in enumerate(orders):
        path = write_tar(tmp_path / f"{number}.tar", [(name, content(name)) for name in order])
        source = shards.open(shards.Options(path=str(path)), Captions())
        assert captions_of(source, len(source)) == expected, order
    assert number == 3


def test_webdataset_gives_a_text_by_the_whole_name_to_its_picture(tmp_path):
    names = ["1.jpg", "1.jpg.txt", "2.JPG", "2.jpg.txt", "3.jpg", "3.txt", "3.jpg.txt"]
    path = write_tar(tmp_path / "0.tar", [(name, content(name)) for name in names])
    options = webdataset.Options(urls=str(path), samples=3)
    expected = {"1": "1.jpg.txt", "2": "2.jpg.txt", "3": "3.txt"}
    assert captions_of(webdataset.open(options, Captions()), 3) == expected


def test_a_text_that_no_picture_takes_is_counted(tmp_path: Path, capsys):
    names = ["1.jpg", "1.txt", "1.jpg.txt", "2.png", "2.txt", "2.jpg.txt"]
    path = write_tar(tmp_path / "0.tar", [(name, content(name)) for name in names])
    problems = loader_of(data_of(path), 2).problems()
    assert "2 × members .jpg.txt" in problems[0]
    call(validate, path)
    assert "members .jpg.txt" in capsys.readouterr().out
