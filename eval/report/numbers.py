"""The page's sections of numbers: summary, training curves, scores over steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlp.eval.report.charts import Series, curve
from vlp.eval.report.evidence import Evidence
from vlp.eval.report.markup import Html, more, note, number, section, table, tag
from vlp.eval.report.runs import NOT_SCALARS, Run
from vlp.privacy import private

FIRST = ("loss",)
SPEED = {
    "scale": "logit scale",
    "bias": "logit bias",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "samples_s": "samples a second",
    "data_wait": "share of time waiting for data",
    "space.modality_gap": "distance of the centroids, in training",
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
    "centroid_distance",
    "uniformity",
    "alignment",
    "separability",
    "effective_rank",
    "temperature",
)
HEADLINES = ("acc1", "acc", "recall@1", "mean_average_precision", "text_score", "image_score", "group_score",
             "centroid_distance", "alignment", "uniformity_image", "uniformity_text")  # fmt: skip

NAMES = {
    "acc": "accuracy",
    "acc1": "accuracy",
    "acc5": "top-5 accuracy",
    "mean_per_class_recall": "recall, mean over classes",
    "centroid_distance": "modality gap",
}


def name_of(metric: str) -> str:
    """A score's name for the eye."""
    return NAMES.get(metric, metric.replace("_", " ").replace("recall@", "R@"))


def tagged(run: Run, found: list[Run]) -> Html | None:
    """The run's name with its colour, where the page shows two."""
    place = found.index(run)
    return (
        tag("span", tag("i", class_=f"k{place}"), run.name, class_="legend")
        if len(found) > 1
        else None
    )


def summary(found: list[Run], evidence: list[Evidence | None]) -> Html:
    """Where each run stands, what is missing, and its scores beside chance."""
    blocks = []
    for run, seen in zip(found, evidence):
        missing = [*run.notes, *(seen.notes.get("model", []) if seen else [])]
        box = tag(
            "div",
            tag("h3", "What is missing"),
            tag("ul", [tag("li", private(m)) for m in missing]),
            class_="missing",
        )
        blocks += [
            tag("h3", tagged(run, found)) if len(found) > 1 else None,
            _facts(run),
            box if missing else None,
        ]
    return section("summary", "Summary", blocks, _score_tables(found), _choices(found, evidence))


def _facts(run: Run) -> Html:
    train = run.config.get("train") or {}
    total, batch = run.planned_steps, train.get("batch")
    speeds = sorted(v for _, v in run.scalar("samples_s"))
    losses, scales = run.scalar("loss"), run.scalar("scale")
    facts = [
        ("state", "finished" if run.finished else "unfinished"),
        ("steps", f"{run.last_step:,}" + (f" of {total:,}" if total else "")),
        ("samples seen", f"{run.last_step * batch:,}" if isinstance(batch, int) else "unknown"),
        (
            "objective",
            ", ".join(run.config["objective"])
            if isinstance(run.config.get("objective"), dict)
            else "unknown",
        ),
        ("last loss", number(losses[-1][1]) if losses else "none"),
        ("logit scale", number(scales[-1][1]) if scales else "unknown"),
        (
            "newest checkpoint",
            f"step {run.state['step']:,}" if "step" in run.state else "none that can be read",
        ),
        ("samples a second", number(speeds[len(speeds) // 2]) if speeds else "unknown"),
    ]
    return tag("dl", [tag("div", tag("dt", k), tag("dd", v)) for k, v in facts], class_="facts")


def _records(run: Run) -> list[dict[str, Any]]:
    """The final records, or what metrics.jsonl last said in the same form (it knows no chance and
    no interval).
    """
    if run.results:
        return run.results
    records: dict[str, dict[str, Any]] = {}
    for key, value in run.last_scores().items():
        label, _, metric = key.partition(".")
        records.setdefault(label, {"label": label, "metrics": {}, "chance": {}, "dataset": ""})[
            "metrics"
        ][metric] = value
    return list(records.values())


def _score_tables(found: list[Run]) -> list[Html]:
    per_run = [{r["label"]: r for r in _records(run)} for run in found]
    labels = list(dict.fromkeys(label for records in per_run for label in records))
    if not labels:
        return [note("No scores: nothing has been evaluated, or the run has no eval section.")]
    tables = []
    for label in labels:
        own = [records.get(label) for records in per_run]
        metrics = list(dict.fromkeys(m for r in own if r for m in r["metrics"]))
        main = [m for m in metrics if headline(m)] or metrics[:3]
        rest = [m for m in metrics if m not in main]
        datasets = ", ".join(
            dict.fromkeys(private(str(r["dataset"])) for r in own if r and r.get("dataset"))
        )
        tables += [
            tag("h3", label, tag("small", datasets) if datasets else None),
            _scores(found, own, main),
            more("all scores", _scores(found, own, rest)) if rest else None,
        ]
    if len(found) > 1:
        tables.append(
            _remark(
                "Whether a difference is more than chance: `vlp eval --compare`, on results of `vlp eval --out`."
            )
        )
    if not all(run.results for run in found):
        tables.append(
            _remark(
                "Chance and intervals are known from results.json, which a run writes after its last step."
            )
        )
    return tables


def _remark(text: str) -> Html:
    return tag("p", text, class_="small")


def headline(metric: str) -> bool:
    """Whether a score is one that a table opens with."""
    return metric in HEADLINES or metric.endswith("recall@1")


def _scores(found: list[Run], own: list[dict[str, Any] | None], metrics: list[str]) -> Html:
    """A row a score: its value for every run with the 95 % interval below it, their difference, and
    chance.
    """
    chances = [
        next((r["chance"][m] for r in own if r and m in r.get("chance", {})), None) for m in metrics
    ]
    known = any(c is not None for c in chances)
    rows = []
    for metric, chance in zip(metrics, chances):
        values = [r["metrics"].get(metric) if r else None for r in own]
        row: list[Any] = [[name_of(metric), *(_bar(v, chance, i) for i, v in enumerate(values))]]
        for record, value in zip(own, values):
            bounds = (record or {}).get("intervals_95", {}).get(metric)
            row.append(
                [
                    _value(value, chance),
                    tag("small", " – ".join(_value(v, chance) for v in bounds)) if bounds else None,
                ]
            )
        if len(found) > 1:
            both = None not in values
            row.append(
                f"{(values[0] - values[1]) * (100 if chance is not None else 1):+.4g}"
                if both
                else "–"
            )
        rows.append([*row, _value(chance, chance) if chance is not None else ""] if known else row)
    bounded = any(r and r.get("intervals_95") for r in own)
    head = [
        "score",
        *(tagged(run, found) or ("value, 95 %" if bounded else "value") for run in found),
    ]
    return tag(
        "div",
        table([*head, *["difference"] * (len(found) > 1), *["chance"] * known], rows),
        class_="scores",
    )


def _value(value: float | None, chance: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if chance is not None else number(value)


def _bar(value: float | None, chance: float | None, color: int = 0) -> Html | None:
    """A share of one with a tick at chance."""
    if value is None or chance is None or not 0 <= value <= 1:
        return None
    mark = tag("i", class_="mark", style=f"left:{chance * 100:.1f}%")
    return tag(
        "span",
        tag("b", style=f"width:{value * 100:.1f}%", class_=f"k{color}"),
        mark,
        class_="bar",
        aria_hidden="true",
    )


def _choices(found: list[Run], evidence: list[Evidence | None]) -> list[Html]:
    """How often the true caption was chosen in the sets with negatives: scored for this page, on
    its sample.
    """
    sets = [{s.name: s for s in seen.examples} if seen else {} for seen in evidence]
    names = list(dict.fromkeys(name for own in sets for name in own))
    if not names:
        return []
    records = [
        {
            "metrics": {n: s.accuracy for n, s in own.items()},
            "chance": {n: s.chance for n, s in own.items()},
        }
        if own
        else None
        for own in sets
    ]
    largest = max(s.n for own in sets for s in own.values())
    return [
        tag("h3", "captions against negatives", tag("small", f"at most {largest} of a set")),
        _scores(found, records, names),
    ]


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
