"""ECCV Caption (Chun et al. 2022) and CxC (Parekh et al. 2021): COCO with all right answers.

`data` is the folder of the eccv_caption package's files (original_, cxc_ and eccv_
image_to_caption.json and caption_to_image.json); `annotations` COCO's captions_val2014.json, which
gives the ids their names and texts. Candidates are the 5,000 images and 25,000 captions of the
original file. Reported both ways: ECCV's mAP@R, R-precision and R@1, and R@1/5/10 of CxC and COCO
5K, as that package defines them; ties count against the model.

Source: naver-ai/eccv-caption@b51f56c, `eccv_caption/_metrics.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.eval import choices, embed, ranked
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "zeroshot_retrieval"
MAIN = "eccv_image_retrieval_map_at_r"
KS = (1, 5, 10)
WAYS = {
    "text_retrieval": "image_to_caption",
    "image_retrieval": "caption_to_image",
}


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the answers, the captions and the images are."""

    data: str  # the folder of the package's .json files
    annotations: str = "captions_val2014.json"  # COCO's file; a bare name: in `data`


@dataclass
class Data:
    """Candidates, and the right answers of each query by their places."""

    pictures: list[Picture]
    captions: list[str]
    # (set, way) -> place of the query -> places of its right answers
    right: dict[tuple[str, str], dict[int, list[int]]] = field(default_factory=dict)
    # of the same: how many right answers there are, candidates or not
    n_right: dict[tuple[str, str], dict[int, int]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def read(options: Options) -> Data:
    """The candidates of the original file, and every file's answers."""
    folder = Path(options.data)
    annotations = choices.read_json(folder / options.annotations)
    try:
        names = {image["id"]: image["file_name"] for image in annotations["images"]}
        texts = {entry["id"]: entry["caption"] for entry in annotations["annotations"]}
    except (KeyError, TypeError):
        raise DataError(
            f"{folder / options.annotations} is not COCO's captions file: expected images (id, "
            "file_name) and annotations (id, caption)"
        ) from None

    original = _answers(folder, "original", "image_to_caption")
    rows = [{"id": number, "image": names.get(number, f"image {number}")} for number in original]
    images = options.images or folder
    kept, absent = choices.with_pictures(rows, ["image"], images, options.missing)
    image_ids = [row["id"] for row, _ in kept]
    caption_ids = [number for image in image_ids for number in original[image]]
    unknown = [number for number in caption_ids if number not in texts]
    if unknown:
        raise DataError(f"{options.annotations} has no caption {unknown[0]} ({len(unknown)} lack)")

    data = Data([picture for _, (picture,) in kept], [texts[n] for n in caption_ids])
    data.skipped = absent
    places = {
        "image": {number: place for place, number in enumerate(image_ids)},
        "caption": {number: place for place, number in enumerate(caption_ids)},
    }
    for of_set in ("eccv", "cxc", "original"):
        for way, file in WAYS.items():
            asked, _, sought = file.partition("_to_")
            answers = _answers(folder, of_set, file)
            queries = {n: set(answers[n]) for n in answers if n in places[asked]}
            data.right[of_set, way] = {
                places[asked][n]: sorted(places[sought][m] for m in right if m in places[sought])
                for n, right in queries.items()
            }
            data.n_right[of_set, way] = {places[asked][n]: len(r) for n, r in queries.items()}
    return data


def _answers(folder: Path, of_set: str, file: str) -> dict[int, list[int]]:
    """The right answers of each query, by their ids."""
    path = folder / f"{of_set}_{file}.json"
    value = choices.read_json(path)
    try:
        return {int(query): [int(answer) for answer in value[query]] for query in value}
    except (TypeError, ValueError):
        raise DataError(f"{path} is not a mapping of numbers to lists of numbers") from None


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """All measures, both ways."""
    # Texts first: where the model cannot read them, no time goes into pictures.
    text = embed.texts(encoder, data.captions, context)
    image = embed.images(encoder, data.pictures, context)
    result = TaskResult(
        "eccv_caption",
        counts={
            "images": len(image),
            "captions": len(text),
            "skipped": len(data.skipped),
        },
        digest=context.digest(data.pictures, data.captions, data.right, data.n_right),
    )
    sides = {"text_retrieval": (image, text), "image_retrieval": (text, image)}
    for (of_set, way), right in data.right.items():
        if right:
            n_right = data.n_right[of_set, way]
            _score(result, f"{of_set}_{way}", *sides[way], right, n_right)
    return result


def _score(
    result: TaskResult,
    name: str,
    asked: Tensor,
    sought: Tensor,
    right: dict[int, list[int]],
    n_right: dict[int, int],
) -> None:
    """Fill in the measures of one set and way."""
    queries = list(right)
    lists = ranked.found(asked[queries], sought, list(right.values()), max(*KS, *n_right.values()))
    values: dict[str, list[float]] = {}
    for query, hits in zip(queries, lists):
        of_query: dict[str, Any] = {f"recall@{k}": float(hits[:k].any()) for k in KS}
        if name.startswith("eccv"):
            of_query["map_at_r"] = ranked.map_at_r(hits, n_right[query])
            of_query["r_precision"] = ranked.r_precision(hits, n_right[query])
        for measure, value in of_query.items():
            values.setdefault(measure, []).append(value)

    for measure, of_queries in values.items():
        shares = torch.tensor(of_queries, dtype=torch.float64)
        result.items[f"{name}_{measure}"] = choices.accuracy(shares)
        result.chance[f"{name}_{measure}"] = _chance(measure, n_right, len(sought))


def _chance(measure: str, n_right: dict[int, int], n: int) -> float:
    """The mean over queries of what guessing gives."""
    k = int(measure.partition("@")[2] or 1)
    # Few different numbers of right answers occur.
    queries = Counter(min(count, n) for count in n_right.values())
    total = sum(ranked.chance(count, n, k)[measure] * times for count, times in queries.items())
    return total / len(n_right)
