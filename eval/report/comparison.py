"""Two results side by side: A − B of every score on the same data, with paired intervals.

Two records are compared where the content hash of their data, the version of the protocol and all
settings are the same. A setting is every option of a task but those that say where data lie and how
they are read (`OF_DATA`): what these come to is in the hash.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from torch import Tensor

from vlp import plugin, watch
from vlp.data.captions import Texts
from vlp.data.tables import TableOptions
from vlp.eval import confidence
from vlp.eval.pictures import DataError
from vlp.eval.report.records import aligned, open_results
from vlp.schema import plain

OF_DATA = frozenset(
    {
        *("data", "images", "split", "train_split", "val_split", "annotations", "missing"),
        *("classes", "templates", "partial", "language", "languages", "captions_per_image"),
        *("shifted", "shifted_images", "shifted_split", "reference", "text_column", "grade_column"),
        *(key.name for key in fields(TableOptions)),
        *(key.name for key in fields(Texts)),
        "modalities",
    }
)
# Where nothing was hashed, the places of the data have to be the same.
_NO_SETTINGS_UNHASHED = frozenset({"language", "missing"})


def compare(first: str, second: str) -> str:
    """A table of A − B for every score that both results hold on the same data, by the paired
    bootstrap.

    Records of other data, protocol versions or settings are listed as not comparable; DataError if
    nothing is left.
    """
    opened_a, opened_b = open_results(first), open_results(second)
    rows: list[tuple[str, ...]] = [("task", "data", "score", "A", "B", "A − B", "verdict")]
    refused = []
    for a, items_a in opened_a:
        # Data, protocol and labels must agree: a difference of scores is then one of the models.
        candidates = [(why_not(a, b), b, items_b) for b, items_b in opened_b if _same_task(a, b)]
        candidates.sort(key=lambda candidate: bool(candidate[0]))
        reason, b, items_b = candidates[0] if candidates else ("only in A", {}, {})
        if reason:
            refused.append(f"{a['label']} on {a.get('dataset', 'no data')}: {reason}")
            continue

        for name in [name for name in a["metrics"] if name in b["metrics"]]:
            pair = None
            if name in items_a and name in items_b:
                pair = (items_a[name], items_b[name])
            difference = _difference(name, a["metrics"][name], b["metrics"][name], pair)
            rows.append((a["label"], a["dataset"], name, *difference))

    if len(rows) == 1:
        raise DataError("nothing to compare: " + ("; ".join(refused) or "no record in A"))
    lines = [
        f"A = {first} ({opened_a[0][0].get('model', '')})",
        f"B = {second} ({opened_b[0][0].get('model', '')})",
        aligned(rows),
    ]
    return "\n".join(lines + [f"not comparable: {line}" for line in refused])


def _same_task(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["label"] == b["label"] and a.get("dataset") == b.get("dataset")


# --- what must agree ------------------------------------------------------------------------------


def why_not(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Why two records cannot be compared; "" if they can."""
    for name, record in (("A", a), ("B", b)):
        if "error" in record:  # in training
            return f"failed in {name}: {record['error']}"

    # A suite's sets bear their own names, whatever the task.
    task_a, task_b = a["protocol"].get("name"), b["protocol"].get("name")
    if task_a != task_b:
        return f"the tasks differ ({task_a} and {task_b})"

    # Before the options: what another version calls them, or hashes, says nothing.
    version_a, version_b = a["protocol"]["version"], b["protocol"]["version"]
    if version_a != version_b:
        return f"protocol versions differ ({version_a} and {version_b}); evaluate again"

    hash_a, hash_b = a["data_sha256"], b["data_sha256"]
    are_hashed = bool(hash_a and hash_b)
    different = _different_settings(a, b, OF_DATA if are_hashed else _NO_SETTINGS_UNHASHED)
    if different:
        hint = "" if are_hashed else ", and the data were not hashed: evaluate with `vlp eval`"
        return f"options differ: {', '.join(different)}{hint}"
    if are_hashed and hash_a != hash_b:
        return "the data differ (content hashes)"
    return ""


def _different_settings(
    a: dict[str, Any], b: dict[str, Any], no_settings: frozenset[str]
) -> list[str]:
    """Every setting that two records of one task do not share, with both values."""
    options_a, options_b = _options(a), _options(b)
    different = []
    for name in dict.fromkeys([*options_a, *options_b]):
        values = (options_a.get(name), options_b.get(name))
        if name not in no_settings and values[0] != values[1]:
            different.append(f"{name} ({values[0]} and {values[1]})")
    return different


def _options(record: dict[str, Any]) -> dict[str, Any]:
    """The options of a record; those that a task did not have yet at their defaults."""
    protocol = record["protocol"]
    try:
        keys = fields(plugin.load("vlp.eval.tasks", protocol.get("name", "")).Options)
    except ValueError:  # a task that is not installed here
        keys = ()
    defaults = {key.name: plain(_default(key)) for key in keys}
    return defaults | protocol.get("options", {})


def _default(key: Field[Any]) -> Any:
    """What an option is unless said."""
    if key.default_factory is not MISSING:
        return key.default_factory()
    return None if key.default is MISSING else key.default


# --- the difference -------------------------------------------------------------------------------


def _difference(
    name: str, a: float, b: float, pair: tuple[Tensor, Tensor] | None
) -> tuple[str, str, str, str]:
    """(A, B, A − B, verdict) of one score. `pair`: outcomes [U, 2] of both, or None."""
    if pair is None:
        return f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}", "no interval: no outcomes by unit"

    difference, low, high = confidence.paired_difference(*pair)
    lower_is_better = watch.better(name) == "min"
    better = "B better" if (difference > 0) == lower_is_better else "A better"

    # The interval of the difference decides, not whether the two intervals overlap.
    verdict = better if low > 0 or high < 0 else "no difference shown"
    return f"{a:.4f}", f"{b:.4f}", f"{difference:+.4f} ± {(high - low) / 2:.4f}", verdict
