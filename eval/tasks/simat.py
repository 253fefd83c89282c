"""SIMAT (Couairon et al. 2022): a picture moved by the difference of two words finds a picture of
what the words change.

Published: simat_db/ with triplets.csv (the pictures), transfos.csv (the changes), the scores of an
oracle, OSCAR, for every picture and caption in oscar_similarity_matrix.pt, and images/, which
prepare_dataset.py cuts from Visual Genome.

    query    x + λ (t_target − t_value) of unit rows, the words as they are written
    answer   the picture of highest product, other than the one that is changed
    right    the oracle gives the answer and the caption of the change more than 0.5
    score    Σ w · right / Σ w with w = 1 / √norm2 of the change

`simat` is at λ = 1, `simat_lambda_…` at those of `lambdas`. Ties count against the model.

Source: facebookresearch/SIMAT@00fc29c, `eval.py`, without the linear heads that it trains.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlp.eval import choices, embed, metrics
from vlp.eval.datasets.tables import read_rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import Collection, DataError, Picture, refuse_missing
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "simat"
MAIN = "simat"
ORACLE = "oscar_similarity_matrix.pt"
RIGHT = 0.5  # an oracle's score above which an answer is right
_TILE = 512  # queries that are scored together


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the published folder is, which part of it counts, and how far pictures are moved."""

    data: str  # the folder simat_db
    images: str | None = None  # None: images/ in that folder
    split: Literal["test", "dev"] = "test"  # which changes count: is_test True or False
    lambdas: list[float] = field(default_factory=lambda: [2.0])  # beside 1, which is always scored

    def __post_init__(self) -> None:
        if any(value <= 0 for value in self.lambdas):
            raise ValueError(f"lambdas is {self.lambdas}; expected numbers above 0")


@dataclass
class Data:
    """The pictures, and the q changes of one part."""

    pictures: list[Picture]
    oracle: Tensor  # [n, captions] bool: whether a picture shows what a caption says
    changed: Tensor  # [q] int64, the place of the picture that is changed
    target: Tensor  # [q] int64, the caption that describes the answer
    weights: Tensor  # [q] float64
    value_words: list[str]  # q, what is in the picture
    target_words: list[str]  # q, what is to be there
    skipped: list[str]


# --- reading --------------------------------------------------------------------------------------


def read(options: Options) -> Data:
    """The changes of a part whose pictures are there, and the oracle's answers."""
    folder = Path(options.data)
    triplets = _table(folder / "triplets.csv", ("region_id", "dataset_id"))
    changes = _table(
        folder / "transfos.csv",
        ("region_id", "value", "target", "target_ids", "norm2", "is_test"),
    )
    _check_triplets(triplets, folder)
    wanted = options.split == "test"
    of_split = [row for row in changes if row["is_test"] is wanted]
    if not of_split:
        raise DataError(
            f"{folder / 'transfos.csv'} has {len(changes)} changes and none of split "
            f"{options.split!r}; expected True or False in is_test"
        )

    # Every picture is a candidate, also one that is never changed.
    names = [f"{row['region_id']}.png" for row in triplets]
    collection = Collection(options.images or folder / "images")
    pictures = [collection.find(name) for name in names]
    absent = [name for name, picture in zip(names, pictures) if picture is None]
    refuse_missing(absent, len(names), collection, options.missing)

    present = [number for number, picture in enumerate(pictures) if picture is not None]
    place = {triplets[number]["region_id"]: i for i, number in enumerate(present)}
    known = {row["region_id"] for row in triplets}
    _check_changes(of_split, known, folder)
    kept = [row for row in of_split if row["region_id"] in place]
    if not kept:
        raise DataError(f"no picture of the {len(of_split)} changes is in {collection.root}")

    oracle_rows = [triplets[number]["dataset_id"] for number in present]
    n_captions = 1 + max(row["target_ids"] for row in of_split)
    return Data(
        [picture for picture in pictures if picture is not None],
        _oracle(folder / ORACLE, oracle_rows, n_captions),
        torch.tensor([place[row["region_id"]] for row in kept]),
        torch.tensor([row["target_ids"] for row in kept]),
        torch.tensor([row["norm2"] for row in kept], dtype=torch.float64).rsqrt(),
        [row["value"] for row in kept],
        [row["target"] for row in kept],
        absent,
    )


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a published table; the words stay as written."""
    if not path.is_file():
        raise DataError(
            f"no table at {path}; give the folder simat_db of the repository facebookresearch/SIMAT"
        )
    rows = read_rows(path, ("value", "target"))
    choices.need_keys(rows, columns, path)
    return rows


def _check_triplets(rows: list[dict[str, Any]], folder: Path) -> None:
    """Raise DataError for a picture without its row of the oracle."""
    for row in rows:
        # A number below 0 would count from the oracle's end.
        if type(row["dataset_id"]) is not int or row["dataset_id"] < 0:
            raise DataError(
                f"{folder / 'triplets.csv'}: found {row}; expected a dataset_id from 0, the "
                f"picture's row in {ORACLE}"
            )


def _check_changes(rows: list[dict[str, Any]], known: set[Any], folder: Path) -> None:
    """Raise DataError for a change without picture, word, caption or weight."""
    for row in rows:
        is_whole = row["region_id"] in known and row["value"] and row["target"]
        weight, caption = row["norm2"], row["target_ids"]
        has_weight = isinstance(weight, (int, float)) and weight > 0
        if not is_whole or not has_weight or type(caption) is not int or caption < 0:
            raise DataError(
                f"{folder / 'transfos.csv'}: found {row}; expected a region_id of triplets.csv, "
                "words in value and target, target_ids from 0 and norm2 above 0"
            )


def _oracle(path: Path, rows: list[int], n_captions: int) -> Tensor:
    """[rows, captions] bool: the oracle's answers for the pictures of these rows."""
    try:
        scores = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"no oracle at {path}; fetch it with `git lfs pull` or by hand") from None
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, OSError):
        # A clone without Git LFS has a few lines of text in its place.
        raise DataError(
            f"{path} is not a file of torch.save with a tensor, or not whole ("
            f"{path.stat().st_size:,} bytes); fetch it with `git lfs pull` or by hand"
        ) from None

    expected = f"expected a matrix of at least {max(rows) + 1} pictures × {n_captions} captions"
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        kind = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise DataError(f"{path} holds {kind}; {expected}")
    if scores.shape[0] <= max(rows) or scores.shape[1] < n_captions:
        raise DataError(f"{path} holds {tuple(scores.shape)}; {expected}")
    return scores[rows] > RIGHT


# --- scores ---------------------------------------------------------------------------------------


def scores(options: Options) -> list[str]:
    """The score at every λ."""
    return [_score_name(value) for value in _lambdas(options)]


def _lambdas(options: Options) -> list[float]:
    return list(dict.fromkeys([1.0, *options.lambdas]))


def _score_name(value: float) -> str:
    return "simat" if value == 1 else f"simat_lambda_{value:g}"


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """The share of changes that find what they describe, at every λ."""
    image = embed.images(encoder, data.pictures, context).double()
    value_rows = embed.texts(encoder, data.value_words, context).double()
    target_rows = embed.texts(encoder, data.target_words, context).double()
    difference = target_rows - value_rows

    result = TaskResult(
        "simat",
        counts={
            "images": len(image),
            "changes": len(difference),
            "skipped": len(data.skipped),
        },
        digest=context.digest(
            data.pictures,
            data.value_words,
            data.target_words,
            data.changed.tolist(),
            data.target.tolist(),
            data.weights.tolist(),
            hashlib.sha256(data.oracle.numpy().tobytes()).hexdigest(),
        ),
    )
    by_guessing = chance(data)
    for value in _lambdas(options):
        name = _score_name(value)
        hits = oracle_hits(image, image[data.changed] + value * difference, data)
        result.items[name] = _by_picture(hits, data)
        result.chance[name] = by_guessing
    return result


def oracle_hits(image: Tensor, queries: Tensor, data: Data) -> Tensor:
    """[q] float64, 1 where the oracle accepts the picture that is nearest to the query."""
    tie = metrics.tie_of_products(queries, image)
    hits = []
    for start in range(0, len(queries), _TILE):
        rows = slice(start, start + _TILE)
        right = data.oracle[:, data.target[rows]].T  # [tile, n]
        scores = queries[rows] @ image.T - tie * right.double()

        # The changed picture is nearest to itself at small λ, and no answer.
        scores.scatter_(1, data.changed[rows, None], -torch.inf)
        answers = scores.argmax(1, keepdim=True)
        hits.append(right.gather(1, answers)[:, 0])
    return torch.cat(hits).double()


def _by_picture(hits: Tensor, data: Data) -> Tensor:
    """[U, 2] weighted hits and weights of all changes of a picture, the unit that could have been
    drawn otherwise.
    """
    _, unit = data.changed.unique(return_inverse=True)
    parts = torch.stack([hits * data.weights, data.weights], 1)
    items = torch.zeros(int(unit.max()) + 1, 2, dtype=torch.float64)
    return items.index_add_(0, unit, parts)


def chance(data: Data) -> float:
    """The score of a picture drawn among all but the changed one."""
    n_right = data.oracle.sum(0)[data.target]
    itself = data.oracle[data.changed, data.target].long()
    shares = (n_right - itself).double() / max(1, len(data.oracle) - 1)
    return float((shares * data.weights).sum() / data.weights.sum())
