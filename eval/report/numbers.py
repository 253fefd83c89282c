"""The page's section of numbers: where a run stands, and its scores beside chance."""

from __future__ import annotations

from itertools import chain
from typing import Any

from vlp.eval.report.evidence import Evidence
from vlp.eval.report.markup import Html, more, note, number, section, table, tag
from vlp.eval.report.runs import Run
from vlp.pretrained.runs import AVERAGED
from vlp.privacy import private

# scores that a table opens with
HEADLINES = (
    "acc1", "acc", "recall@1", "mean_average_precision", "text_score", "image_score", "group_score",
    "modality_gap", "alignment", "uniformity_image", "uniformity_text",
)  # fmt: skip

NAMES = {
    "acc": "accuracy",
    "acc1": "accuracy",
    "acc5": "top-5 accuracy",
    "mean_per_class_recall": "recall, mean over classes",
}
Records = list[dict[str, Any] | None]  # of each run, or None


def label_and_metric(key: str) -> tuple[str, str]:
    """The parts of a score "label.metric"; a label of the moving average has a point itself."""
    prefix = AVERAGED if key.startswith(AVERAGED) else ""
    label, _, metric = key.removeprefix(prefix).partition(".")
    return prefix + label, metric


def name_of(metric: str) -> str:
    """A score's name for the eye."""
    return NAMES.get(metric, metric.replace("_", " ").replace("recall@", "R@"))


def headline(metric: str) -> bool:
    """Whether a score is one that a table opens with."""
    return metric in HEADLINES or metric.endswith("recall@1")


def tagged(run: Run, runs: list[Run]) -> Html | None:
    """The run's name with its colour, where the page shows two."""
    if len(runs) < 2:
        return None
    return tag("span", tag("i", class_=f"k{runs.index(run)}"), run.name, class_="legend")


# --- summary --------------------------------------------------------------------------------------


def summary(runs: list[Run], evidence: list[Evidence | None]) -> Html:
    """Where each run stands, what is missing, and its scores beside chance."""
    blocks = []
    for run, of_model in zip(runs, evidence):
        missing = [*run.notes]
        if of_model:
            missing += of_model.notes.get("model", [])
        heading = tag("h3", tagged(run, runs)) if len(runs) > 1 else None
        blocks += [heading, _facts(run), _missing_box(missing)]
    return section("summary", "Summary", blocks, _score_tables(runs), _choices(runs, evidence))


def _missing_box(missing: list[str]) -> Html | None:
    """What the run lacks, as a list."""
    if not missing:
        return None
    items = [tag("li", private(text)) for text in missing]
    return tag("div", tag("h3", "What is missing"), tag("ul", items), class_="missing")


def _facts(run: Run) -> Html:
    """A list of what a run is and how far it came."""
    total = run.planned_steps
    batch = (run.config.get("train") or {}).get("batch")
    objective = run.config.get("objective")
    losses, scales = run.scalar("loss"), run.scalar("scale")

    # Their median is shown: single steps compile, evaluate or wait for data.
    speeds = sorted(value for _, value in run.scalar("samples_s"))

    of_total = f" of {total:,}" if total else ""
    checkpoint = "none that can be read"
    if "step" in run.state:
        checkpoint = f"step {run.state['step']:,}"
    facts = {
        "state": "finished" if run.finished else "unfinished",
        "steps": f"{run.last_step:,}{of_total}",
        "samples seen": f"{run.last_step * batch:,}" if isinstance(batch, int) else "unknown",
        "objective": ", ".join(objective) if isinstance(objective, dict) else "unknown",
        "last loss": number(losses[-1][1]) if losses else "none",
        "logit scale": number(scales[-1][1]) if scales else "unknown",
        "newest checkpoint": checkpoint,
        "samples a second": number(speeds[len(speeds) // 2]) if speeds else "unknown",
    }
    items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    return tag("dl", items, class_="facts")


# --- score tables ---------------------------------------------------------------------------------


def records_of(run: Run) -> dict[str, dict[str, Any]]:
    """By label the final records, or what metrics.jsonl last said in the same form (it knows no
    chance and no interval).
    """
    if run.results:
        return {record["label"]: record for record in run.results}

    # A run that is still going has no results.json.
    records: dict[str, dict[str, Any]] = {}
    for key, value in run.last_scores().items():
        label, metric = label_and_metric(key)
        empty = {"label": label, "metrics": {}, "chance": {}, "dataset": ""}
        records.setdefault(label, empty)["metrics"][metric] = value
    return records


def _score_tables(runs: list[Run]) -> list[Html | None]:
    """A heading and tables for every task, then what would make the numbers say more."""
    # Tasks of either run, in the order of the first.
    per_run = [records_of(run) for run in runs]
    labels = list(dict.fromkeys(chain.from_iterable(per_run)))
    if not labels:
        return [note("No scores: nothing has been evaluated, or the run has no eval section.")]

    tables: list[Html | None] = []
    for label in labels:
        tables += _tables_of_task(runs, label, [records.get(label) for records in per_run])

    if len(runs) > 1:
        tables.append(
            _remark(
                "Whether a difference is more than chance: `vlp eval --compare`, "
                "on results of `vlp eval --out`."
            )
        )
    if not all(run.results for run in runs):
        tables.append(
            _remark(
                "Chance and intervals are known from results.json, "
                "which a run writes after its last step."
            )
        )
    return tables


def _tables_of_task(runs: list[Run], label: str, records: Records) -> list[Html | None]:
    """The task's heading, its main scores, and the others folded away."""
    known = [record for record in records if record]
    metrics = list(dict.fromkeys(chain.from_iterable(record["metrics"] for record in known)))

    # A task without headlines opens with its first scores.
    main = [metric for metric in metrics if headline(metric)] or metrics[:3]
    rest = [metric for metric in metrics if metric not in main]

    # Both runs may have been scored on sets of other names.
    names = [private(str(record["dataset"])) for record in known if record.get("dataset")]
    datasets = ", ".join(dict.fromkeys(names))
    return [
        tag("h3", label, tag("small", datasets) if datasets else None),
        _scores(runs, records, main),
        more("all scores", _scores(runs, records, rest)) if rest else None,
    ]


def _remark(text: str) -> Html:
    return tag("p", text, class_="small")


def _scores(runs: list[Run], records: Records, metrics: list[str]) -> Html:
    """A row a score: its value for every run with the 95 % interval below it, their difference, and
    chance.
    """
    chances = [_chance(records, metric) for metric in metrics]
    chance_known = any(chance is not None for chance in chances)
    rows = []
    for metric, chance in zip(metrics, chances):
        row = _row(records, metric, chance)
        if chance_known:
            row.append(_value(chance, chance) if chance is not None else "")
        rows.append(row)

    bounded = any(record and record.get("intervals_95") for record in records)
    value_head = "value, 95 %" if bounded else "value"
    head = ["score", *(tagged(run, runs) or value_head for run in runs)]
    if len(runs) > 1:
        head.append("difference")
    if chance_known:
        head.append("chance")
    return tag("div", table(head, rows), class_="scores")


def _chance(records: Records, metric: str) -> float | None:
    """The score's chance level, from the first record that states it."""
    for record in records:
        if record and metric in record.get("chance", {}):
            return record["chance"][metric]
    return None


def _row(records: Records, metric: str, chance: float | None) -> list[Any]:
    """A score's name with bars, each run's value with its interval, and of two the difference."""
    # A run that was not scored on it has a dash.
    values = [record["metrics"].get(metric) if record else None for record in records]
    bars = [_bar(value, chance, i) for i, value in enumerate(values)]
    row: list[Any] = [[name_of(metric), *bars]]
    for record, value in zip(records, values):
        bounds = (record or {}).get("intervals_95", {}).get(metric)
        interval = None
        if bounds:
            interval = tag("small", " – ".join(_value(bound, chance) for bound in bounds))
        row.append([_value(value, chance), interval])

    if len(values) > 1:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            row.append("–")
        else:
            unit = 100 if chance is not None else 1  # shares are shown in percent
            row.append(f"{(known[0] - known[1]) * unit:+.4g}")
    return row


def _value(value: float | None, chance: float | None) -> str:
    """A share in percent where chance is known, else a number."""
    if value is None:
        return "–"
    return f"{value:.1%}" if chance is not None else number(value)


def _bar(value: float | None, chance: float | None, color: int = 0) -> Html | None:
    """A share of one with a tick at chance."""
    if value is None or chance is None or not 0 <= value <= 1:
        return None
    filled = tag("b", style=f"width:{value * 100:.1f}%", class_=f"k{color}")
    mark = tag("i", class_="mark", style=f"left:{chance * 100:.1f}%")
    return tag("span", filled, mark, class_="bar", aria_hidden="true")


def _choices(runs: list[Run], evidence: list[Evidence | None]) -> list[Html]:
    """How often the true caption was chosen in the sets with negatives: scored for this page, on
    its sample.
    """
    records: Records = []
    names: dict[str, None] = {}
    largest = 0
    for of_model in evidence:
        sets = {one.name: one for one in of_model.examples} if of_model else {}
        names |= dict.fromkeys(sets)
        largest = max([largest, *(one.n for one in sets.values())])
        record = {
            "metrics": {name: one.accuracy for name, one in sets.items()},
            "chance": {name: one.chance for name, one in sets.items()},
        }
        records.append(record if sets else None)

    if not names:
        return []
    size = tag("small", f"at most {largest} of a set")
    heading = tag("h3", "captions against negatives", size)
    return [heading, _scores(runs, records, list(names))]
