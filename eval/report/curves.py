"""The page's sections over steps: training curves, scores."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from vlp.eval.report.charts import Point, Series, curve
from vlp.eval.report.markup import Html, more, note, number, section, table, tag
from vlp.eval.report.numbers import headline, label_and_metric, name_of, tagged
from vlp.eval.report.planes import Trail, trails
from vlp.eval.report.runs import NOT_SCALARS, Run

FIRST = ("loss",)
SPEED = {
    "scale": "logit scale",
    "bias": "logit bias",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "samples_s": "samples a second",
    "text_tokens_s": "tokens of texts a second",
    "mfu": "model FLOPs utilisation",
    "data_wait": "share of time waiting for data",
    "peak_resident_gib": "peak memory of the process, GiB",
    "peak_device_gib": "peak memory of the device, GiB",
    "space.modality_gap": "modality gap, in training",
    "space.alignment": "alignment, in training",
    "space.uniformity_image": "uniformity of images, in training",
    "space.uniformity_text": "uniformity of texts, in training",
    "valid.negatives": "share of hard captions that are valid",
    "valid.counterfactual": "share of rows that count",
    "valid.captions": "share of further captions that are valid",
    "log_n": "loss of uninformative scores, log n",
}
COUNTERS = {
    "bad_samples": "damaged samples",
    "truncated_captions": "captions cut to the text tower's length",
    "left_out_samples": "samples left out",
    "waited_s": "seconds waited for data",
}
# parts of the names of the representation task's scores
GEOMETRY = (
    "modality_gap",
    "uniformity",
    "alignment",
    "separability",
    "effective_rank",
    "temperature",
    "tolerance",
    "mean_cosine",
)


# --- training -------------------------------------------------------------------------------------


def curves(runs: list[Run]) -> Html:
    """Loss and terms, then how training went: scale, learning rate, throughput, waiting."""
    keys = scalar_keys(chain.from_iterable(run.train for run in runs))
    order = [key for key in (*FIRST, *_terms(runs, keys), *SPEED) if key in keys]
    if not order:
        return section("curves", "Training", note("No curves: no training record has been logged."))

    titles = {key: SPEED.get(key, key.replace("_", " ")) for key in order}
    cards = _cards(((key, titles[key], [run.scalar(key) for run in runs]) for key in order), runs)
    return section(
        "curves",
        "Training",
        legend(runs),
        cards,
        _counter_table(runs),
        lead="By optimiser step; beside a title the latest value.",
    )


def scalar_keys(records: Iterable[dict]) -> list[str]:
    """What the records log, in the order of its first appearance."""
    keys: dict[str, None] = {}
    for record in records:
        keys |= dict.fromkeys(record)
    return [key for key in keys if key not in NOT_SCALARS]


def _terms(runs: list[Run], keys: list[str]) -> list[str]:
    """The terms of the loss; none where one term of weight 1 is the loss."""
    # Whatever training logs under a name that is not known here is a term.
    terms = [key for key in keys if key not in (*FIRST, *SPEED, *COUNTERS)]
    if len(terms) == 1 and all(run.scalar(terms[0]) == run.scalar("loss") for run in runs):
        return []
    return terms


def _counter_table(runs: list[Run]) -> Html | None:
    """What was counted over the run, where it is not nothing."""
    rows = []
    for key, title in COUNTERS.items():
        points = [run.scalar(key) for run in runs]
        totals = [of_run[-1][1] if of_run else None for of_run in points]
        if any(totals):
            rows.append([title, *("–" if total is None else number(total) for total in totals)])

    if not rows:
        return None
    return table(["counted over the run", *(tagged(run, runs) or "" for run in runs)], rows)


# --- scores ---------------------------------------------------------------------------------------


def scores(runs: list[Run]) -> Html:
    """Evaluation scores over steps; the geometry of the embeddings has its own cards."""
    keys = scalar_keys(chain.from_iterable(run.evals for run in runs))
    keys = [key for key in keys if not is_geometry(key)]
    title = "Scores over steps"
    if not keys:
        has_section = any(run.config.get("eval") for run in runs)
        why = "none was logged yet" if has_section else "the configuration has no eval section"
        return section("scores", title, note(f"No evaluation: {why}."))

    # A curve of one point says no more than the table.
    if max(len(run.evals) for run in runs) < 2:
        reason = "One evaluation so far; its scores are in the summary."
        return section("scores", title, note(reason))

    # The scores that matter are open, all others folded away.
    main, rest = headlines_first(keys)
    if not main:
        main, rest = keys[:4], keys[4:]
    folded = more(f"{len(rest)} more scores", score_cards(runs, rest)) if rest else None
    return section(
        "scores",
        title,
        legend(runs),
        score_cards(runs, main),
        folded,
        lead="On held-out data. The dashed line is chance, where results.json states it.",
    )


def is_geometry(key: str) -> bool:
    """Whether a score "label.metric" says how the embeddings lie on the sphere."""
    return any(part in label_and_metric(key)[1] for part in GEOMETRY)


def headlines_first(keys: list[str]) -> tuple[list[str], list[str]]:
    """(scores "label.metric" that a page opens with, all others)."""
    main = [key for key in keys if headline(label_and_metric(key)[1])]
    return main, [key for key in keys if key not in main]


def score_cards(runs: list[Run], keys: list[str]) -> Html:
    """A card a score, with its chance level where known."""
    # Training logs no chance levels; the final results state them.
    chance: dict[str, float] = {}
    for run in runs:
        for record in run.results:
            levels = record.get("chance", {})
            chance |= {f"{record['label']}.{metric}": level for metric, level in levels.items()}

    titles = {}
    for key in keys:
        label, metric = label_and_metric(key)
        titles[key] = f"{label} · {name_of(metric)}"
    return _cards(
        ((key, titles[key], [run.score(key) for run in runs]) for key in keys), runs, chance
    )


def tolerance_trails(runs: list[Run]) -> Html | None:
    """A card for every set on which uniformity and tolerance were logged twice or more."""
    cards = []
    for key in scalar_keys(chain.from_iterable(run.evals for run in runs)):
        label, metric = label_and_metric(key)
        if metric != "tolerance":
            continue
        ways = [
            Trail(run.name, _stops(run, f"{label}.uniformity_image", key), i)
            for i, run in enumerate(runs)
        ]
        if max(len(way.stops) for way in ways) > 1:
            title = f"{label} · tolerance against uniformity"
            cards.append(trails(title, ("uniformity", "tolerance"), ways))
    return tag("div", cards, class_="cards") if cards else None


def _stops(run: Run, across: str, up: str) -> list[tuple[float, float, float]]:
    """(step, value, value) of the evaluations that logged both scores."""
    values = dict(run.score(across))
    return [(step, values[step], value) for step, value in run.score(up) if step in values]


# --- cards ----------------------------------------------------------------------------------------


def _cards(
    cards: Iterable[tuple[str, str, list[list[Point]]]],  # key, title, points of each run
    runs: list[Run],
    chance: dict[str, float] | None = None,  # by key
) -> Html:
    """A chart for every scalar, with a curve a run."""
    drawn = []
    for key, title, points in cards:
        series = [Series(run.name, of_run, i) for i, (run, of_run) in enumerate(zip(runs, points))]
        drawn.append(curve(title, series, (chance or {}).get(key)))
    return tag("div", drawn, class_="cards")


def legend(runs: list[Run]) -> Html | None:
    if len(runs) < 2:
        return None
    return tag("p", [tagged(run, runs) for run in runs], class_="legends")
