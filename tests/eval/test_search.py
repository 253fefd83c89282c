"""Pictures embedded once and asked: what is listed, what is embedded again, what is found."""

import fcntl
import json
import os
import shutil
import socket
import tarfile

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from tests.eval.material import direction, known_encoder, picture, png
from vlp.cli import main
from vlp.eval.embed import Context
from vlp.eval.pictures import DataError
from vlp.eval.search import ask, coded, library, nearest
from vlp.eval.search.listing import pictures_in

QUIET = Context(batch=4, workers=0)


@pytest.fixture
def photos(tmp_path):
    """Seven pictures in folders, two of one name, one with blanks, and two in a tar."""
    folder = tmp_path / "my photos"
    for number, name in enumerate(["a.png", "b/a.png", "b/red ball.png", "ü/c.png", "d.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(number)))
    for name, numbers in (("one", (5,)), ("two", (6,))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in numbers:
                file = tmp_path / "0.png"
                file.write_bytes(png(picture(number)))
                tar.add(file, "0.png")
    return folder


def counting_encoder(name="known", fingerprint="f"):
    """Texts are the numbers of pictures; which pictures were embedded is written down."""
    seen: list[int] = []

    def image(number):
        seen.append(number)
        return direction(number)

    encoder = known_encoder(
        image, lambda text: direction(int(text) if text.isdigit() else text), name
    )
    object.__setattr__(encoder, "fingerprint", fingerprint)
    return encoder, seen


def found(opened, encoder, text, top=1):
    return [match.picture.name for match in ask.nearest(opened, encoder.encode_texts([text]), top)]


def test_each_picture_is_found_by_what_it_shows(photos, tmp_path):
    encoder, seen = counting_encoder()
    pictures = pictures_in(str(photos))
    assert len(pictures) == 7
    opened = library.update(tmp_path / "library", encoder, pictures, QUIET)

    assert sorted(seen) == list(range(7))
    names = [found(opened, encoder, str(number))[0] for number in range(7)]
    assert [name.removeprefix(f"{photos}/") for name in names] == [
        "a.png", "b/a.png", "b/red ball.png", "ü/c.png", "d.png", "one.tar/0.png", "two.tar/0.png",
    ]  # fmt: skip
    assert len(found(opened, encoder, "3", top=100)) == 7


def test_only_what_is_new_or_has_changed_is_embedded_again(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "PART", 2)
    encoder, seen = counting_encoder()
    folder = tmp_path / "library"
    library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    seen.clear()
    library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    assert seen == []

    (photos / "new.png").write_bytes(png(picture(9)))
    (photos / "d.png").write_bytes(png(picture(300, size=(9, 9))))
    (photos / "a.png").unlink()
    opened = library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    assert sorted(seen) == [9, 300]
    assert len(opened.pictures) == 7
    assert found(opened, encoder, "300") == [str(photos / "d.png")]
    everything = found(opened, encoder, "0", top=100)
    assert str(photos / "a.png") not in everything and len(everything) == 7


def test_a_call_that_was_stopped_goes_on(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "PART", 2)
    encoder, seen = counting_encoder()
    folder = tmp_path / "library"
    writes = []
    write = library.write_atomically

    def stops(path, data):
        if path.suffix == ".safetensors":
            writes.append(path)
            if len(writes) == 3:
                raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(library, "write_atomically", stops)
    with pytest.raises(KeyboardInterrupt):
        library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    assert len(seen) == 6

    monkeypatch.setattr(library, "write_atomically", write)
    seen.clear()
    opened = library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    assert len(seen) == 3
    assert len(opened.pictures) == 7


def test_pictures_that_do_not_open_are_named_and_never_found(photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"no picture")
    encoder, _ = counting_encoder()
    opened = library.update(tmp_path / "library", encoder, pictures_in(str(photos)), QUIET)
    assert opened.unreadable == [str(photos / "broken.png")]
    assert "broken.png" in capsys.readouterr().err
    assert len(found(opened, encoder, "1", top=100)) == 7


def test_a_damaged_part_is_made_again(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "PART", 2)
    encoder, seen = counting_encoder()
    folder = tmp_path / "library"
    library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    part = sorted((folder / "parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:40])
    seen.clear()
    opened = library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    assert len(seen) in (1, 2)
    assert len(opened.pictures) == 7


def test_wrong_collections_and_folders_are_refused(photos, tmp_path):
    encoder, _ = counting_encoder()
    folder = tmp_path / "library"
    library.update(folder, encoder, pictures_in(str(photos)), QUIET)
    other, _ = counting_encoder("other", fingerprint="g")
    with pytest.raises(DataError, match="known and not of other"):
        library.update(folder, other, pictures_in(str(photos)), QUIET)

    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"letter\.txt and is no library"):
        library.update(strange, encoder, pictures_in(str(photos)), QUIET)
    with pytest.raises(DataError, match="holds no picture"):
        pictures_in(str(strange))
    with pytest.raises(DataError, match="no pictures at"):
        pictures_in(str(tmp_path / "nothing"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no")
    with pytest.raises(DataError, match="not one of 1 pictures opens"):
        library.update(tmp_path / "of_broken", encoder, pictures_in(str(broken)), QUIET)


def test_an_index_of_faiss_finds_the_same(photos, tmp_path, monkeypatch):
    for number in range(20, 120):
        (photos / f"{number}.png").write_bytes(png(picture(number)))
    encoder, _ = counting_encoder()
    opened = library.update(tmp_path / "library", encoder, pictures_in(str(photos)), QUIET)
    exact = [found(opened, encoder, str(number), 3) for number in range(20, 60)]

    monkeypatch.setattr(nearest, "EXACT_UP_TO", 50)
    monkeypatch.setattr(nearest, "LISTS_SEARCHED", 1000)
    indexed = [found(opened, encoder, str(number), 3) for number in range(20, 60)]
    assert indexed == exact
    assert len(list((tmp_path / "library").glob("*.faiss"))) == 1


def of_another_call(path):
    """Hold a lock as another process does, with its name in it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": "vlp x", "since": 0}
    os.write(descriptor, json.dumps(owner).encode())
    return descriptor


def test_one_call_builds_the_index_and_the_other_searches_without(
    photos, tmp_path, monkeypatch, capsys
):
    for number in range(20, 80):
        (photos / f"{number}.png").write_bytes(png(picture(number)))
    monkeypatch.setattr(nearest, "EXACT_UP_TO", 50)
    monkeypatch.setattr(nearest, "LISTS_SEARCHED", 1000)
    encoder, _ = counting_encoder()
    folder = tmp_path / "library"

    def opened_and_asked():
        opened = library.update(folder, encoder, pictures_in(str(photos)), QUIET)
        return lambda: [found(opened, encoder, str(number))[0] for number in (20, 50)]

    expected = [str(photos / "20.png"), str(photos / "50.png")]
    ask_it = opened_and_asked()
    descriptor = of_another_call(folder / ".lock")
    assert ask_it() == expected and not list(folder.glob("*.faiss"))
    assert "searching exactly, which takes long" in capsys.readouterr().out
    os.close(descriptor)

    # What a killed call left goes; a damaged index is built again.
    (folder / ".0.faiss.0123456789ab.tmp").write_bytes(b"")
    assert opened_and_asked()() == expected
    (index,) = folder.glob("*.faiss")
    whole = index.stat().st_size
    index.write_bytes(b"no index")
    assert opened_and_asked()() == expected and index.stat().st_size == whole
    assert "is damaged" in capsys.readouterr().err
    assert not list(folder.glob(".*.tmp"))


def test_two_writers_of_one_file_do_not_meet(small_world, tmp_path, capsys):
    texts, to = tmp_path / "texts.txt", tmp_path / "rows.npy"
    texts.write_text("a thing\n")
    descriptor = of_another_call(tmp_path / ".rows.npy.lock")
    command = ["embed", str(small_world["run"]), "--texts", str(texts), "--to", str(to)]
    assert main(command) == 1
    assert "is in use by 'vlp x'" in capsys.readouterr().err and not to.exists()
    os.close(descriptor)
    (tmp_path / ".rows.npy.lock").unlink()
    assert main(command) == 0 and sorted(p.name for p in tmp_path.iterdir()) == [
        "rows.names.jsonl",
        "rows.npy",
        "texts.txt",
    ]


def test_the_commands(small_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    names = [f"{number}.png" for number in range(6)]
    sources = [file for file in small_world["pictures"].iterdir() if file.suffix == ".png"]
    for name, source in zip(names, sorted(sources), strict=False):
        shutil.copy(source, pictures / name)
    run, page = str(small_world["run"]), tmp_path / "out" / "found.html"

    # A picture is nearest to itself.
    example = str(pictures / "3.png")
    command = ["search", run, str(pictures), "a thing", "--image", example, "--top", "2"]
    assert main([*command, "--html", str(page), "--json", str(tmp_path / "found.json")]) == 0
    answers = json.loads((tmp_path / "found.json").read_text())
    assert [answer["query"] for answer in answers] == [example, "a thing"]
    assert answers[0]["matches"][0]["picture"] == example
    assert answers[0]["matches"][0]["score"] == pytest.approx(1, abs=2e-3)
    assert page.read_text().count("data:image/webp") == 5
    assert "http" not in page.read_text().replace("http-equiv", "")
    assert "a thing" in capsys.readouterr().out

    # What `vlp embed` writes are the same rows, under the same names.
    for kind in ("npy", "parquet"):
        assert main(["embed", run, str(pictures), "--to", str(tmp_path / f"rows.{kind}")]) == 0
    rows = np.load(tmp_path / "rows.npy")
    listed = [json.loads(line) for line in (tmp_path / "rows.names.jsonl").open()]
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert listed == table["name"].to_pylist()
    assert sorted(listed) == [str(pictures / name) for name in names]
    np.testing.assert_array_equal(rows, np.stack(table["embedding"].to_pylist()))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)

    texts = tmp_path / "texts.txt"
    texts.write_text("a thing\nanother\u2028thing\x0c\n", encoding="utf-8")
    assert main(["embed", run, "--texts", str(texts), "--to", str(tmp_path / "texts.npy")]) == 0
    assert np.load(tmp_path / "texts.npy").shape == (2, rows.shape[1])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["search", "none", "nowhere", "x"], "no pictures at nowhere"),
        (["search", "none", "{photos}", "x", "--top", "0"], "--top is 0"),
        (["search", "none", "{photos}", "x", "--image", "no.jpg"], "no such file"),
        (["search", "none", "{photos}", "x", "--html", "{photos}"], "is a folder"),
        (["embed", "none", "{photos}", "--to", "rows.csv"], "ends in .npy or .parquet"),
        (["embed", "none", "--to", "rows.npy"], "either PHOTOS or --texts"),
        (["embed", "none", "--texts", "no.txt", "--to", "rows.npy"], "cannot be read"),
    ],
)
def test_what_is_mistyped_is_answered_before_a_model_is_loaded(photos, command, message, capsys):
    command = [part.format(photos=photos) for part in command]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_rows_are_compared_in_blocks():
    rows = torch.nn.functional.normalize(torch.randn(50, 8), dim=1).numpy()
    query = torch.nn.functional.normalize(torch.randn(3, 8), dim=1).numpy()
    blocks = [(first, rows[first : first + 7]) for first in range(0, 50, 7)]
    scores, numbers = nearest.exact(query, blocks, np.full(3, -1), 5)
    expected = np.sort(query @ rows.T, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    np.testing.assert_allclose((query @ rows.T)[np.arange(3)[:, None], numbers], scores, rtol=1e-5)


# --- a byte or a bit a number ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_stored_rows_find_what_floats_find(kind, photos, tmp_path, monkeypatch):
    """All rescored: the same pictures with the same cosines, over several parts and blocks, beside
    a picture that does not open.
    """
    monkeypatch.setattr(library, "PART", 3)
    monkeypatch.setattr(coded, "_BLOCK", 2)
    (photos / "broken.png").write_bytes(b"no picture")
    encoder, _ = counting_encoder()
    opened = library.update(tmp_path / "library", encoder, pictures_in(str(photos)), QUIET)

    n_compared = 0
    for text in "0123456":
        query = encoder.encode_texts([text])
        for top in (1, 3, 100):
            whole = ask.nearest(opened, query, top)
            stored = ask.nearest(opened, query, top, ask.Stored(kind, rescore=7))
            assert [match.picture for match in stored] == [match.picture for match in whole]
            np.testing.assert_allclose(
                [match.score for match in stored], [match.score for match in whole], atol=1e-6
            )
            n_compared += 1
    assert n_compared == 21


def test_only_the_listed_are_compared_as_floats(photos, tmp_path):
    """rescore 1: of the best k by bits, ordered by float; a definition by hand."""
    encoder, _ = counting_encoder()
    opened = library.update(tmp_path / "library", encoder, pictures_in(str(photos)), QUIET)
    rows = np.concatenate([rows for _, rows in opened.blocks()]).astype(np.float32)
    query = encoder.encode_texts(["3"])
    agree = ((rows > 0) == (query.numpy() > 0)).sum(1)

    matches = ask.nearest(opened, query, 4, ask.Stored("binary", rescore=1))
    numbers = {picture: number for number, picture in opened.pictures.items()}
    listed = [numbers[match.picture] for match in matches]
    assert sorted(agree[listed]) == sorted(agree)[-4:]
    scores = [match.score for match in matches]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, (rows @ query.numpy()[0])[listed], atol=1e-6)


def test_stored_rows_are_kept_for_what_the_library_holds(photos, tmp_path, capsys):
    encoder, _ = counting_encoder()
    folder = tmp_path / "library"

    def search():
        opened = library.update(folder, encoder, pictures_in(str(photos)), QUIET)
        names = found_as(opened, encoder, "9", "int8")
        return names, sorted(path.name for path in folder.glob("*.int8.safetensors"))

    _, kept = search()
    assert len(kept) == 1 and search()[1] == kept
    (photos / "new.png").write_bytes(png(picture(9)))
    names, grown = search()
    assert len(grown) == 1 and grown != kept and names == [str(photos / "new.png")]

    (folder / grown[0]).write_bytes(b"torn")
    capsys.readouterr()
    assert search() == (names, grown)
    assert "is damaged" in capsys.readouterr().err


def found_as(opened, encoder, text, kind):
    matches = ask.nearest(opened, encoder.encode_texts([text]), 1, ask.Stored(kind))
    return [match.picture.name for match in matches]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rescore", "2"], "--rescore belongs to --stored-as"),
        (["--stored-as", "int8", "--rescore", "0"], "--rescore is 0; expected at least 1"),
    ],
)
def test_rescoring_of_nothing_is_refused(options, message, photos, tmp_path, capsys):
    assert main(["search", str(tmp_path / "absent"), str(photos), "a", *options]) != 0
    assert message in capsys.readouterr().err
