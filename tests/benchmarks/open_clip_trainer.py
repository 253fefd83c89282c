"""open_clip's own trainer on rows that it is given: the same start, the same pairs in the same
order as a run of `vlp train`.

Everything that decides about a step is open_clip's (open_clip_train.main): model, loss, optimiser,
schedule, loop. Its loader reads a table of pictures and captions and is told not to shuffle it.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from open_clip_train import data, main
from torch.utils.data import DataLoader

from tests.benchmarks import evidence_data
from vlp.config import Config
from vlp.data.loader import Loader
from vlp.models.build import build

LOSS = re.compile(r" Loss: ([\d.]+)")  # as open_clip logs it, of this step


def save_start(architecture: Path, seed: int, to: Path) -> None:
    """Write weights as open_clip draws them, for both trainers to begin with."""
    _register(architecture)
    torch.manual_seed(seed)
    torch.save(open_clip.create_model(architecture.stem).state_dict(), to)


def unpack(shards: Path, to: Path) -> None:
    """Every picture of the shards as KEY.jpg."""
    to.mkdir(parents=True)
    for sample in evidence_data.samples_of(shards):
        with (to / f"{sample['__key__']}.jpg").open("xb") as file:
            file.write(sample["jpg"])


def write_order(settings: Config, shards: Path, pictures: Path, to: Path) -> None:
    """The pairs that a run of these settings sees, in its order, as a table of open_clip's.

    A caption is found again by its tokens among those of its sample: KeyError where open_clip's
    tokenizer gives others than ours.
    """
    model = build(settings.model)
    length = model.text_spec.context_length
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    captions: dict[str, dict[tuple[int, ...], str]] = {}  # of a sample, by their tokens
    for sample in evidence_data.samples_of(shards):
        texts = json.loads(sample["json"])["captions"]
        captions[sample["__key__"]] = dict(zip(map(tuple, tokenizer(texts).tolist()), texts))

    loader = Loader(
        settings.data,
        model.image_spec,
        model.text_spec,
        batch=settings.train.batch,
        seed=settings.seed,
        pixels=False,
    )
    with to.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["filepath", "title"])
        for _ in range(int(settings.train.duration.value)):
            rows = next(loader)
            for key, tokens in zip(rows.key, rows.text.tolist()):
                table.writerow([pictures / f"{key}.jpg", captions[key][tuple(tokens)]])
    loader.close()


def train(settings: Config, architecture: Path, start: Path, order: Path, to: Path) -> Path:
    """Train as these settings say, in `to`; returns the file of the last weights."""
    _register(architecture)
    optimizer, batch = settings.train.optimizer, settings.train.batch
    assert optimizer.betas is not None and optimizer.eps is not None  # AdamW's are written down
    beta1, beta2 = optimizer.betas
    options: dict[str, Any] = {
        "model": architecture.stem,
        "pretrained": start,
        "precision": "fp32",
        "device": "cpu",
        "dataset-type": "csv",
        "train-data": order,
        "batch-size": batch,
        "epochs": 1,  # the table holds all that is seen
        "workers": 0,
        "lr": optimizer.lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": optimizer.eps,
        "wd": optimizer.weight_decay,
        "warmup": int(optimizer.warmup.value),
        "grad-clip-norm": optimizer.clip_norm,
        "seed": settings.seed,
        "logs": to.parent,
        "name": to.name,
        "log-every-n-steps": 1,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    # Whole pictures, as vlp's settings say.
    arguments += ["--aug-cfg", "scale=(1.0,1.0)"]

    in_order = partial(_in_order, DataLoader)
    with patch.object(data, "DataLoader", in_order), _logging_as_it_was():
        main.main(arguments)
    return to / "checkpoints" / "epoch_1.pt"


def losses(run: Path) -> list[float]:
    """The loss of every step, from open_clip's log."""
    return [float(loss) for loss in LOSS.findall((run / "out.log").read_text())]


def _in_order(loader: type[DataLoader], dataset: Any, **options: Any) -> DataLoader:
    return loader(dataset, **options | {"shuffle": False, "pin_memory": False})


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Undo what open_clip's trainer changes in the logging of the whole process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    known = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    levels = [(logger, logger.level) for logger in known]
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        for logger, its_level in levels:
            logger.setLevel(its_level)


def _register(architecture: Path) -> None:
    open_clip.add_model_config(architecture)
