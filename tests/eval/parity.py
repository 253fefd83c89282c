"""The model and the sets on which this project and clip_benchmark are compared: `python -m
tests.eval.parity DIR`.

parity.json holds clip_benchmark's numbers for them. It was written, with clip-benchmark 1.6.2 (and
requests, numpy 2.3.5, torch 2.15.0, open_clip_torch 3.3.0) in an environment of its own, by

    python -m tests.eval.parity DIR
    for SET in zeroshot retrieval multilabel; do
        TASK=zeroshot_classification; [ $SET = retrieval ] && TASK=zeroshot_retrieval
        clip_benchmark eval --dataset wds/$SET --dataset_root DIR/$SET --split test --task $TASK \\
            --model local-dir:DIR/model --pretrained "" --no_amp --num_workers 0 \\
            --recall_k 1 5 10 --output DIR/$SET.json
    done
    python -m tests.eval.parity DIR --collect > tests/eval/parity.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from tests.eval import material

SETS = ("zeroshot", "retrieval", "multilabel")
CLASSES = (
    "airplanes",
    "motorbikes",
    "faces",
    "watch",
    "leopards",
    "bonsai",
    "car_side",
    "ketch",
    "chandelier",
    "hawksbill",
)
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}", "{c}"]


def build(root: Path) -> None:
    """Write model/, zeroshot/, retrieval/, multilabel/ below `root`, the same bytes every time."""
    material.tiny_open_clip(root / "model")
    rows = [
        r
        for r in material.read_jsonl(material.shared("caltech101.jsonl"))
        if r["class"] in CLASSES and r["split"] == "test"
    ]
    rows = rows[::3]
    classes = sorted({r["class"] for r in rows})
    pictures = material.members_of(material.shared("caltech101.tar"), [r["image"] for r in rows])
    photos = [(pictures[r["image"]], classes.index(r["class"])) for r in rows]
    material.clip_benchmark_set(root / "zeroshot", photos, classes=classes, templates=TEMPLATES)
    several = [
        (image, np.array([label == c or i % (c + 2) == 0 for c in range(6)]).astype(int))
        for i, (image, label) in enumerate(photos)
    ]
    material.clip_benchmark_set(
        root / "multilabel", several, classes=classes[:6], templates=TEMPLATES, kind="multilabel"
    )
    rows = material.read_jsonl(material.shared("coco_open.jsonl"))
    pictures = material.members_of(material.shared("coco_open.tar"), [r["image"] for r in rows])
    captions = [(pictures[r["image"]], r["captions"][: 1 + i % 5]) for i, r in enumerate(rows)]
    material.clip_benchmark_set(root / "retrieval", captions, kind="retrieval")


def collect(root: Path) -> dict[str, dict[str, float]]:
    """clip_benchmark's metrics by set."""
    return {name: json.loads((root / f"{name}.json").read_text())["metrics"] for name in SETS}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if "--collect" in sys.argv:
        print(json.dumps(collect(folder), indent=1))
    else:
        build(folder)
