"""Scores of the tasks on fabricated sets, frozen in versions.json beside each task's VERSION.

Where a score changes, VERSION must be raised and the file written anew:

    python -m tests.eval.test_versions
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval import (
    coca,
    material,
    suite_material,
    test_graded,
    test_mmeb,
    test_ranked,
    test_robustness,
    test_simat,
)
from tests.eval.test_probes import photos
from tests.test_modalities import write_rows
from vlp import plugin, watch
from vlp.eval import evaluation, suites
from vlp.eval.embed import Context
from vlp.eval.suites.places import locate
from vlp.plugin import Plugin

FROZEN = Path(__file__).with_name("versions.json")
N_ENCODERS = 4  # of one alone many scores are 0
# Of a score so many digits: processors differ in the last bits of a product.
TOLERANCE = 1e-4


def tasks(folder: Path) -> list[Plugin]:
    """One set for each task: of the suites where one has it, else of our own."""
    chosen: dict[str, Plugin] = {}
    for name in ("compositional", "datacomp", "multilingual"):
        getattr(suite_material, f"write_{name}")(folder / name)
        located = locate(suites.read(name).entries, [str(folder / name)])
        for task in located.tasks:
            chosen.setdefault(task.name, task)

    pairs = folder / "pairs" / "00000.tar"
    members = []
    for i in range(8):
        captions = [f"two small dogs and {i} cats", f"a red bicycle near {i} trees"]
        meta = {"captions": captions, "negatives": [f"{i} dogs"], "negative_kinds": ["swap"]}
        members.append((f"{i}.png", material.png(material.picture(40 * i))))
        members.append((f"{i}.json", json.dumps(meta).encode()))
    material.write_tar(pairs, members)

    # In the few words that a tiny decoder knows.
    described = folder / "described" / "0.tar"
    members = []
    for i, caption in enumerate(coca.TEXTS):
        members.append((f"{i}.png", material.png(material.picture(40 * i))))
        members.append((f"{i}.txt", caption.encode()))
    material.write_tar(described, members)

    rows = [
        {"image": "0.png", "texts": [f"see {group} {i}", "a dog"], "group": group}
        for i, group in enumerate("abb")
    ]
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "0.png").write_bytes(material.png(material.picture(77)))

    splits = {"data": str(photos(folder / "splits"))}
    pets = str(folder / "datacomp" / "wds_vtab-pets_test")
    moved = str(suite_material.write_wds(folder / "moved", n=9))
    lines = [f"{x},{y}" for x, y in test_robustness.POINTS]
    (folder / "line.csv").write_text("\n".join(["standard,shifted", *lines]))
    for name in ("graded", "simat_db", "eccv"):
        (folder / name).mkdir()
    test_simat.make(folder / "simat_db")
    test_ranked.eccv(folder / "eccv")
    audio = {"audio": str(write_rows(folder / "audio", folder / "pairs", (3,), lengths=False))}
    tars = Path(pets) / "test"
    of_pets = {"audio": str(write_rows(folder / "pets_audio", tars, (3,), lengths=False))}
    own: dict[str, Any] = {
        "captioning": {"data": str(described), "captions_per_image": 1, "max_tokens": 10},
        "choices": {"data": str(folder / "choices.jsonl")},
        "clip_benchmark_probe": {**splits, "epochs": 1},
        "eccv_caption": {"data": str(folder / "eccv")},
        "few_shot": {**splits, "shots": [1, 4], "decays": [0.1]},
        "graded": {"data": str(test_graded.write(folder / "graded"))},
        "knn": splits,
        "linear_probe": {**splits, "decays": [0.01]},
        "mmeb": {
            "data": str(test_mmeb.write(folder / "mmeb")),
            "images": str(test_mmeb.pictures(folder / "mmeb_images")),
            "together": "sum",
        },
        "modality_retrieval": {"data": str(pairs), "modalities": audio},
        "modality_zeroshot": {"data": pets, "modalities": of_pets},
        "negatives": {"data": str(pairs)},
        "order": {"data": str(pairs), "tagger": "words"},
        "representation": {"data": str(pairs)},
        "retrieval": {"data": str(pairs)},
        "robustness": {"data": pets, "shifted": moved, "reference": str(folder / "line.csv")},
        "simat": {"data": str(folder / "simat_db")},
        "tolerance": {"data": pets},
    }
    chosen |= {task.name: task for task in plugin.keyed("vlp.eval.tasks", own)}
    return [chosen[name] for name in sorted(chosen)]


def measured(folder: Path) -> dict[str, Any]:
    """Version and scores of each task, the mean over encoders that are the same everywhere."""
    chosen = tasks(folder)
    opened = evaluation.read_all(chosen)
    of_encoders = []
    for seed in range(N_ENCODERS):
        encoder = material.hearing(material.random_encoder(seed), seed)
        encoder = coca.writing(encoder, coca.coca(folder, seed))
        records, _ = evaluation.evaluate(encoder, chosen, Context(workers=0), opened)
        of_encoders.append([record["metrics"] for record in records])

    result = {}
    for task, metrics in zip(chosen, zip(*of_encoders)):
        scores = {name: sum(m[name] for m in metrics) / N_ENCODERS for name in metrics[0]}
        result[task.name] = {"version": task.module.VERSION, "scores": scores}
        unlisted = [name for name in scores if watch.unlisted(task, name)]
        assert not unlisted, f"{task.name} lists its scores without {', '.join(unlisted)}"
    return result


def test_no_score_changes_under_its_version(tmp_path):
    frozen, now = json.loads(FROZEN.read_text()), measured(tmp_path)
    assert set(frozen) == set(now) == set(plugin.names("vlp.eval.tasks"))

    wrong = []
    for name, expected in frozen.items():
        # A score that is new changes none.
        version, scores = now[name]["version"], now[name]["scores"]
        scores = {score: scores.get(score) for score in expected["scores"]}
        if version != expected["version"]:
            wrong.append(f"{name}: version {version} is not frozen")
        elif scores != pytest.approx(expected["scores"], rel=TOLERANCE):
            wrong.append(f"{name}: scores differ from those of version {version}; raise it")
    assert not wrong, "then write versions.json anew: python -m tests.eval.test_versions"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        values = measured(Path(place))
    FROZEN.write_text(f"{json.dumps(values, indent=1, ensure_ascii=False, sort_keys=True)}\n")
