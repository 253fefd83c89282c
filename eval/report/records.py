"""Results as records, files and tables.

A record has clip_benchmark's fields (`dataset, model, pretrained, task, metrics, language`), so
that its tools read `results.json`, and beside them what makes a number checkable: intervals, chance
level, counts, protocol version, options, content hashes of data and model, software versions.
Outcomes unit by unit lie in `results.items.safetensors`; with them `compare` pairs two models on
the same images.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
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
LOWER_IS_BETTER = (
    "_rank",
    "mean_distance",
    "linear_separability",
)  # of the scores that have outcomes by unit


def record(plugin: Plugin, encoder: Encoder, result: TaskResult) -> dict[str, Any]:
    """One task's result as plain values."""
    scores = {name: confidence.score(items) for name, items in result.items.items()}
    return {
        "dataset": scrubbed(result.dataset),
        "model": encoder.name,
        "pretrained": encoder.pretrained,
        "task": plugin.module.KNOWN_AS,
        "metrics": {**scores, **result.values},
        "language": getattr(plugin.options, "language", "en"),
        "label": plugin.label,
        "protocol": {
            "name": plugin.name,
            "version": plugin.module.VERSION,
            "options": without_secrets(plain(plugin.options)),
        },
        "intervals_95": {
            name: list(confidence.interval(items)) for name, items in result.items.items()
        },
        "chance": result.chance,
        "counts": result.counts,
        "data_sha256": result.digest,
        "model_sha256": encoder.fingerprint,
        "scale": encoder.scale,
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def write(path: Path, records: list[dict[str, Any]], items: dict[str, Tensor]) -> None:
    """Write results and the outcomes beside them, each whole or not at all. `items`: "label/score"
    -> [U, 2].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        items_path(path), save({name: value.contiguous() for name, value in items.items()})
    )
    write_atomically(
        path, (json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def items_path(results: Path) -> Path:
    """Where the outcomes of a results file lie."""
    return results.with_name(f"{results.stem}.items.safetensors")


def table(records: list[dict[str, Any]]) -> str:
    """The results for the eye: score, 95 % interval, chance; below, what was counted and what was
    left out.
    """
    rows = [("task", "data", "score", "value", "95 %", "chance")]
    for r in records:
        for name, value in r["metrics"].items():
            bounds = r["intervals_95"].get(name)
            interval = f"{bounds[0]:.4f} … {bounds[1]:.4f}" if bounds else ""
            chance = f"{r['chance'][name]:.4f}" if name in r["chance"] else ""
            rows.append((r["label"], r["dataset"], name, f"{value:.4f}", interval, chance))
    counts = [
        f"{r['label']}: " + ", ".join(f"{n:,} {what}" for what, n in r["counts"].items() if n)
        for r in records
    ]
    skipped = [
        f"{r['label']}: NOT COMPARABLE, {r['counts']['skipped']:,} left out"
        for r in records
        if r["counts"]["skipped"]
    ]
    skipped += [
        f"{r['label']}: NOT COMPARABLE, {r['counts']['unreadable']:,} images count as plain gray"
        for r in records
        if r["counts"].get("unreadable")
    ]
    return "\n".join([_aligned(rows), *counts, *skipped])


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def open_results(path: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Records and outcomes of a results file, or of a folder that holds results.json."""
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"no results at {file}; make them with `vlp eval MODEL --task … --out {file}`"
        ) from None
    except ValueError as error:
        raise DataError(f"{file} is not a results file: {error}") from error
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and "metrics" in r and "label" in r for r in records
    ):
        raise DataError(
            f"{file} is not a results file of `vlp eval`: expected a list of records with label and metrics"
        )
    items = {}
    if items_path(file).exists():
        with safe_open(items_path(file), framework="pt") as tensors:
            items = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return records, items


def compare(first: str, second: str) -> str:
    """A table of A − B for every score that both results hold on the same data, by the paired
    bootstrap.

    Records of other data, protocol versions or options are listed as not comparable; DataError if
    nothing is left.
    """
    (records_a, items_a), (records_b, items_b) = open_results(first), open_results(second)
    rows = [("task", "data", "score", "A", "B", "A − B", "verdict")]
    refused = []
    for a in records_a:
        b = next(
            (r for r in records_b if r["label"] == a["label"] and r["dataset"] == a["dataset"]),
            None,
        )
        reason = "only in A" if b is None else _why_not(a, b)
        if reason:
            refused.append(f"{a['label']} on {a['dataset']}: {reason}")
            continue
        for name in (n for n in a["metrics"] if n in b["metrics"]):
            key = f"{a['label']}/{name}"
            pair = (items_a[key], items_b[key]) if key in items_a and key in items_b else None
            rows.append(
                (
                    a["label"],
                    a["dataset"],
                    name,
                    *_difference(name, a["metrics"][name], b["metrics"][name], pair),
                )
            )
    if len(rows) == 1:
        raise DataError("nothing to compare: " + ("; ".join(refused) or "no record in A"))
    lines = [
        f"A = {first} ({records_a[0]['model']})",
        f"B = {second} ({records_b[0]['model']})",
        _aligned(rows),
    ]
    return "\n".join(lines + [f"not comparable: {line}" for line in refused])


def _why_not(a: dict[str, Any], b: dict[str, Any]) -> str:
    if a["data_sha256"] != b["data_sha256"]:
        return "the data differ (content hashes)"
    if a["protocol"]["version"] != b["protocol"]["version"]:
        return f"protocol versions differ ({a['protocol']['version']} and {b['protocol']['version']}); evaluate again"
    return ""


def _difference(
    name: str, a: float, b: float, pair: tuple[Tensor, Tensor] | None
) -> tuple[str, str, str, str]:
    if pair is None:
        return f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}", "no interval: no outcomes by unit"
    difference, low, high = confidence.paired_difference(*pair)
    better = (
        "B better"
        if (difference > 0) == any(part in name for part in LOWER_IS_BETTER)
        else "A better"
    )
    verdict = better if low > 0 or high < 0 else "no difference shown"
    return f"{a:.4f}", f"{b:.4f}", f"{difference:+.4f} ± {(high - low) / 2:.4f}", verdict
