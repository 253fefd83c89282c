"""Chinese captions in each published layout, tiny, and the recalls as Chinese-CLIP counts them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation
from vlp.eval.datasets import open_source
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.tasks import retrieval

N = 12


def caption(i: int, k: int = 0) -> str:
    return f"第{i}张照片，{'一' * (k + 1)}只猫"


def images(folder: Path, name: str = "{}.jpg") -> Path:
    folder.mkdir(parents=True)
    for i in range(N):
        (folder / name.format(i)).write_bytes(material.png(material.picture(i)))
    return folder


def chinese_clip(root: Path, split: str = "test", urlsafe: bool = False) -> dict:
    """Two captions an image, images in base64."""
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    root.mkdir(parents=True, exist_ok=True)
    lines, rows = [], []
    for i in range(N):
        lines.append(f"{i}\t{encode(material.png(material.picture(i))).decode()}")
        for k in range(2):
            rows.append({"text_id": 2 * i + k, "text": caption(i, k), "image_ids": [i]})
    (root / f"{split}_imgs.tsv").write_text("\n".join(lines) + "\n")
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    (root / f"{split}_texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return {"data": str(root)}


def urlsafe_base64(root: Path) -> dict:
    return chinese_clip(root, "valid", urlsafe=True) | {"split": "val"}


def images_by_number(root: Path) -> dict:
    options = chinese_clip(root)
    (root / "test_imgs.tsv").unlink()
    return options | {"images": str(images(root / "flickr30k images"))}


def coco_cn(root: Path) -> dict:
    """Captions of two splits in one file."""
    base = root / "coco-cn-version1805v1.1"
    base.mkdir(parents=True)
    name = "COCO_val2014_{:012}"
    lines = ["COCO_train2014_000000000099#0\t别的"]
    for i in range(N):
        lines += [f"{name.format(i)}#{k}\t{caption(i, k)}" for k in range(2)]
    (base / "imageid.human-written-caption.txt").write_text("\n".join(lines), encoding="utf-8")
    (base / "imageid.human-written-tags.txt").write_text("")
    (base / "coco-cn_train.txt").write_text("COCO_train2014_000000000099\n")
    (base / "coco-cn_test.txt").write_text("\n".join(name.format(i) for i in range(N)))
    place = images(root / "coco" / "val2014", "COCO_val2014_{:012}.jpg").parent
    return {"data": str(root), "images": str(place)}


def coco_cn_translated(root: Path) -> dict:
    """Another of its files of captions is named."""
    options = coco_cn(root)
    written = root / "coco-cn-version1805v1.1" / "imageid.human-written-caption.txt"
    translated = written.rename(written.with_name("imageid.manually-translated-caption.txt"))
    return options | {"data": str(translated)}


def flickr30k_cn(root: Path) -> dict:
    """Words with parts of speech; a comma is two blanks."""
    for split in ("zhbbosonval", "zhmbosontest"):
        folder = root / f"flickr30k{split}" / "TextData"
        folder.mkdir(parents=True)
        lines = []
        for i in range(N):
            lines += [
                f"{i}#zhm#{k} 第:m {i} 张:q 照片:n  {'一' * (k + 1)}:m 只:q 猫:n" for k in (0, 1)
            ]
        path = folder / f"seg.flickr30k{split}.caption.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
    return {"data": str(root), "images": str(images(root / "flickr30k-images"))}


def clip_benchmark(root: Path) -> dict:
    root.mkdir()
    lines = [f"{i}.jpg,{caption(i, k)}" for i in range(N) for k in (0, 1)]
    path = root / "flickr30k_test_zh.txt"
    path.write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    return {"data": str(path), "images": str(images(root / "Images"))}


def flickr30k_cna(root: Path) -> dict:
    root.mkdir()
    lines = [f"{i}.jpg#{k}\t{caption(i, k)}" for i in range(N) for k in (0, 1)]
    path = root / "flickr30k_cn_test.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return {"data": str(path), "images": str(images(root / "images"))}


LAYOUTS = [
    chinese_clip, urlsafe_base64, images_by_number, coco_cn, coco_cn_translated, flickr30k_cn,
    clip_benchmark, flickr30k_cna,
]  # fmt: skip


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_holds_the_same_pictures_and_captions(tmp_path, write):
    source = retrieval.read(retrieval.Options(**write(tmp_path / "a set")))
    read = {material.number_of(r.picture.open()): r.captions for r in source.records}
    assert read == {i: (caption(i, 0), caption(i, 1)) for i in range(N)}


def test_recalls_and_their_mean_are_those_of_chinese_clip(tmp_path):
    """A text finds its image, and an image any of its texts, among the best k of all."""
    options = chinese_clip(tmp_path)
    tasks = plugin.keyed("vlp.eval.tasks", {"retrieval": options | {"language": "zh"}})
    encoder = material.random_encoder(3)
    (record,), _ = evaluation.evaluate(encoder, tasks, Context(workers=0, contents=Contents()))

    texts = [caption(i, k) for i in range(N) for k in (0, 1)]
    image = encoder.encode_images([material.picture(i) for i in range(N)])
    scores = (image @ encoder.encode_texts(texts).T).tolist()
    for way in ("image", "text"):
        recalls = []
        for k in (1, 5, 10):
            hits = []
            if way == "image":
                for j in range(len(texts)):
                    order = sorted(range(N), key=lambda i, j=j: -scores[i][j])
                    hits.append(j // 2 in order[:k])
            else:
                for i in range(N):
                    order = sorted(range(len(texts)), key=lambda j, i=i: -scores[i][j])
                    hits.append(bool({2 * i, 2 * i + 1} & set(order[:k])))
            recalls.append(sum(hits) / len(hits))
            assert record["metrics"][f"{way}_retrieval_recall@{k}"] == recalls[-1]
        mean_recall = record["metrics"][f"{way}_retrieval_mean_recall"]
        assert mean_recall == pytest.approx(sum(recalls) / 3) and 0 < mean_recall < 1
        assert f"{way}_retrieval_mean_recall" in record["chance"]
    assert record["language"] == "zh"


@pytest.mark.parametrize(
    ("write", "file", "old", "new", "message"),
    [
        (chinese_clip, "test_texts.jsonl", '"image_ids": [0]', '"image_ids": []', "text 0 belongs"),
        (chinese_clip, "test_texts.jsonl", '"image_ids": [3]', '"image_ids": [3, 4]', r"\[3, 4\]"),
        (chinese_clip, "test_texts.jsonl", '"text": "第0', '"txt": "第0', "lacks text"),
        (chinese_clip, "test_texts.jsonl", '"image_ids": [3]', '"image_ids": [77]', "e.g. 77"),
        (
            chinese_clip,
            "test_texts.jsonl",
            '"第0张照片，一只猫"',
            "null",
            "text 0 is None, expected",
        ),
        (chinese_clip, "test_imgs.tsv", "3\t", "3\t!", "line 4: found '3"),
        (chinese_clip, "test_imgs.tsv", "3\t", "3 ", "expected a number, a tab"),
        (coco_cn, "coco-cn*/*caption.txt", "0003#0\t", "0003 0\t", "line 8: found 'COCO_val2014"),
        (flickr30k_cn, "*test/TextData/*", "3#zhm#0", "3", "line 7: found '3 第"),
    ],
)
def test_what_is_broken_is_named(tmp_path, write, file, old, new, message):
    options = write(tmp_path)
    (path,) = tmp_path.glob(file)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        retrieval.read(retrieval.Options(**options))


def test_an_image_of_the_list_without_a_caption_is_named(tmp_path):
    options = coco_cn(tmp_path)
    (path,) = tmp_path.glob("coco-cn*/coco-cn_test.txt")
    path.write_text(path.read_text() + "\nCOCO_val2014_000000000555\n")
    with pytest.raises(DataError, match=r"no caption for 1 of the 13 images of coco-cn_test\.txt"):
        retrieval.read(retrieval.Options(**options))
    source = retrieval.read(retrieval.Options(**options, missing="skip"))
    assert (len(source.records), source.skipped) == (N, ["COCO_val2014_000000000555"])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (chinese_clip, "has no split 'dev', only test; pass split="),
        (coco_cn, "has no coco-cn_dev.txt, .*; it has test, train; pass split="),
        (flickr30k_cn, "split 'dev' asks for one set of captions, found none of that split"),
    ],
)
def test_a_split_that_is_not_there_is_named(tmp_path, write, message):
    options = write(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(options["data"], "dev", images=options.get("images"))


@pytest.mark.parametrize("options", [{"rows": ":2"}, {"captions": ["text"]}])
def test_what_the_layout_would_ignore_is_refused(tmp_path, options):
    with pytest.raises(DataError, match="leave it out"):
        retrieval.read(retrieval.Options(**chinese_clip(tmp_path), **options))
