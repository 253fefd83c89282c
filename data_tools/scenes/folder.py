"""All sets of scenes in one folder, made in several processes: training shards, evaluation sets."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from vlp.data.stored import destination
from vlp.data_tools._run.pool import Pool
from vlp.data_tools.scenes.render import PROOFS, Scene, generate

CLASSIFIED = ("zeroshot", "novel_zeroshot")


BENCHMARKS = (*CLASSIFIED, "retrieval")  # in clip_benchmark's layout, one tar each


TEMPLATES = ["{c}", "a picture of {c}", "a drawing of {c}", "there are {c}"]


SAMPLES_PER_SHARD = 1000


def write(
    folder: str | Path,
    *,
    n_train: int = 20_000,
    n_val: int = 1000,
    n_test: int = 1000,
    n_zeroshot: int = 560,
    n_retrieval: int = 300,
    n_proofs: int = 540,
    size: int = 64,
    seed: int = 0,
    processes: int | None = None,
    ray: bool = False,
    sounds: bool = False,
) -> dict[str, int]:
    """Fill `folder` with all sets and return their numbers of scenes; a set of none is left out.

    The bytes do not depend on `processes`, nor on whether they run on the Ray cluster that this
    process is connected to (`ray`). `sounds`: each scene is heard as well, as KEY.wav. `n_zeroshot`
    is rounded up to whole rounds through the 56 classes and `n_proofs` through the nine numbers, so
    that both stay balanced. With more than one process the calling script needs the usual
    `if __name__ == "__main__":`, because processes are started afresh (a fork may hang once torch
    ran).
    """
    folder = destination(folder)
    # Whole rounds: each class, each number and each form of a wrong caption as often as the others.
    n_zeroshot, n_proofs = _whole(n_zeroshot, 56), _whole(n_proofs, 27)
    n_scenes = {
        "train": n_train,
        "val": n_val,
        "test": n_test,
        "heldout": n_test,
        "zeroshot": n_zeroshot,
        "novel_zeroshot": _whole(n_zeroshot // 7, 8),
        "retrieval": n_retrieval,
        **dict.fromkeys(PROOFS, n_proofs),
    }
    n_scenes = {split: n for split, n in n_scenes.items() if n}
    if size < 16 or min(n_scenes.values(), default=0) < 0:
        raise ValueError(
            f"size {size} must be at least 16 pixels, and no number of scenes negative: {n_scenes}"
        )

    taken = [str(folder / split) for split in n_scenes if any((folder / split).rglob("*.tar"))]
    if taken:
        raise FileExistsError(
            f"{', '.join(taken)} already hold shards; choose another folder or remove them"
        )

    # One job a shard; an evaluation set is one tar, as clip_benchmark reads it.
    jobs: list[Job] = []
    for split, n in n_scenes.items():
        for first in range(0, n, n if split in BENCHMARKS else SAMPLES_PER_SHARD):
            n_of_shard = n if split in BENCHMARKS else min(SAMPLES_PER_SHARD, n - first)
            jobs.append((folder, split, first, n_of_shard, seed, size, sounds))

    pool = Pool(processes or (None if ray else os.cpu_count() or 1), ray=ray)
    for _ in pool.finished(_write, jobs):
        pass

    _describe_sets(folder, n_scenes)
    return n_scenes


def _whole(n: int, unit: int) -> int:
    return math.ceil(n / unit) * unit


# folder, split, first scene, scenes, seed, size, with sounds
Job = tuple[Path, str, int, int, int, int, bool]


def _write(job: Job) -> None:
    """One shard of a split, or one whole evaluation set."""
    from vlp.data.format import ShardWriter
    from vlp.data_tools.scenes import sound
    from vlp.data_tools.scenes.draw import encode

    folder, split, first, n, seed, size, sounds = job
    if split in BENCHMARKS:
        writer = ShardWriter(folder / split / "test", n, overwrite=True, shard_name="{}")
    else:
        shard = first // SAMPLES_PER_SHARD
        writer = ShardWriter(folder / split, SAMPLES_PER_SHARD, overwrite=True, first_shard=shard)

    if split == "retrieval":
        scenes = _unlike(seed, size, n)
    else:
        scenes = (generate(first + i, seed, split, size) for i in range(n))

    # Texts of several captions belong to retrieval; a training .txt holds one.
    with writer:
        for scene in scenes:
            cls = _class(scene, split) if split in CLASSIFIED else None
            txt = "\n".join(scene.captions) if split == "retrieval" else None
            further = {"wav": sound.encode(scene.meta["scene"])} if sounds else {}
            writer.add(
                None,
                encode(scene.image),
                "jpg",
                scene.captions,
                scene.meta,
                cls,
                txt=txt,
                further=further,
            )


def _unlike(seed: int, size: int, n: int) -> Iterator[Scene]:
    """The first `n` retrieval scenes of which no two show the same group on the same background.

    So no caption is true of two pictures, not even as a part of the truth, and every query has one
    right answer.
    """
    seen: set[tuple] = set()
    for index in range(20 * n + 1000):
        scene = generate(index, seed, "retrieval", size)
        ground = scene.meta["scene"]["background"]
        marks = {
            (ground["color"], ground["texture"], *group.values())
            for group in scene.meta["scene"]["groups"]
        }

        if seen.isdisjoint(marks):
            seen |= marks
            n -= 1
            yield scene
        if not n:
            return

    # A bounded search: there are only so many groups and backgrounds.
    raise ValueError(f"there are no {n} more retrieval scenes that all differ; ask for fewer")


def _class_names(split: str) -> list[str]:
    from vlp.data_tools.scenes.words import KINDS, TRAINED_KINDS, class_name

    kinds = TRAINED_KINDS if split == "zeroshot" else KINDS
    return [class_name(kind) for kind in kinds]


def _class(scene: Scene, split: str) -> int:
    from vlp.data_tools.scenes.words import class_name

    group = scene.meta["scene"]["groups"][0]
    return _class_names(split).index(class_name((group["color"], group["shape"])))


def _describe_sets(folder: Path, n_scenes: dict[str, int]) -> None:
    """The small text files of clip_benchmark's layout, and one index a folder of shards."""
    from vlp.data.format import index_written
    from vlp.files import write_atomically

    for split in n_scenes:
        if split not in BENCHMARKS:
            index_written(sorted((folder / split).glob("*.tar")))
            continue

        # The files that clip_benchmark looks for beside its tars.
        kind = "retrieval" if split == "retrieval" else "classification"
        texts = {"test/nshards.txt": "1", "dataset_type.txt": kind}
        if split in CLASSIFIED:
            texts["classnames.txt"] = "\n".join(_class_names(split))
            texts["zeroshot_classification_templates.txt"] = "\n".join(TEMPLATES)
        for name, text in texts.items():
            write_atomically(folder / split / name, f"{text}\n".encode())
