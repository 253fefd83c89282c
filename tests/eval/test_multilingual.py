"""Retrieval in several languages from each published layout, tiny."""

import json

import pytest

from tests.eval import material
from vlp import plugin
from vlp.eval import run
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


def evaluate(**options):
    encoder = material.known_encoder(
        lambda n: material.direction(n),
        lambda text: material.direction(int(text.split()[-1])),
    )
    chosen = plugin.keyed("vlp.eval.tasks", {"multilingual": options})
    return run.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))[0][0]


@pytest.mark.parametrize("write", [crossmodal, xtd, tables])
def test_every_language_is_scored_and_their_mean(tmp_path, write):
    write(tmp_path)
    record = evaluate(data=str(tmp_path))
    scores = record["metrics"]
    for way in ("image", "text"):
        assert scores[f"de_{way}_retrieval_recall@1"] == 1
        assert scores[f"sw_{way}_retrieval_recall@1"] == 0
        assert scores[f"mean_{way}_retrieval_recall@1"] == 1 / 2
        assert record["chance"][f"mean_{way}_retrieval_recall@1"] > 0
    assert scores.keys() == record["chance"].keys()
    assert record["counts"]["languages"] == 2 and record["counts"]["images"] == N
    assert record["language"] == "multilingual"

    only = evaluate(data=str(tmp_path), languages=["de"], captions_per_image=1)
    assert only["metrics"]["mean_image_retrieval_recall@1"] == 1
    assert only["counts"]["captions"] == N
    with pytest.raises(DataError, match="no captions in fr; it has de, sw"):
        evaluate(data=str(tmp_path), languages=["fr"])
    next(iter(tmp_path.rglob("*.jpg"))).unlink()
    with pytest.raises(DataError, match="images that are not in"):
        evaluate(data=str(tmp_path))


def test_a_folder_of_no_such_layout_is_named(tmp_path):
    with pytest.raises(DataError, match=r"neither captions\.jsonl"):
        evaluate(data=str(tmp_path))
