"""The page's sections over steps: training curves, scores."""

from __future__ import annotations

from collections.abc import Iterable

from vlp.eval.report.charts import Series, curve
from vlp.eval.report.markup import Html, more, note, number, section, table, tag
from vlp.eval.report.numbers import headline, name_of, tagged
from vlp.eval.report.runs import NOT_SCALARS, Run

FIRST = ("loss",)
SPEED = {
    "scale": "logit scale",
    "bias": "logit bias",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "samples_s": "samples a second",
    "data_wait": "share of time waiting for data",
    "space.gap": "distance of the centroids, in training",
    "space.alignment": "alignment, in training",
    "space.uniformity_image": "uniformity of images, in training",
    "space.uniformity_text": "uniformity of texts, in training",
    "valid.negatives": "share of hard captions that are valid",
    "valid.counterfactual": "share of rows that count",
    "log_n": "loss of uninformative scores, log n",
}
COUNTERS = {
    "bad_samples": "damaged samples",
    "truncated_captions": "captions cut to the text tower's length",
    "left_out_samples": "samples left out",
    "waited_s": "seconds waited for data",
}
GEOMETRY = (
    "modality_gap",
    "uniformity",
    "alignment",
    "separability",
    "effective_rank",
    "temperature",
)


def curves(found: list[Run]) -> Html:
    """Loss and terms, then how training went: scale, learning rate, gradient, throughput, waiting."""
    keys = list(
        dict.fromkeys(
            k for run in found for record in run.train for k in record if k not in NOT_SCALARS
        )
    )
    terms = [k for k in keys if k not in FIRST and k not in SPEED and k not in COUNTERS]
    if len(terms) == 1 and all(run.scalar(terms[0]) == run.scalar("loss") for run in found):
        terms = []  # one term of weight 1 is the loss
    order = [k for k in (*FIRST, *terms, *SPEED) if k in keys]
    if not order:
        return section("curves", "Training", note("No curves: no training record has been logged."))
    counted = [k for k in COUNTERS if any(v for run in found for _, v in run.scalar(k)[-1:])]
    cards = _cards(
        ((k, SPEED.get(k, k.replace("_", " ")), run_points(found, k)) for k in order), found
    )
    rows = [
        [COUNTERS[k], *(number(run.scalar(k)[-1][1]) if run.scalar(k) else "–" for run in found)]
        for k in counted
    ]
    table_ = (
        table(["counted over the run", *(tagged(run, found) or "" for run in found)], rows)
        if rows
        else None
    )
    return section(
        "curves",
        "Training",
        _legend(found),
        cards,
        table_,
        lead="By optimiser step; beside a title the latest value.",
    )


def run_points(found: list[Run], key: str) -> list[list[tuple[float, float]]]:
    """A training scalar of every run."""
    return [run.scalar(key) for run in found]


def scores(found: list[Run]) -> Html:
    """Evaluation scores over steps; the geometry of the embeddings has its own cards."""
    keys = list(
        dict.fromkeys(
            k for run in found for record in run.evals for k in record if k not in NOT_SCALARS
        )
    )
    keys = [k for k in keys if not any(g in k.partition(".")[2] for g in GEOMETRY)]
    if not keys:
        why = (
            "the configuration has no eval section"
            if not any(r.config.get("eval") for r in found)
            else "none was logged yet"
        )
        return section("scores", "Scores over steps", note(f"No evaluation: {why}."))
    if max(len(run.evals) for run in found) < 2:
        return section(
            "scores",
            "Scores over steps",
            note("One evaluation so far; its scores are in the summary."),
        )
    main = [k for k in keys if headline(k.partition(".")[2])] or keys[:4]
    rest = [k for k in keys if k not in main]
    folded = more(f"{len(rest)} more scores", score_cards(found, rest)) if rest else None
    return section(
        "scores",
        "Scores over steps",
        _legend(found),
        score_cards(found, main),
        folded,
        lead="On held-out data. The dashed line is chance, where results.json states it.",
    )


def score_cards(found: list[Run], keys: list[str]) -> Html:
    """A card a score, with its chance level where known."""
    chance = {
        f"{r['label']}.{m}": c
        for run in found
        for r in run.results
        for m, c in r.get("chance", {}).items()
    }
    titles = {k: f"{k.partition('.')[0]} · {name_of(k.partition('.')[2])}" for k in keys}
    return _cards(((k, titles[k], [run.score(k) for run in found]) for k in keys), found, chance)


def _cards(
    wanted: Iterable[tuple[str, str, list[list[tuple[float, float]]]]],
    found: list[Run],
    chance: dict[str, float] | None = None,
) -> Html:
    cards = []
    for key, title, points in wanted:
        series = [Series(run.name, p, i) for i, (run, p) in enumerate(zip(found, points))]
        cards.append(curve(title, series, (chance or {}).get(key)))
    return tag("div", cards, class_="cards")


def _legend(found: list[Run]) -> Html | None:
    return (
        tag("p", [tagged(run, found) for run in found], class_="legends")
        if len(found) > 1
        else None
    )
