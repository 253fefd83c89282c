"""The page's section on scale: errors over samples seen, by model size, with a power law.

    error = c · samples^−α · parameters^−β · batch^−γ

over those of the three that differ between the runs, fitted by least squares of logarithms where
there are four runs or more, and two more than exponents. A floor that the error nears is not part
of it: to predict far beyond the runs it is too optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from vlp import checkpoint
from vlp.eval.report import runs
from vlp.eval.report.charts import color_class
from vlp.eval.report.comparison import why_not
from vlp.eval.report.logarithms import Powers, powers
from vlp.eval.report.markup import Html, note, section, tag
from vlp.eval.report.numbers import headline, name_of
from vlp.pretrained.runs import layout_of

LEAST = 4  # runs of a law
NO_LAW = (
    f"No law is fitted: it asks {LEAST} runs or more, of known sizes that do not grow in step with "
    "the samples."
)
LEAD = (
    "What is missing to 100 %, over samples seen, both logarithmic; a dot a run. Parameters are "
    "without tables of tokens and positions."
)


@dataclass(frozen=True)
class Scale:
    """How much a run is."""

    samples: int  # seen
    batch: int
    parameters: int | None  # None: it has no checkpoint that can be read
    objective: Any  # of its configuration: other losses are other laws


@dataclass(frozen=True)
class Law:
    """A fitted power law."""

    quantities: tuple[str, ...]  # fields of Scale
    constant: float  # log c
    exponents: tuple[float, ...]
    spread: float  # root mean square of the residuals of log error

    def __call__(self, scale: Scale) -> float:
        logs = [math.log(getattr(scale, name)) for name in self.quantities]
        return math.exp(self.constant + float(np.dot(self.exponents, logs)))

    def __str__(self) -> str:
        parts = [f"{name}^{value:+.2f}" for name, value in zip(self.quantities, self.exponents)]
        return f"error ∝ {' · '.join(parts)}, residuals {100 * self.spread:.1f} %"


# --- how much a run is ----------------------------------------------------------------------------


def scale_of(folder: Path) -> Scale | None:
    """The scale of the run in a folder; None where it holds none, its configuration is lost or has
    stages.
    """
    try:
        run = runs.read(folder)
    except ValueError:
        return None
    train = run.config.get("train")
    batch = train.get("batch") if isinstance(train, dict) else None
    # Stages may have batches of their own: steps × batch is then not what was seen.
    if not isinstance(batch, int) or run.last_step < 1 or run.config.get("stages"):
        return None
    return Scale(run.last_step * batch, batch, _parameters(run), run.config.get("objective"))


def _parameters(run: runs.Run) -> int | None:
    """Of the newest checkpoint, without tables; the headers of its files tell."""
    if not run.checkpoints:
        return None
    folder = run.folder / checkpoint.FOLDER / run.checkpoints[-1]
    try:
        shapes = _shapes(folder)
    except Exception:  # safetensors' own kinds, the system's, and those of damaged parts
        return None
    counts = [math.prod(shape) for name, shape in shapes.items() if "embedding" not in name]
    return sum(counts) or None


def _shapes(folder: Path) -> dict[str, Sequence[int]]:
    """Of the model's tensors in a checkpoint, in one file or in parts."""
    layout = layout_of(folder)
    if layout is not None:
        kind = "model/"
        cuts = layout.cuts.items()
        return {name.removeprefix(kind): cut.shape for name, cut in cuts if name.startswith(kind)}
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


# --- the law --------------------------------------------------------------------------------------


def fit(scales: Sequence[Scale], errors: Sequence[float]) -> Law | None:
    """The law of these errors, all above 0; None where they are too few for one, or some sizes are
    not known.
    """
    sizes = {scale.parameters for scale in scales}
    if None in sizes and len(sizes) > 1:
        return None

    varied = [
        name
        for name in ("samples", "parameters", "batch")
        if len({getattr(scale, name) for scale in scales}) > 1
    ]
    if len(scales) < max(LEAST, len(varied) + 2) or "samples" not in varied:
        return None

    logs = [[1.0, *(math.log(getattr(scale, name)) for name in varied)] for scale in scales]
    measured = np.log(errors)
    # Where two of them grow in step, no exponent is one's own.
    solution, _, rank, _ = np.linalg.lstsq(np.array(logs), measured, rcond=None)
    if rank < len(varied) + 1:
        return None
    residuals = measured - np.array(logs) @ solution
    spread = float(np.sqrt(np.square(residuals).mean()))
    constant, *exponents = solution.tolist()
    return Law(tuple(varied), constant, tuple(exponents), spread)


# --- the section ----------------------------------------------------------------------------------


def scaling(shown: Sequence[tuple[Scale | None, Sequence[dict[str, Any]]]]) -> Html | None:
    """The section for runs, each with its final records; None unless they differ in samples seen.

    Runs of another objective than the first's are left out, and said to be.
    """
    known = [(scale, records) for scale, records in shown if scale is not None]
    if not known:
        return None
    alike = [one for one in known if one[0].objective == known[0][0].objective]
    if len({scale.samples for scale, _ in alike}) < 2:
        return None

    groups = list(dict.fromkeys((scale.parameters, scale.batch) for scale, _ in alike))
    groups.sort(key=lambda group: (group[0] or 0, group[1]))
    cards = [_card(key, alike, groups) for key in _scores(alike)]
    drawn = [card for card in cards if card is not None]
    if not drawn:
        return None
    left_out = len(shown) - len(alike)
    remark = note(f"Left out, of another objective, of stages or unknown scale: {left_out} runs.")
    return section(
        "scaling",
        "Scaling",
        remark if left_out else None,
        _legend(groups),
        tag("div", drawn, class_="cards"),
        lead=LEAD,
    )


Known = list[tuple[Scale, Sequence[dict[str, Any]]]]
Group = tuple[int | None, int]  # parameters and batch of a curve


def _scores(known: Known) -> list[tuple[dict[str, Any], str]]:
    """(first record of a task, score) of hit rates that a table opens with, whose chance is known.

    Results of other data, versions or settings are tasks of their own.
    """
    tasks: list[dict[str, Any]] = []
    keys: dict[tuple[int, str], None] = {}
    for _, records in known:
        for record in records:
            names = [name for name in record["metrics"] if name in record.get("chance", {})]
            names = [name for name in names if headline(name)]
            if not names:
                continue
            place = next((n for n, task in enumerate(tasks) if _alike(task, record)), len(tasks))
            if place == len(tasks):
                tasks.append(record)
            keys |= dict.fromkeys((place, name) for name in names)
    return [(tasks[place], name) for place, name in keys]


def _alike(task: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether two records are of one task, and differ in the model alone."""
    of_task, of_record = ((r["label"], r.get("dataset")) for r in (task, record))
    return of_task == of_record and not why_not(task, record)


def _card(key: tuple[dict[str, Any], str], known: Known, groups: list[Group]) -> Html | None:
    """A chart of one score; None where fewer than two runs of different length have it."""
    task, name = key
    points: list[tuple[Scale, float]] = []
    for scale, records in known:
        scores = [r["metrics"][name] for r in records if name in r["metrics"] and _alike(task, r)]
        # A perfect score has no logarithm.
        points += [(scale, 1 - score) for score in scores if 0 <= score < 1]
    if len({scale.samples for scale, _ in points}) < 2:
        return None

    law = fit([scale for scale, _ in points], [error for _, error in points])
    series = [_series(group, points, law) for group in groups]
    title = " · ".join(filter(None, (task["label"], task.get("dataset"), f"1 − {name_of(name)}")))
    return powers(title, series, "samples seen", f"{law}." if law else NO_LAW)


def _series(group: Group, points: list[tuple[Scale, float]], law: Law | None) -> Powers:
    """The runs of one size and batch, with the law's line, or one through their means."""
    of_group = [(s, error) for s, error in points if (s.parameters, s.batch) == group]
    dots = [(s.samples, error, f"{s.samples:,} samples") for s, error in of_group]
    lengths = sorted({s.samples for s, _ in of_group})
    line = []
    for samples in lengths:
        errors = [error for s, error in of_group if s.samples == samples]
        scale = next(s for s, _ in of_group if s.samples == samples)
        line.append((float(samples), law(scale) if law else float(np.mean(errors))))
    return Powers(_named(group), dots, line if len(line) > 1 else ())


def _named(group: Group) -> str:
    parameters, batch = group
    size = "size unknown" if parameters is None else f"{parameters / 1e6:.3g} M parameters"
    return f"{size}, B = {batch}"


def _legend(groups: list[Group]) -> Html:
    names = [
        tag("span", tag("i", class_=color_class("k", place)), _named(group), class_="legend")
        for place, group in enumerate(groups)
    ]
    return tag("p", names, class_="legends")
