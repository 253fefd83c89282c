"""Which texts belong to which picture: sources, `pack`, `validate` and evaluation say the same of a
folder of files and of a tar of them.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import tarfile
import time
from pathlib import Path

import pytest

from tests.data.folder_material import pack
from tests.data.folder_material import packed as read
from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from tests.data_tools.tools import call
from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.captions import read_texts
from vlp.data.loose_texts import owners
from vlp.data.scan import scan
from vlp.data.sources import folder, shards, webdataset
from vlp.data_tools import validate
from vlp.eval.datasets import open_source
from vlp.eval.pictures import DataError
from vlp.eval.tasks.retrieval import with_captions

# Files beside one another -> the captions by picture (its name without extension).
LAYOUTS = [
    (["1.jpg", "1.txt"], {"1": "1.txt"}),
    (["1.jpg", "1.text", "2.jpg", "2.caption"], {"1": "1.text", "2": "2.caption"}),
    (["1.jpg", "1.caption", "1.txt"], {"1": "1.txt"}),
    (["1.JPG", "1.CAPTION", "2.JPG", "2.TXT"], {"1": "1.CAPTION", "2": "2.TXT"}),
    (["1.jpg", "1.jpg.txt"], {"1": "1.jpg.txt"}),
    (["1.jpg", "1.jpg.caption"], {"1": "1.jpg.caption"}),
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
    (["1.jpg ", "1.txt "], {"1": "1.txt"}),
    # Usual fields of a JSON.
    (["1.jpg", "1.json"], {"1": "1.json"}),
    (
        ["text/1.jpg", "text/1.json", "title/1.jpg", "title/1.json"],
        {"text/1": "text/1.json", "title/1": "title/1.json"},
    ),
    (["ALT_TEXT/1.jpg", "ALT_TEXT/1.json"], {"ALT_TEXT/1": "ALT_TEXT/1.json"}),
    # Endings that say what they are.
    (["1.jpg", "1.caption.txt"], {"1": "1.caption.txt"}),
    (["1.jpg", "1.txt", "1.caption.txt", "2.jpg", "2.Text.txt"], {"1": "1.txt", "2": "2.Text.txt"}),
    # Another case, or another composition of the same letters.
    (["IMG_1.JPG", "img_1.TXT"], {"IMG_1": "img_1.TXT"}),
    (["A.jpg", "a.jpg", "a.txt", "A.txt"], {"A": "A.txt", "a": "a.txt"}),
    (["caf\u00e9.jpg", "cafe\u0301.txt"], {"caf\u00e9": "cafe\u0301.txt"}),
    # Folders of images beside folders of texts.
    (["images/1.jpg", "texts/1.txt"], {"images/1": "texts/1.txt"}),
    (["images/IMG_1.JPG", "texts/img_1.caption"], {"images/IMG_1": "texts/img_1.caption"}),
    (["images/x y/1.jpg", "text/x y/1.txt"], {"images/x y/1": "text/x y/1.txt"}),
    (["s/images/1.jpg", "s/captions/1.json"], {"s/images/1": "s/captions/1.json"}),
    (
        ["0/images/1.jpg", "0/texts/1.txt", "1/images/1.jpg", "1/texts/1.txt"],
        {"0/images/1": "0/texts/1.txt", "1/images/1": "1/texts/1.txt"},
    ),
    # What systems leave behind.
    (["1.jpg", "1.txt", "._1.jpg", "._1.txt", "__MACOSX/1.jpg", "Thumbs.db"], {"1": "1.txt"}),
]


def content(name: str) -> bytes:
    if name.lower().endswith(".json"):
        # Beside what is no caption, under the name of its folder.
        folder_name = name.rpartition("/")[0]
        field = folder_name if folder_name in ("text", "title", "ALT_TEXT") else "caption"
        return json.dumps({"url": "http://x", "key": "7", field: name}).encode()
    if name.lower().rstrip().endswith((".txt", ".text", ".caption")):
        return name.rstrip().encode()
    return encoded(picture(1), "PNG" if name.endswith("png") else "JPEG")


def captions_of(source, n: int) -> dict[str, str]:
    samples = [source[i] for i in range(n)]
    return {sample.key: " | ".join(sample.captions) for sample in samples}


def trained(path: Path) -> dict[str, str]:
    source = shards.open(shards.Options(path=str(path)), Captions())
    return captions_of(source, len(source))


def evaluated(path: Path) -> dict[str, str]:
    records = open_source(str(path)).records
    captions = {}
    for record in records:
        name = record.picture.name.removeprefix(str(path)).lstrip(":/")
        captions[os.path.splitext(name)[0]] = " | ".join(record.captions)
    return captions


def streamed(path: Path, n: int) -> dict[str, str]:
    return captions_of(
        webdataset.open(webdataset.Options(urls=str(path), samples=n), Captions()), n
    )


def packed(path: Path, to: Path) -> dict[str, str]:
    assert pack(path, "--to", to) == 0
    return {os.path.splitext(sample.meta["image"])[0]: sample.captions[0] for sample in read(to)}


@pytest.mark.parametrize(("names", "expected"), LAYOUTS)
def test_a_text_belongs_to_the_same_picture_wherever_it_is_read(tmp_path, names, expected):
    root = tmp_path / "files"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(name))
    files = folder.open(folder.Options(path=str(root)), Captions())
    assert captions_of(files, len(files)) == expected
    assert evaluated(root) == expected
    assert packed(root, tmp_path / "of files") == expected

    # As members of a tar, in any order.
    orders = [names, names[::-1], sorted(names), random.Random(1).sample(names, len(names))]
    for number, order in enumerate(orders):
        path = write_tar(tmp_path / f"{number}.tar", [(name, content(name)) for name in order])
        assert trained(path) == expected, order
        assert evaluated(path) == expected, order
        # webdataset joins these two at their first dot, and says so.
        if "1.jpg.png" not in names:
            assert streamed(path, len(expected)) == expected, order
    assert number == 3
    assert packed(path, tmp_path / "of a tar") == expected
    assert call(validate, path) == 0

    in_tar = folder.open(folder.Options(path=str(path)), Captions())
    assert captions_of(in_tar, len(in_tar)) == expected


# Files beside one another that are refused -> what the folder's refusal and the tar's name.
REFUSED = [
    (["1.jpg", "1.vtt", "2.jpg", "2.vtt"], r"2 \.vtt", r"2 × members \.vtt"),
    (["1.jpg", "1.en.txt", "1.de.txt"], r"1\.de\.txt, 1\.en\.txt", r"1 × members \.en\.txt"),
    (["i/1.jpg", "en/1.txt", "de/1.txt"], r"as de/1\.txt for i/1\.jpg", r"2 keys have no image"),
    (["1.jpg", "texts/1.txt"], r"as texts/1\.txt for 1\.jpg", r"tar: texts/1\): call each text as"),
    (["c/1.jpg", "d/1.jpg", "t/1.txt"], r"as t/1\.txt for d/1\.jpg", r"1 keys have no image"),
    (["c/1.jpg", "d/2.jpg", "d/3.jpg", "n/2.txt"], r"as n/2\.txt", r"1 keys have no image"),
    (["c/1.jpg", "d/2.jpg", "t/1.txt", "t/2.txt"], r"as t/1\.txt", r"2 keys have no image"),
    (["i/1.jpg", "Licenses/1.txt"], r"as Licenses/1\.txt for i/1", r"1 keys have no image"),
    (["IMG.jpg", "img.jpg", "Img.txt"], r"Img\.txt", r"1 keys have no image"),
    (["c/1.jpg", "c/1.txt", "d/1.jpg", "t/1.txt"], r"t/1\.txt", r"1 keys have no image"),
    (["a/1.jpg", "b/2.jpg", "b/2.txt", "c/1.txt", "c/3.jpg"], "c/1.txt", r"1 keys have no image"),
]


@pytest.mark.parametrize(("names", "of_folder", "of_tar"), REFUSED)
def test_what_fits_no_picture_for_certain_is_named(tmp_path, names, of_folder, of_tar, capsys):
    root = tmp_path / "files"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(name))
    path = write_tar(tmp_path / "0.tar", [(name, content(name)) for name in names])
    with pytest.raises(ValueError, match=of_folder):
        folder.open(folder.Options(path=str(root)), Captions())
    with pytest.raises(DataError, match=of_folder):
        open_source(str(root))
    assert pack(root, "--to", tmp_path / "out") == 1
    assert re.search(of_folder, capsys.readouterr().err)

    with pytest.raises(ValueError, match=of_tar):
        trained(path)
    assert call(validate, path) == 1


def test_a_text_that_no_picture_takes_is_counted(tmp_path: Path, capsys):
    names = ["1.jpg", "1.txt", "1.jpg.txt", "2.png", "2.txt", "2.jpg.txt"]
    path = write_tar(tmp_path / "0.tar", [(name, content(name)) for name in names])
    problems = loader_of(data_of(path), 2).problems()
    assert "2 × members .jpg.txt" in problems[0]
    call(validate, path)
    assert "members .jpg.txt" in capsys.readouterr().out


def test_evaluation_names_the_members_that_are_no_captions(tmp_path):
    names = ["1.jpg", "1.vtt", "2.jpg", "2.vtt"]
    write_tar(tmp_path / "0.tar", [(name, content(name)) for name in names])
    with pytest.raises(DataError, match=r"none of the 2 images .*nobody reads 2 × members \.vtt"):
        with_captions(open_source(str(tmp_path)), "it", "error")


def test_boxes_of_a_detector_are_no_captions(tmp_path, capsys):
    boxes = b"0 0.5 0.5 0.25 0.125\n12 0.1 0.2 1 .3\n"
    members = [("images/1.jpg", content("1.jpg")), ("labels/1.txt", boxes)]
    root = tmp_path / "files"
    for name, data in members:
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot be used: a \.txt of boxes"):
        folder.open(folder.Options(path=str(root)), Captions())
    path = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"nobody reads 1 × a \.txt of boxes"):
        trained(path)
    with pytest.raises(ValueError, match=r"no caption among the members .*; a \.txt of boxes"):
        streamed(path, 1)

    # Beside a caption they cost nothing, and are counted.
    members += [("images/1.json", content("a dog.json"))]
    path = write_tar(tmp_path / "1.tar", [*members[:1], ("images/1.txt", boxes), members[2]])
    assert trained(path) == {"images/1": "a dog.json"}
    assert call(validate, path) == 0 and "1 × a .txt of boxes" in capsys.readouterr().out


NO_CAPTIONS = [
    ("boxes", "0 0.5 0.5 0.25 0.125 0.93"),
    ("boxes", "0.0 -0.01 0.5 0.25 1.02"),
    ("boxes", "0 0.5 0.5 0.25 0.125\r\n\r\n 1 0.5 0.5 0.25 0.125\r\n"),
    ("boxes", "dog 0.5 0.5 0.25 0.125\ncat 0.5 0.5 0.25 0.125"),
    ("boxes", "0 120 45 200 300\n3 10 10 50 80"),
    ("boxes", "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59"),
    (
        "boxes",
        "imagesource:GoogleEarth\ngsd:0.1\n2753.0 2408.0 2861.0 2385.0 2888 24 28 25 plane 0",
    ),
    (
        "boxes",
        "377,117,463,117,465,130,378,130,Genaxis Theatre\n493,115,519,115,519,131,493,131,[06]",
    ),
    ("boxes", '38, 43, 920, 215, "Tiredness"'),
    ("subtitles", "WEBVTT\n\n00:00.000 --> 00:02.000\nhello"),
    ("subtitles", "1\n00:00:00,000 --> 00:00:02,000\nhello"),
]
CAPTIONS = [
    *("3 dogs, 2 cats", "1 2 3 4 5", "0.5 0.5 0.25 0.125", "7 0.5 0.5 0.25 0.125 m", "1 0 1 1 0"),
    *("1, 2, 3, 4, 5 frogs", "Sofa 200 90 80 75", "imagesource:me", "a --> b", "7"),
    "0 0.5 0.5 0.25 0.125\na dog",
]


def test_what_detectors_and_players_read_is_no_caption():
    for content, text in NO_CAPTIONS:
        read = read_texts({"caption": text.encode()})
        assert (read.captions, read.spare) == ((), [f"a .caption of {content}"]), text
    for text in CAPTIONS:
        assert read_texts({"txt": text.encode()}).captions == (text,)
    assert len(NO_CAPTIONS) == 11 and len(CAPTIONS) == 11


def test_texts_in_tars_of_their_own_are_told_of_and_read_once_joined(tmp_path):
    parts = []
    for ending in ("jpg", "txt"):
        names = [f"{i}.{ending}" for i in range(3)]
        path = tmp_path / ending / "0.tar"
        parts.append(write_tar(path, [(name, content(name)) for name in names]))
    with pytest.raises(ValueError, match=r"3 keys have no image in their tar .*cat a/0\.tar"):
        trained_on = "::".join(map(str, parts))
        shards.open(shards.Options(path=trained_on), Captions())

    joined = tmp_path / "both" / "0.tar"
    joined.parent.mkdir()
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert trained(joined) == {str(i): f"{i}.txt" for i in range(3)}


def test_what_a_tar_holds_twice_or_as_a_link_is_counted_by_every_reader(tmp_path, capsys):
    names = ["1.jpg", "1.txt", "dir\\2.jpg", "dir\\2.txt"]
    path = write_tar(tmp_path / "0.tar", [(name, content(name)) for name in names])
    with tarfile.open(path, "a") as tar:
        again = tarfile.TarInfo("1.txt")
        again.size = 5
        tar.addfile(again, io.BytesIO(b"1.txt"))
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
        sparse = tarfile.TarInfo("GNUSparseFile.0/4.jpg")
        sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "4.jpg"}
        tar.addfile(sparse)

    expected = {"1": "1.txt", "dir/2": "dir\\2.txt"}
    archive = Archive(path)
    assert captions_of(folder.open(folder.Options(path=str(path)), Captions()), 2) == expected
    assert archive.left_out.counts == {
        "further members of the same name": 1,
        "links (tar --hard-dereference stores the files)": 1,
        "sparse files": 1,
    }
    assert scan(path).left_out == {
        "a second text of this key": 1,
        "links (tar --hard-dereference stores the files)": 1,
        "sparse files": 1,
    }


def test_many_images_of_one_name_cost_no_quadratic_time():
    pictures = {f"{i}/image": frozenset[str]() for i in range(20_000)}
    started = time.process_time()
    assert owners(pictures, [(f"t{i}/image", "txt") for i in range(20_000)]) == {}
    assert time.process_time() - started < 5
