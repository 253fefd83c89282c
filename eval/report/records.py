"""Results as records, files and tables.

A record has clip_benchmark's fields (`dataset, model, pretrained, task, metrics, language`), and
beside them what makes a number checkable: intervals, chance level, counts, protocol version,
options, content hashes of data and model, software versions. `results.json` has the same fields
over all its `results`, so that `clip_benchmark build` reads it as one row, and a folder with a file
a result as one row each. Outcomes unit by unit lie in `results.items.safetensors`; with them
`vlp.eval.report.comparison` pairs two models on the same images.
"""

from __future__ import annotations

import json
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from vlp.eval import confidence
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult
from vlp.files import write_atomically
from vlp.plugin import Plugin
from vlp.privacy import scrubbed, without_secrets
from vlp.schema import plain

PACKAGES = ("vlp", "torch", "torchvision", "open_clip_torch", "transformers", "pillow")
# the fields of its result files
CLIP_BENCHMARK = ("dataset", "model", "pretrained", "task", "metrics", "language")


# --- files ----------------------------------------------------------------------------------------


def record(task: Plugin, encoder: Encoder, result: TaskResult) -> dict[str, Any]:
    """One task's result as plain values."""
    # Scores of units are computed here, so that score and interval come from the same numbers.
    scores = {name: confidence.score(items) for name, items in result.items.items()}
    intervals = {name: list(confidence.interval(items)) for name, items in result.items.items()}
    intervals |= {name: list(bounds) for name, bounds in result.intervals.items()}
    protocol = {
        "name": task.name,
        "version": task.module.VERSION,
        "options": without_secrets(plain(task.options)),
    }
    return {
        # clip_benchmark's
        "dataset": scrubbed(result.dataset),
        "model": encoder.name,
        "pretrained": encoder.pretrained,
        "task": task.module.KNOWN_AS,
        "metrics": {**scores, **result.values},
        "language": getattr(task.options, "language", "en"),
        # ours
        "label": task.label,
        "protocol": protocol,
        "intervals_95": intervals,
        "chance": result.chance,
        "counts": result.counts,
        "data_sha256": result.digest,
        "model_sha256": encoder.fingerprint,
        "width": encoder.width,
        "scale": encoder.scale,
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def put(
    out: str,  # a file, or with a slash at its end a folder
    records: list[dict[str, Any]],
    items: dict[str, Tensor],  # "label/score" -> [U, 2]
    suite: dict[str, Any] | None = None,  # as for `write`
) -> None:
    """Write results to a file, or one file a result to a folder, and say so."""
    if out.endswith("/"):
        write_each(Path(out), records, items)
    else:
        write(Path(out), records, items, suite)
    print(f"written: {out}")


def write(
    path: Path,
    records: list[dict[str, Any]],
    items: dict[str, Tensor],  # "label/score" -> [U, 2]
    suite: dict[str, Any] | None = None,  # what a suite's main scores come to
) -> None:
    """Write results and the outcomes beside them, each whole or not at all."""
    content = _joined(records)
    if suite is not None:
        content["suite"] = suite
    _write(path, content, items)


def write_each(folder: Path, records: list[dict[str, Any]], items: dict[str, Tensor]) -> None:
    """Write one file a result, FOLDER/LABEL.json, with its outcomes beside it."""
    for record in records:
        label = record["label"]
        outcomes = {name: value for name, value in items.items() if name.startswith(f"{label}/")}
        _write(folder / f"{label}.json", record, outcomes)


def _joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """All results as one record of clip_benchmark's; scores of several tasks bear their labels."""
    metrics: dict[str, float] = {}
    for record in records:
        prefix = f"{record['label']}/" if len(records) > 1 else ""
        metrics |= {f"{prefix}{name}": value for name, value in record["metrics"].items()}

    def joined(field: str) -> str:
        # Different values in their order: one model, but often several sets and tasks.
        return ", ".join(dict.fromkeys(str(record.get(field, "")) for record in records))

    fields = {name: joined(name) for name in CLIP_BENCHMARK if name != "metrics"}
    return {**fields, "metrics": metrics, "results": records}


def _write(path: Path, content: dict[str, Any], items: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    # The outcomes first: results without them would look complete and compare worse.
    outcomes = save({name: value.contiguous() for name, value in items.items()})
    write_atomically(items_path(path), outcomes)

    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def items_path(results: Path) -> Path:
    """Where the outcomes of a results file lie."""
    return results.with_name(f"{results.stem}.items.safetensors")


Opened = tuple[dict[str, Any], dict[str, Tensor]]  # a record, and its outcomes by score


def open_results(path: str) -> list[Opened]:
    """The records of a results file, or of a folder with results.json or a file a result, each with
    its outcomes.
    """
    file = Path(path)
    files = [file / "results.json" if file.is_dir() else file]
    if file.is_dir() and not files[0].exists():
        files = sorted(file.glob("*.json")) or files
    return list(chain.from_iterable(map(_open, files)))


def records_in(content: Any) -> Any:
    """The records in a results file's content: a list as training writes it, or the `results` of
    `vlp eval`, or one record; anything else as it is.
    """
    if isinstance(content, dict) and "results" in content:
        return content["results"]
    return [content] if _is_record(content) else content


def _open(file: Path) -> list[Opened]:
    """Records and outcomes of one file; a DataError says what is there instead."""
    try:
        records = records_in(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(
            f"no results at {file}; make them with `vlp eval MODEL --task … --out {file}`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a results file: {error}") from error
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise DataError(
            f"{file} is not a results file of `vlp eval`: "
            "expected a list of records with label and metrics, each a number"
        )

    # By record: those of several files may bear one label.
    items = _outcomes(items_path(file))
    opened = []
    for record in records:
        keys = {name: f"{record['label']}/{name}" for name in record["metrics"]}
        opened.append((record, {name: items[key] for name, key in keys.items() if key in items}))
    return opened


def _outcomes(path: Path) -> dict[str, Tensor]:
    """The outcomes of a file, [U, 2] by "label/score"; none where it is absent: nothing is paired
    then.
    """
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own kinds, and the system's
        raise DataError(
            f"{path} is damaged ({error}); evaluate again, or remove it: scores are then compared "
            "without intervals"
        ) from None


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or "label" not in value:
        return False
    metrics = value.get("metrics")
    return isinstance(metrics, dict) and all(
        isinstance(score, (int, float)) for score in metrics.values()
    )


# --- for the eye ----------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> str:
    """The results for the eye: score, 95 % interval, chance; below, what was counted and what was
    left out.
    """
    rows: list[tuple[str, ...]] = [("task", "data", "score", "value", "95 %", "chance")]
    for of_task in records:
        rows += _rows(of_task)

    counts = []
    for of_task in records:
        counted = [f"{n:,} {noun}" for noun, n in of_task["counts"].items() if n]
        counts.append(f"{of_task['label']}: {', '.join(counted)}")

    # Last, so that nobody overlooks them.
    return "\n".join([aligned(rows), *counts, *not_comparable(records)])


def not_comparable(records: list[dict[str, Any]]) -> list[str]:
    """A line for every result whose score is not over the whole set as it was published."""
    skipped, gray = [], []
    for of_task in records:
        warning = f"{of_task['label']}: NOT COMPARABLE"
        if of_task["counts"]["skipped"]:
            skipped.append(f"{warning}, {of_task['counts']['skipped']:,} left out")
        if of_task["counts"].get("unreadable"):
            n_gray = of_task["counts"]["unreadable"]
            gray.append(f"{warning}, {n_gray:,} images count as plain gray")
    return skipped + gray


def _rows(of_task: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a score: value, interval, chance."""
    rows: list[tuple[str, ...]] = []
    for name, value in of_task["metrics"].items():
        bounds = of_task["intervals_95"].get(name)
        interval = f"{bounds[0]:.4f} … {bounds[1]:.4f}" if bounds else ""
        chance = f"{of_task['chance'][name]:.4f}" if name in of_task["chance"] else ""
        row = (of_task["label"], of_task["dataset"], name, f"{value:.4f}", interval, chance)
        rows.append(row)
    return rows


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Cells in columns of equal width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
