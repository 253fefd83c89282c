"""Fabricated sets in the layouts in which suites find them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.eval import material

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
