"""Fabricated sets in the layouts in which suites find them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.eval import (
    material,
    test_chinese,
    test_choices,
    test_long_captions,
    test_multilingual,
    test_published_choices,
)
from vlp.eval import suites

CLASSES = ["cat", "dog", "hot dog"]


def write_wds(root: Path, n: int = 6, with_vector: bool = False, kind: str = "") -> Path:
    """A set of n pictures in clip_benchmark's layout; picture i is of class i % 3."""
    samples = [(material.png(material.picture(i)), i % len(CLASSES)) for i in range(n)]
    material.clip_benchmark_set(root, samples, classes=CLASSES, templates=["a {c}."], kind=kind)
    if with_vector:
        add_vectors(root, [[i % 2, 7] for i in range(n)])
    return root


def add_vectors(root: Path, vectors: list[list[int]]) -> None:
    """Write the shards anew with a vector of metadata a picture, as DataComp's of WILDS are."""
    members = []
    for i, vector in enumerate(vectors):
        file = root / "vector.npy"
        np.save(file, np.array(vector))
        members.append((f"s{i:07d}.png", material.png(material.picture(i))))
        members.append((f"s{i:07d}.cls", str(i % len(CLASSES)).encode()))
        members.append((f"s{i:07d}.npy", file.read_bytes()))
        file.unlink()
    material.write_tar(root / "test" / "0.tar", members)
    (root / "test" / "1.tar").unlink(missing_ok=True)
    (root / "test" / "nshards.txt").write_text("1\n")


def write_winogavil(root: Path) -> None:
    images = root / "winogavil_images"
    images.mkdir(parents=True)
    names = [f"n{i}" for i in range(10)]
    for i, name in enumerate(names):
        material.picture(i).save(images / f"{name}.png")
    rows = [(names[:5], "eagle", names[:2]), (names, "moss", names[:3])]
    lines = [f'"{quoted(c)}",{cue},"{quoted(a)}"' for c, cue, a in rows]
    table = "candidates,cue,associations\n" + "\n".join(lines) + "\n"
    (root / "winogavil_dataset.csv").write_text(table)


def quoted(names: list[str]) -> str:
    return json.dumps(names).replace('"', '""')


def write_compositional(root: Path) -> None:
    """All ten, in the layouts of their authors."""
    for name in ("aro", "sugarcrepe", "sugarcrepe_pp", "valse", "winoground"):
        test_choices.small(name, made(root / name))
    counted = test_choices.small("countbench", made(root / "countbench"))
    Path(counted["data"]).rename(root / "countbench" / "CountBench.json")
    (root / "coco").mkdir()
    (root / "sugarcrepe" / "images").rename(root / "coco" / "val2017")

    test_published_choices.mmvp(made(root / "mmvp_vlm"))
    test_published_choices.whatsup(made(root / "whatsup"))
    test_published_choices.crepe(made(root / "crepe"))
    test_published_choices.cola(made(root / "cola"))
    (root / "crepe" / "VG_100K").rename(root / "VG_100K")
    for picture in (root / "cola" / "vg").iterdir():
        picture.rename(root / "VG_100K" / f"1{picture.name}")
    table = root / "cola" / "cola.json"
    rows = table.read_text().replace("vg/", "vg/1")
    table.with_name("COLA_multiobjects_matching_benchmark.json").write_text(rows)


def write_long(root: Path) -> None:
    """All five; ShareGPT4V without the row whose image is not there."""
    for write in (test_long_captions.urban1k, test_long_captions.docci, test_long_captions.dci):
        write(made(root / write.__name__))
    test_long_captions.iiw(root)
    path = test_long_captions.sharegpt4v(made(root / "sharegpt4v"))
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))


def write_multilingual(root: Path) -> None:
    """All five; the Chinese two as Chinese-CLIP and COCO-CN have them."""
    test_multilingual.crossmodal(made(root / "xm3600"))
    test_multilingual.xtd(made(root / "xtd"))
    coco = made(root / "multilingual_mscoco_captions")
    test_multilingual.tables(coco)
    images = made(coco / "multilingual_mscoco" / "images")
    for picture in sorted(coco.glob("*.jpg")):
        picture.rename(images / picture.name)
    test_chinese.chinese_clip(root / "Flickr30k-CN")
    test_chinese.coco_cn(root)


def write_faces(root: Path) -> None:
    """Both sets of pictures, with two questions and a vector of four numbers a picture."""
    for name in ("fairface", "utkface"):
        folder = write_wds(root / f"wds_{name}_test")
        add_vectors(folder, [[i % 2, i % 2, 0, i // 3] for i in range(6)])
        lines = ["age:young", "age:old", "gender:male", "gender:female"]
        (folder / "classnames.txt").write_text("\n".join(lines))
        templates = "age:a {c} face\ngender:a {c} face\n"
        (folder / "zeroshot_classification_templates.txt").write_text(templates)


def write_datacomp(root: Path) -> None:
    """All 38, most of them one set under many names."""
    plain = write_wds(made(root / "plain"))
    grouped = write_wds(made(root / "grouped"), with_vector=True)
    # Five and more classes, so that there is a top five.
    (grouped / "classnames.txt").write_text("\n".join([*CLASSES, "fox", "owl", "eel"]))
    write_retrieval(root)
    write_winogavil(root / "winogavil")
    for entry in suites.read("datacomp").entries:
        folder = root / entry.at[0]
        if not folder.exists():
            folder.symlink_to(grouped if entry.task == "grouped" else plain)


def write_vtab(root: Path) -> None:
    """All 35, one set under as many names."""
    plain = write_wds(made(root / "plain"))
    for entry in suites.read("vtab+").entries:
        (root / entry.at[0]).symlink_to(plain)


def write_retrieval(root: Path) -> None:
    """All three as clip_benchmark's shards."""
    captions = [(material.png(material.picture(i)), [f"p {i}", f"q {i}"]) for i in range(4)]
    for name in ("mscoco_captions", "flickr8k", "flickr30k"):
        material.clip_benchmark_set(root / f"wds_{name}", captions, kind="retrieval")


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
