"""`vlp demo`: the whole path on generated scenes, from nothing to an exported model and a report,
in a few minutes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from vlp import config, log
from vlp.data_tools import scenes
from vlp.eval.evaluation import in_training
from vlp.eval.report import page
from vlp.export.folder import export_run
from vlp.files import write_atomically
from vlp.locks import held
from vlp.train import train

RECORD = "demo.json"  # of what a demo wrote: path -> size and time
PLACES = (
    "data", "checkpoints", "export",
    "config.yaml", "metrics.jsonl", "results.json", "report.html",
)  # fmt: skip
TIMES_CHANCE = 5  # the demo fails below this
_SHOWN_PLACES = {  # what the summary points to
    "data": "data",
    "run": ".",
    "results": "results.json",
    "curves": "metrics.jsonl",
    "model": "export",
    "report": "report.html",
}


def demo(out: Path) -> int:
    """Make data, train configs/demo.yaml, evaluate, export and report into `out`; 0 if every score
    is at least 5 times chance, else 1.

    What an earlier demo wrote to `out` is removed first, and nothing else: a file of somebody
    else's that would be in the way is named and refused.
    """
    # Two demos in one folder would remove each other's files.
    with held(out, advice="Wait until it is done, or choose another folder with --out"):
        return _demo(out)


def _demo(out: Path) -> int:
    """`demo`, in a folder that is held."""
    remove_earlier(out)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    # Also of a demo that was stopped half-way, so that the next one may remove its files.
    try:
        messages = make(out)
    finally:
        record = {str(path.relative_to(out)): _stamp(path) for path in _in_places(out)}
        write_atomically(out / RECORD, json.dumps(record, indent=1).encode())

    passed = summary(out, messages, time.perf_counter() - started)
    return 0 if passed else 1


def make(out: Path) -> list[str]:
    """Data, run, export and report in `out`; returns what the export says."""
    data = out / "data"
    scenes.write(data)

    # The recipe names runs/demo; every place of it moves to `out`.
    moved = [f"out={out}", f"data.sources.0.path={data / 'train'}"]
    sets = {"zeroshot": "zeroshot", "retrieval": "retrieval", "representation": "retrieval"}
    moved += [f"eval.{task}.data={data / folder}" for task, folder in sets.items()]
    train(config.load(config.find("demo"), moved), in_training)

    messages = export_run(out, out / "export")
    page.write(out)
    return messages


def remove_earlier(out: Path) -> None:
    """Remove the files that the record of an earlier demo lists, as they were written;
    FileExistsError for others.
    """
    record = out / RECORD
    written = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    present = _in_places(out)

    # Looked at before anything is removed: a refusal leaves all as it was.
    foreign = [path for path in present if written.get(str(path.relative_to(out))) != _stamp(path)]
    if foreign:
        names = ", ".join(str(path) for path in foreign[:5])
        more = ", …" if len(foreign) > 5 else ""
        raise FileExistsError(
            f"{len(foreign)} files in {out} are not as a demo wrote them: {names}{more}; "
            "move them away, or choose another folder with --out"
        )
    for path in present:
        path.unlink()

    # Folders that are empty now, from the innermost.
    for place in PLACES:
        for folder in sorted((out / place, *(out / place).rglob("*")), reverse=True):
            if folder.is_dir():
                folder.rmdir()
    record.unlink(missing_ok=True)


def _in_places(out: Path) -> list[Path]:
    """The files at the places that a demo writes to."""
    files = []
    for place in PLACES:
        inside = (out / place, *(out / place).rglob("*"))
        files += [path for path in inside if path.is_file() or path.is_symlink()]
    return files


def _stamp(path: Path) -> list[int]:
    """What shows that a file was changed: size and time."""
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns]


def summary(out: Path, messages: list[str], seconds: float) -> bool:
    """Print scores beside chance and where everything is; whether all scores are high enough."""
    rows = _scores(out / "results.json")
    log.say("\nheld-out scenes         score   chance   times chance")
    for name, score, chance in rows:
        log.say(f"{name:<22} {score:6.1%} {chance:8.2%} {score / chance:10.0f}")

    for name, place in _SHOWN_PLACES.items():
        log.say(f"{name:<9}{out / place}")
    for message in messages:
        log.say(f"         {message}")

    passed = all(score >= TIMES_CHANCE * chance for _, score, chance in rows)
    verdict = "done" if passed else f"FAILED: a score is below {TIMES_CHANCE} times chance"
    log.say(f"{verdict} in {seconds:.0f} s")
    return passed


def _scores(results: Path) -> list[tuple[str, float, float]]:
    """(name, score, chance) of what the demo is judged by."""
    records = json.loads(results.read_text(encoding="utf-8"))
    by_label = {record["label"]: record for record in records}
    judged = (
        ("zero-shot accuracy", "zeroshot", "acc1"),
        ("text retrieval R@1", "retrieval", "text_retrieval_recall@1"),
        ("image retrieval R@1", "retrieval", "image_retrieval_recall@1"),
    )

    rows = []
    for name, label, metric in judged:
        record = by_label[label]
        rows.append((name, record["metrics"][metric], record["chance"][metric]))
    return rows
