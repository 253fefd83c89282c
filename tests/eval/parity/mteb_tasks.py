"""Tasks of mteb over the sets of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.image.image_text_pair_classification import AbsTaskImageTextPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
from sklearn.neighbors import KNeighborsClassifier

from tests.eval.parity.compare import Figures
from tests.eval.parity.mteb import KS, TEMPLATE, captioned, labelled, present
from vlp.eval import models
from vlp.eval.mteb import wrap
from vlp.eval.tasks import winoground, zeroshot


def metadata(name: str, kind: str, category: str, modalities: list[str]) -> TaskMetadata:
    """What mteb wants to know of a task."""
    return TaskMetadata(
        name=name,
        description="Photos of the tests.",
        reference="https://example.org",
        dataset={"path": "NA", "revision": "NA"},
        type=kind,
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
        date=("2022-12-22", "2022-12-22"),
        dialect=[],
        domains=[],
        task_subtypes=[],
        license="cc-by-4.0",
        annotations_creators="derived",
        sample_creation="found",
        bibtex_citation="",
    )


class _Local:
    """A task whose data are at hand."""

    def __init__(self, data: Any, **keys: Any) -> None:
        super().__init__(**keys)
        self.dataset = data
        self.data_loaded = True

    def load_data(self, **_: Any) -> None:
        """Nothing is left to load."""


class TextToImage(_Local, AbsTaskRetrieval):
    metadata = metadata("LocalT2I", "Any2AnyRetrieval", "t2i", ["text", "image"])


class ImageToText(_Local, AbsTaskRetrieval):
    metadata = metadata("LocalI2T", "Any2AnyRetrieval", "i2t", ["text", "image"])


class ZeroShot(_Local, AbsTaskZeroShotClassification):
    metadata = metadata("LocalZeroShot", "ZeroShotClassification", "i2t", ["image", "text"])
    names: list[str]

    def get_candidate_labels(self) -> list[str]:
        return [TEMPLATE.format(name) for name in self.names]


class Linear(_Local, AbsTaskClassification):
    metadata = metadata("LocalLinear", "ImageClassification", "i2c", ["image"])
    input_column_name = "image"
    samples_per_label = 1000  # all of them
    n_experiments = 1


class Nearest(Linear):
    metadata = metadata("LocalNearest", "ImageClassification", "i2c", ["image"])
    evaluator_model = KNeighborsClassifier(1)


class Winoground(_Local, AbsTaskImageTextPairClassification):
    metadata = metadata("LocalPairs", "Compositionality", "i2t", ["image", "text"])
    images_column_names = ("image_0", "image_1")
    texts_column_names = ("caption_0", "caption_1")


# --- scores ---------------------------------------------------------------------------------------


def theirs(root: Path) -> Figures:
    """By mteb's evaluation of our model."""
    model = wrap(models.load(str(root / "model")), name="vlp/model")
    return {
        f"{name}: {score}": value
        for name, task in _tasks(root).items()
        for score, value in _scores(model, task, REPORTED[name]).items()
    }


RANKED = ("ndcg_at_10", "map_at_1000", "mrr_at_10")
REPORTED = {
    "captions to photos": (*(f"recall_at_{k}" for k in KS), *RANKED),
    "photos to captions": (*(f"hit_rate_at_{k}" for k in KS), *RANKED, "recall_at_10"),
    "zero-shot": ("accuracy", "f1", "recall"),
    "linear": ("accuracy", "recall", "f1"),
    "nearest neighbour": ("accuracy", "recall", "f1"),
    "winoground": ("text_acc", "image_acc", "accuracy"),
}


def recall_with_absent(root: Path) -> float:
    """The mean recall where one of the classes has no picture."""
    model = wrap(models.load(str(root / "model")), name="vlp/model")
    return _scores(model, _zero_shot(root, absent=True), ("recall",))["recall"]


def _scores(model: Any, task: Any, names: tuple[str, ...]) -> dict[str, float]:
    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    scores = result.scores["test"][0]
    return {name: scores[name] for name in names}


def _table(data: zeroshot.Data) -> Dataset:
    images = [record.picture.open() for record in data.source.records]
    return Dataset.from_dict({"image": images, "label": data.labels.tolist()})


def _tasks(root: Path) -> dict[str, Any]:
    records = captioned(root)
    photos = {
        "id": [f"p{i}" for i in range(len(records))],
        "image": [record.picture.open() for record in records],
    }
    captions: dict[str, list[str]] = {"id": [], "text": []}
    of_caption, of_photo = {}, {}
    for i, record in enumerate(records):
        names = [f"c{i}-{k}" for k in range(len(record.captions))]
        captions["id"] += names
        captions["text"] += record.captions
        of_caption |= {name: {f"p{i}": 1} for name in names}
        of_photo[f"p{i}"] = dict.fromkeys(names, 1)
    both = (Dataset.from_dict(captions), Dataset.from_dict(photos))

    def pairs(queries: Dataset, corpus: Dataset, right: Any) -> dict[str, Any]:
        split = RetrievalSplitData(
            queries=queries, corpus=corpus, relevant_docs=right, top_ranked=None
        )
        return {"default": {"test": split}}

    probe = DatasetDict(
        {split: _table(labelled(root, "probe", split)) for split in ("train", "test")}
    )
    return {
        "captions to photos": TextToImage(pairs(*both, of_caption)),
        "photos to captions": ImageToText(pairs(*both[::-1], of_photo)),
        "zero-shot": _zero_shot(root),
        "linear": Linear(probe),
        "nearest neighbour": Nearest(probe),
        "winoground": _winoground(root),
    }


def _zero_shot(root: Path, absent: bool = False) -> ZeroShot:
    """The task, with the class that has no picture or without it."""
    data = labelled(root, "zeroshot", "test")
    names, labels = (data.classes, data.labels) if absent else present(data)
    images = _table(data)["image"]
    table = Dataset.from_dict({"image": images, "label": labels.tolist()})
    task = ZeroShot(DatasetDict({"test": table}))
    task.names = names
    return task


def _winoground(root: Path) -> Winoground:
    columns: dict[str, list[Any]] = {}
    for grid in winoground.read(winoground.Options(str(root / "winoground"))).grids:
        for side in (0, 1):
            columns.setdefault(f"image_{side}", []).append(grid.pictures[side].open())
            columns.setdefault(f"caption_{side}", []).append(grid.texts[side])
    return Winoground(DatasetDict({"test": Dataset.from_dict(columns)}))
