"""Two results side by side: A − B of every score on the same data, with paired intervals."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlp.eval import confidence
from vlp.eval.pictures import DataError
from vlp.eval.report.records import aligned, open_results

# of the scores that have outcomes by unit
LOWER_IS_BETTER = ("_rank", "mean_distance", "linear_separability")


def compare(first: str, second: str) -> str:
    """A table of A − B for every score that both results hold on the same data, by the paired
    bootstrap.

    Records of other data, protocol versions or options are listed as not comparable; DataError if
    nothing is left.
    """
    (records_a, items_a), (records_b, items_b) = open_results(first), open_results(second)
    rows: list[tuple[str, ...]] = [("task", "data", "score", "A", "B", "A − B", "verdict")]
    refused = []
    for a in records_a:
        # Data, protocol and labels must agree: a difference of scores is then one of the models.
        b = next((record for record in records_b if _same_task(a, record)), None)
        reason = "only in A" if b is None else _why_not(a, b)
        if b is None or reason:
            refused.append(f"{a['label']} on {a['dataset']}: {reason}")
            continue

        for name, value in a["metrics"].items():
            if name not in b["metrics"]:
                continue
            key = f"{a['label']}/{name}"
            pair = None
            if key in items_a and key in items_b:
                pair = (items_a[key], items_b[key])
            difference = _difference(name, value, b["metrics"][name], pair)
            rows.append((a["label"], a["dataset"], name, *difference))

    if len(rows) == 1:
        raise DataError("nothing to compare: " + ("; ".join(refused) or "no record in A"))
    lines = [
        f"A = {first} ({records_a[0]['model']})",
        f"B = {second} ({records_b[0]['model']})",
        aligned(rows),
    ]
    return "\n".join(lines + [f"not comparable: {line}" for line in refused])


def _same_task(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["label"] == b["label"] and a["dataset"] == b["dataset"]


def _why_not(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Why two records cannot be compared; "" if they can."""
    if a["data_sha256"] != b["data_sha256"]:
        return "the data differ (content hashes)"
    version_a, version_b = a["protocol"]["version"], b["protocol"]["version"]
    if version_a != version_b:
        return f"protocol versions differ ({version_a} and {version_b}); evaluate again"
    return ""


def _difference(
    name: str, a: float, b: float, pair: tuple[Tensor, Tensor] | None
) -> tuple[str, str, str, str]:
    """(A, B, A − B, verdict) of one score. `pair`: outcomes [U, 2] of both, or None."""
    if pair is None:
        return f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}", "no interval: no outcomes by unit"

    difference, low, high = confidence.paired_difference(*pair)
    lower_is_better = any(part in name for part in LOWER_IS_BETTER)
    better = "B better" if (difference > 0) == lower_is_better else "A better"

    # The interval of the difference decides, not whether the two intervals overlap.
    verdict = better if low > 0 or high < 0 else "no difference shown"
    return f"{a:.4f}", f"{b:.4f}", f"{difference:+.4f} ± {(high - low) / 2:.4f}", verdict
