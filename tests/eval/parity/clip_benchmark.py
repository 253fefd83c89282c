"""clip_benchmark's command on its own layout, and its linear probe."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.eval.parity import inputs, open_clip
from tests.eval.parity.compare import Declared, Figures
from vlp import plugin
from vlp.eval import evaluation, metrics, models
from vlp.eval.models import Encoder
from vlp.eval.tasks import sugarcrepe

PEER = "clip-benchmark"
MODELS = ("model", "siglip")
RECALLS = ("1", "5", "10")


def obstacle() -> str | None:
    """Why its code cannot run here; None: it can."""
    if importlib.util.find_spec("clip_benchmark") is None:
        return "clip_benchmark is not installed"
    return open_clip.obstacle()


# set -> its task by clip_benchmark's name, and by ours
SETS = {
    "zeroshot": ("zeroshot_classification", "zeroshot"),
    "multilabel": ("zeroshot_classification", "zeroshot"),
    "retrieval": ("zeroshot_retrieval", "retrieval"),
}
ONLY_OURS = ("mean_rank", "median_rank", "mean_recall")  # clip_benchmark gives recalls alone
PROBES: dict[str, dict[str, Any]] = {
    "probe": {},
    "probe with a sweep": {"val_split": "val"},
    "probe of 3 shots": {"shots": 3},
}
EPOCHS = 3


# --- theirs ---------------------------------------------------------------------------------------


def theirs(root: Path) -> Figures:
    """By the command; the probe and Winoground by the functions behind it."""
    figures: Figures = {}
    for name in MODELS:
        for dataset, (task, _) in SETS.items():
            scores = _command(root, name, f"wds/{dataset}", root / dataset, task)
            figures |= {f"{name}, {dataset}: {key}": value for key, value in scores.items()}
        for subset in sugarcrepe.SUBSETS:
            dataset = f"sugar_crepe/{subset}"
            scores = _command(root, name, dataset, root / "sugarcrepe", "image_caption_selection")
            figures[f"{name}, sugarcrepe: {subset}"] = scores["text_acc"]
        figures |= _their_winoground(root, name)
    return figures | _their_probes(root)


def _command(root: Path, model: str, dataset: str, folder: Path, task: str) -> dict[str, float]:
    """The metrics that `clip_benchmark eval` writes."""
    from clip_benchmark import cli

    output = root / "clip_benchmark.json"
    arguments = ["--dataset", dataset, "--dataset_root", str(folder), "--task", task]
    arguments += ["--model", f"local-dir:{root / model}", "--pretrained", "", "--no_amp"]
    arguments += ["--num_workers", "0", "--recall_k", *RECALLS, "--output", str(output), "--quiet"]
    with mock.patch.object(sys, "argv", ["clip_benchmark", "eval", *arguments]):
        cli.main()
    return json.loads(output.read_text())["metrics"]


def _loaded(folder: Path) -> tuple[Any, Any, Any]:
    from clip_benchmark.models import load_clip

    model, transform, tokenizer = load_clip(
        "open_clip", f"local-dir:{folder}", "", cache_dir=None, device="cpu"
    )
    return model.eval(), transform, tokenizer


def _their_winoground(root: Path, name: str) -> Figures:
    # Its reader knows Winoground on the Hub alone; what it yields is made of the same files here.
    from clip_benchmark.datasets.builder import image_captions_collate_fn
    from clip_benchmark.metrics import image_caption_selection
    from PIL import Image

    model, transform, tokenizer = _loaded(root / name)
    folder = root / "winoground"
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]

    def item(example: dict[str, Any]) -> tuple[torch.Tensor, list[str]]:
        paths = [folder / "images" / f"{example[f'image_{side}']}.png" for side in (0, 1)]
        images = [transform(Image.open(path)) for path in paths]
        return torch.stack(images), [example[f"caption_{side}"] for side in (0, 1)]

    batches = torch.utils.data.DataLoader(
        [item(example) for example in examples],
        batch_size=16,
        collate_fn=image_captions_collate_fn,
    )
    scores = image_caption_selection.evaluate(model, batches, tokenizer, "cpu", amp=False)
    return {f"{name}, winoground: {key}": value for key, value in scores.items()}


def _their_probes(root: Path) -> Figures:
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import linear_probe

    model, transform, _ = _loaded(root / "model")

    def batches(split: str) -> torch.utils.data.DataLoader:
        dataset = build_dataset(
            "wds/probe", root=str(root / "probe"), transform=transform, split=split
        )
        return torch.utils.data.DataLoader(dataset, batch_size=64)

    figures: Figures = {}
    for name, options in PROBES.items():
        evaluate = partial(
            linear_probe.evaluate,
            model,
            batches("train"),
            batches("test"),
            fewshot_k=options.get("shots", -1),
            batch_size=64,
            num_workers=0,
            lr=0.1,
            epochs=EPOCHS,
            model_id=name,
            seed=0,
            feature_root=str(root / "features"),
            val_dataloader=batches("val") if "val_split" in options else None,
            device=_Cpu("cpu"),
            amp=False,
        )
        with _without_cuda(), torch.random.fork_rng():
            # The first call keeps the features, so that the second draws from the seed on.
            evaluate()
            torch.manual_seed(0)
            scores = evaluate()
        kept = ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "weight_decay")
        figures |= {f"{name}: {key}": scores[key] for key in kept if scores[key] != 0}
    return figures


class _Cpu(str):
    """The CPU, for a probe that refuses every device but "cuda"."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cuda" or str.__eq__(self, other)


@contextmanager
def _without_cuda() -> Iterator[None]:
    """`.cuda()` leaves modules and tensors where they are."""
    with (
        mock.patch.object(torch.nn.Module, "cuda", lambda module: module),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
    ):
        yield


# --- ours -----------------------------------------------------------------------------------------


def ours(root: Path) -> Figures:
    """By the tasks of `vlp eval`."""
    figures: Figures = {}
    for name in MODELS:
        evaluated = partial(_evaluated, root, models.load(str(root / name)))
        for dataset, (_, task) in SETS.items():
            scores = evaluated(task, data=str(root / dataset))
            for key, value in scores.items():
                if not key.endswith(ONLY_OURS):
                    figures[f"{name}, {dataset}: {key}"] = value

        pictures = str(root / "sugarcrepe" / "val2017")
        scores = evaluated("sugarcrepe", data=str(root / "sugarcrepe"), images=pictures)
        for subset in sugarcrepe.SUBSETS:
            figures[f"{name}, sugarcrepe: {subset}"] = scores[subset]
        folder = root / "winoground"
        scores = evaluated("winoground", data=str(folder), images=str(folder / "images"))
        figures |= {f"{name}, winoground: {key}": value for key, value in scores.items()}
    return figures | _our_probes(root)


def _evaluated(root: Path, encoder: Encoder, task: str, **options: Any) -> dict[str, float]:
    chosen = plugin.keyed("vlp.eval.tasks", {task: options})
    (record,), _ = evaluation.evaluate(encoder, chosen, inputs.context(root))
    return record["metrics"]


def _our_probes(root: Path) -> Figures:
    encoder = models.load(str(root / "model"))
    figures: Figures = {}
    for name, options in PROBES.items():
        task_options = {"data": str(root / "probe"), "epochs": EPOCHS} | options
        scores = _evaluated(root, encoder, "clip_benchmark_probe", **task_options)
        figures |= {f"{name}: {key}": value for key, value in scores.items() if value != 0}
    return figures


def declared(root: Path) -> list[Declared]:
    """Photos and captions of which a model says the same."""
    from clip_benchmark.metrics import zeroshot_retrieval

    rows = torch.nn.functional.normalize(torch.ones(4, 8), dim=1)
    is_pair = torch.eye(4, dtype=torch.bool)
    theirs = zeroshot_retrieval.recall_at_k(rows @ rows.T, is_pair, 1)
    _, ranks = metrics.retrieval_ranks(rows, rows, torch.arange(4))
    return [
        Declared(
            "recall@1 among four of which a model says the same",
            float(theirs.mean()),
            float((ranks == 1).double().mean()),
            "a tie counts against the model; clip_benchmark leaves it to torch.topk",
        )
    ]
