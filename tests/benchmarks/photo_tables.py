"""The tables of photos.py: scores with intervals over pictures, and distances paired over them."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.benchmarks import evidence, parts, photo_data, report
from vlp.eval import confidence

SCORES = {  # heading -> set, outcomes by picture
    "text R@1, %": ("retrieval", "text_retrieval_recall@1"),
    "image R@1, %": ("retrieval", "image_retrieval_recall@1"),
    "zero-shot, %": ("zeroshot", "acc1"),
    "rule negatives, %": ("negatives", "acc"),
    "SugarCrepe, %": ("choices", "acc"),
    "numbers, %": ("numbers", "acc"),
    "NLVR numbers, %": ("nlvr", "acc"),
}
SCORE_NOTES = (
    "Mean ± standard deviation over seeds, with 95 % over pictures, each with its mean over the "
    "seeds. Wrong captions: a caption must be above all of its own."
)
DISTANCE_NOTES = (
    "Points with 95 % paired over pictures, each with its mean over the seeds; an interval that "
    "holds 0 shows no difference."
)


def show(
    out: Path,
    runs: dict[str, Any],  # part -> its settings
    titles: dict[str, str],  # of the arms
    made: dict[str, Any],  # of photo_data
    args: argparse.Namespace,
) -> None:
    """Print the tables of what has finished, and publish them where that is asked for."""
    records = parts.all_finished(out, runs)
    of_arms: dict[str, list[dict[str, Any]]] = {}
    for name, record in records.items():
        items = load_file(out / name / "items.safetensors")
        of_arms.setdefault(record["settings"]["arm"], []).append(record | {"items": items})
    if not of_arms:
        print(f"no run has finished in {out}")
        return

    first = next(iter(of_arms.values()))
    chances: dict[str, float] = {}
    for record in records.values():
        chances |= record["chance"]
    headings = {
        heading: f"{name}/{score}"
        for heading, (name, score) in SCORES.items()
        if f"{name}/{score}" in chances
    }
    notes = f"{sizes(made)}{of_nlvr(out)} Trained at {parts.commits(list(records.values()))}."
    scores = [guessing(chances, headings), *without_a_look(out, made, headings)]
    scores += [row_of_scores(titles[arm], of_arm, headings) for arm, of_arm in of_arms.items()]
    report.publish("photos", "Objectives on real photos", scores, args, f"{SCORE_NOTES} {notes}")

    distances = [
        row_of_distances(titles[arm], of_arm, first, headings)
        for arm, of_arm in of_arms.items()
        if len(of_arm) == len(first) and of_arm is not first
    ]
    if distances:
        # One file for what --json names: that of the scores.
        args.json = None
        title = f"Objectives on real photos: distance from {titles[next(iter(of_arms))]}"
        report.publish("photos_distances", title, distances, args, DISTANCE_NOTES)


def of_nlvr(out: Path) -> str:
    """How many of NLVR's sentences count."""
    path = out / "nlvr" / "counts.json"
    if not path.exists():
        return ""
    counts = json.loads(path.read_text())
    return (
        f" Of {counts['sentences']:,} sentences of NLVR that are true of a picture "
        f"{counts['counting']:,} count exactly; another number may be true of a picture, too."
    )


def sizes(made: dict[str, Any]) -> str:
    """How many photos there were, and how they were split."""
    counts, n_folds = made["counts"], len(made["folds"])
    sentences = [
        f"{counts['photos']:,} photos; tested on {counts['test_photos']:,} of them with "
        f"{counts['test_captions']:,} captions."
    ]
    if n_folds > 1:
        sentences.append(
            f"In {n_folds} folds by picture, each tested by models that were trained on the "
            f"others: retrieval among the {counts['test_photos'] // n_folds} or so of a fold."
        )
    sentences.append(
        f"{counts.get('number_captions', 0):,} captions of {counts.get('number_photos', 0):,} "
        f"photos count; {counts.get('choices', 0):,} items of SugarCrepe."
    )
    if counts["photos"] < photo_data.FEW:
        sentences.append("So few photos rank no objectives: they show that the path works.")
    return " ".join(sentences)


def guessing(chances: dict[str, float], headings: dict[str, str]) -> dict[str, Any]:
    scores = {heading: f"{100 * chances[key]:.1f}" for heading, key in headings.items()}
    return {"arm": "chance", "seeds": None, **scores, "CPU s": None}


def without_a_look(
    out: Path, made: dict[str, Any], headings: dict[str, str]
) -> list[dict[str, Any]]:
    """The row of who always names the commonest number, whatever the picture; none without data
    that tell numbers apart.
    """
    sets = {
        "numbers, %": [out / "photos" / str(fold) / "numbers" for fold in made["folds"]],
        "NLVR numbers, %": [out / "nlvr"],
    }
    cells: dict[str, str | None] = dict.fromkeys(headings)
    for heading, folders in sets.items():
        folders = [folder for folder in folders if folder.exists()]
        if heading in headings and folders:
            cells[heading] = f"{100 * photo_data.commonest_number(folders):.1f}"
    row = {"arm": "the commonest number, always", "seeds": None, **cells, "CPU s": None}
    return [row] if any(cells.values()) else []


def row_of_scores(
    title: str, runs: list[dict[str, Any]], headings: dict[str, str]
) -> dict[str, Any]:
    cells: dict[str, str | None] = dict.fromkeys(headings)
    for heading, key in headings.items():
        if not all_have(runs, key):
            continue
        of_seeds = [100 * confidence.score(one["items"][key]) for one in runs]
        low, high = (100 * bound for bound in confidence.interval(mean_outcomes(runs, key)))
        cells[heading] = f"{evidence.spread(of_seeds)} ({low:.0f} to {high:.0f})"
    cpu_s = statistics.mean(one["cpu_s"] for one in runs)
    return {"arm": title, "seeds": len(runs), **cells, "CPU s": cpu_s}


def row_of_distances(
    title: str,
    runs: list[dict[str, Any]],
    baseline: list[dict[str, Any]],
    headings: dict[str, str],
) -> dict[str, Any]:
    cells: dict[str, str | None] = dict.fromkeys(headings)
    for heading, key in headings.items():
        if not all_have([*runs, *baseline], key):
            continue
        pair = (mean_outcomes(side, key) for side in (runs, baseline))
        middle, low, high = (100 * value for value in confidence.paired_difference(*pair))
        cells[heading] = f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"
    return {"arm": title, "seeds": len(runs), **cells}


def all_have(runs: list[dict[str, Any]], key: str) -> bool:
    """Whether every run was tested so: sets may have come between two calls."""
    return all(key in one["items"] for one in runs)


def mean_outcomes(runs: list[dict[str, Any]], key: str) -> Tensor:
    """What every picture gives, as the mean over the seeds."""
    return torch.stack([one["items"][key] for one in runs]).double().mean(0)
