"""`vlp demo`: the whole path on generated scenes, from nothing to an exported model and a report,
in a few minutes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from vlp import config, log
from vlp.data_tools import scenes
from vlp.eval.report import page
from vlp.eval.run import in_training
from vlp.export.folder import export_run
from vlp.files import write_atomically
from vlp.locks import held
from vlp.train import train

RECORD = "demo.json"  # of what a demo wrote: path -> size and time
PLACES = (
    "data",
    "checkpoints",
    "export",
    "config.yaml",
    "metrics.jsonl",
    "results.json",
    "report.html",
)
TIMES_CHANCE = 5  # the demo fails below this


def demo(out: Path) -> int:
    """Make data, train configs/demo.yaml, evaluate, export and report into `out`; 0 if every score
    is at least 5 times chance.

    What an earlier demo wrote to `out` is removed first, and nothing else: a file of somebody
    else's that would be in the way is named and refused.
    """
    with held(out, advice="Wait until it is done, or choose another folder with --out"):
        return _demo(out)


def _demo(out: Path) -> int:
    remove_earlier(out)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    try:
        messages = make(out)
    finally:  # also where it was stopped half-way
        record = {str(path.relative_to(out)): _stamp(path) for path in _in_places(out)}
        write_atomically(out / RECORD, json.dumps(record, indent=1).encode())
    passed = summary(out, messages, time.perf_counter() - started)
    return 0 if passed else 1


def make(out: Path) -> list[str]:
    """Data, run, export and report in `out`; returns what the export says."""
    data = out / "data"
    scenes.write(data)
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
    there = _in_places(out)
    foreign = [path for path in there if written.get(str(path.relative_to(out))) != _stamp(path)]
    if foreign:
        names = ", ".join(str(path) for path in foreign[:5]) + (", …" if len(foreign) > 5 else "")
        raise FileExistsError(
            f"{len(foreign)} files in {out} are not as a demo wrote them: {names}; move them away, or choose another folder "
            "with --out"
        )
    for path in there:
        path.unlink()
    for place in PLACES:  # folders that are empty now, from the innermost
        for folder in sorted((out / place, *(out / place).rglob("*")), reverse=True):
            if folder.is_dir():
                folder.rmdir()
    record.unlink(missing_ok=True)


def _in_places(out: Path) -> list[Path]:
    """The files at the places that a demo writes to."""
    inside = [path for place in PLACES for path in (out / place, *(out / place).rglob("*"))]
    return [path for path in inside if path.is_file() or path.is_symlink()]


def _stamp(path: Path) -> list[int]:
    """What shows that a file was changed: size and time."""
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns]


def summary(out: Path, messages: list[str], seconds: float) -> bool:
    """Print scores beside chance and where everything is; whether all scores are high enough."""
    records = {
        record["label"]: record
        for record in json.loads((out / "results.json").read_text(encoding="utf-8"))
    }
    classification, retrieval = records["zeroshot"], records["retrieval"]
    rows = [
        ("zero-shot accuracy", classification["metrics"]["acc1"], classification["chance"]["acc1"])
    ]
    for direction in ("text", "image"):
        name = f"{direction}_retrieval_recall@1"
        rows.append(
            (f"{direction} retrieval R@1", retrieval["metrics"][name], retrieval["chance"][name])
        )
    log.say("\nheld-out scenes         score   chance   times chance")
    for name, score, chance in rows:
        log.say(f"{name:<22} {score:6.1%} {chance:8.2%} {score / chance:10.0f}")
    places = {
        "data": "data",
        "run": ".",
        "results": "results.json",
        "curves": "metrics.jsonl",
        "model": "export",
    }
    places |= {"report": "report.html"}
    for name, place in places.items():
        log.say(f"{name:<9}{out / place}")
    for message in messages:
        log.say(f"         {message}")
    passed = all(score >= TIMES_CHANCE * chance for _, score, chance in rows)
    log.say(
        f"{'done' if passed else f'FAILED: a score is below {TIMES_CHANCE} times chance'} in {seconds:.0f} s"
    )
    return passed
