"""Retrieval in several languages from each published layout, tiny."""

import json
from dataclasses import replace

import pytest
import torch

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation, pictures
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError

N = 4


def crossmodal(folder):
    rows = []
    for i in range(N):
        put(folder / "images" / f"k{i}.jpg", i)
        rows.append({"image/key": f"k{i}", "de": {"caption": [f"de {i}", f"auch {i}"]}})
        # Swahili's captions are those of the next image.
        rows[-1]["sw"] = {"caption": [f"sw {(i + 1) % N}"]}
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def xtd(folder):
    for i in range(N):
        put(folder / "images" / f"COCO_{i}.jpg", i)
    names = "\n".join(f"COCO_{i}.jpg" for i in range(N))
    (folder / "XTD10").mkdir()
    (folder / "XTD10" / "test_image_names.txt").write_text(names)
    (folder / "MIC").mkdir()
    for place, language, shift in (("MIC", "de", 0), ("XTD10", "sw", 1)):
        lines = "\n".join(f"text {(i + shift) % N}" for i in range(N))
        (folder / place / f"test_1kcaptions_{language}.txt").write_text(lines)


def flores(folder):
    for i in range(N):
        put(folder / "images" / f"{i}.jpg", i)
    (folder / "filenames.txt").write_text("\n".join(f"{i}.jpg" for i in range(N)))
    for code, shift in (("deu_Latn", 0), ("swh_Latn", 1)):
        # U+2028 ends no line.
        lines = [f"text\u2028 {(i + shift) % N}" for i in range(N)]
        (folder / f"{code}.txt").write_text("\n".join(lines), encoding="utf-8")


def tables(folder):
    for i in range(N):
        put(folder / f"{i}.jpg", i)
    for language, shift in (("de", 0), ("sw", 1)):
        content = {
            "image_paths": [f"{i}.jpg" for i in range(N)],
            "annotations": [f"t {(i + shift) % N}" for i in range(N)],
        }
        (folder / f"multilingual_mscoco-{language}.json").write_text(json.dumps(content))


def put(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(material.png(material.picture(number)))


def knows() -> material.Encoder:
    """Picture n is near every text that ends in n."""
    return material.known_encoder(
        lambda n: material.direction(n),
        lambda text: material.direction(int(text.split()[-1])),
    )


def evaluate(**options):
    chosen = plugin.keyed("vlp.eval.tasks", {"multilingual": options})
    return evaluation.evaluate(knows(), chosen, Context(workers=0, contents=Contents()))[0][0]


@pytest.mark.parametrize("write", [crossmodal, xtd, tables, flores])
def test_every_language_is_scored_and_their_mean(tmp_path, write):
    write(tmp_path)
    record = evaluate(data=str(tmp_path))
    scores = record["metrics"]
    german, swahili = ("deu_Latn", "swh_Latn") if write is flores else ("de", "sw")
    for way in ("image", "text"):
        assert scores[f"{german}_{way}_retrieval_recall@1"] == 1
        assert scores[f"{swahili}_{way}_retrieval_recall@1"] == 0
        assert scores[f"mean_{way}_retrieval_recall@1"] == 1 / 2
        assert record["chance"][f"mean_{way}_retrieval_recall@1"] > 0
    assert scores.keys() == record["chance"].keys()
    assert record["counts"]["languages"] == 2 and record["counts"]["images"] == N
    assert record["language"] == "multilingual"

    only = evaluate(data=str(tmp_path), languages=[german], captions_per_image=1)
    assert only["metrics"]["mean_image_retrieval_recall@1"] == 1
    assert only["counts"]["captions"] == N
    with pytest.raises(DataError, match=f"no captions in fr; it has {german}, {swahili}"):
        evaluate(data=str(tmp_path), languages=["fr"])
    next(iter(tmp_path.rglob("*.jpg"))).unlink()
    with pytest.raises(DataError, match="images that are not in"):
        evaluate(data=str(tmp_path))


@pytest.mark.parametrize("write", [crossmodal, xtd, tables, flores])
def test_each_picture_is_listed_once_and_embedded_once_over_all_languages(
    tmp_path, monkeypatch, write
):
    """With a copy of every picture, which the second language names instead."""
    write(tmp_path)
    copied = copy_of_each(tmp_path, write)
    walks = []
    open_archive = pictures.open_archive
    monkeypatch.setattr(pictures, "open_archive", lambda *a: walks.append(a) or open_archive(*a))

    embedded = []
    encoder = replace(
        knows(), prepare=lambda p: embedded.append(p) or torch.tensor([material.number_of(p)])
    )
    chosen = plugin.keyed("vlp.eval.tasks", {"multilingual": {"data": str(tmp_path)}})
    ((record,), _) = evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))

    assert len(walks) == 1 and len(embedded) == N == record["counts"]["images"]
    assert copied == 0 or record["counts"]["equal_pictures_joined"] == copied
    assert record["metrics"]["mean_image_retrieval_recall@1"] == 1 / 2


def copy_of_each(folder, write):
    """How many rows name a picture of which another row of the same language has the original."""
    if write is not crossmodal:
        return 0
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows[:N]):
        # An exact copy whose captions are one more of the original in German, and all in Swahili.
        put(folder / "images" / f"copy{i}.jpg", i)
        rows.append({"image/key": f"copy{i}", "de": {"caption": [f"noch {i}"]}})
        rows[-1]["sw"] = row.pop("sw")
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return N


def test_an_image_without_a_caption_is_refused_or_skipped(tmp_path):
    crossmodal(tmp_path)
    rows = [{"image": f"{i}.jpg", "captions": [f"de {i}"] * (i > 0)} for i in range(N)]
    for i in range(N):
        put(tmp_path / "t" / f"{i}.jpg", i)
    (tmp_path / "t" / "set-de.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="no caption"):
        evaluate(data=str(tmp_path / "t"))
    record = evaluate(data=str(tmp_path / "t"), missing="skip")
    assert (record["counts"]["captions"], record["counts"]["skipped"]) == (N - 1, 1)


def test_a_folder_of_no_such_layout_is_named(tmp_path):
    with pytest.raises(DataError, match=r"neither captions\.jsonl"):
        evaluate(data=str(tmp_path))
