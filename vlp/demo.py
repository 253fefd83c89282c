"""`vlp demo`: the whole path on generated scenes, from nothing to an exported model and a report, in a few minutes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from vlp import config, log
from vlp.data_tools import scenes
from vlp.eval import page
from vlp.eval.run import in_training
from vlp.export import export_run
from vlp.train import train

TIMES_CHANCE = 5  # the demo fails below this


def demo(out: Path) -> int:
    """Make data, train configs/demo.yaml, evaluate, export and report into `out`; 0 if every score is at least 5 times chance.

    An earlier demo in `out` is replaced; a folder that holds anything else is refused.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / "demo.json").exists():
            raise FileExistsError(f"{out} holds something else than a demo; choose another folder with --out")
        shutil.rmtree(out)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text("{}", encoding="utf-8")
    data = out / "data"
    scenes.write(data)
    moved = [f"out={out}", f"data.sources.0.path={data / 'train'}"]
    sets = {"zeroshot": "zeroshot", "retrieval": "retrieval", "representation": "retrieval"}
    moved += [f"eval.{task}.data={data / folder}" for task, folder in sets.items()]
    train(config.load(config.find("demo"), moved), in_training)
    messages = export_run(out, out / "export")
    page.write(out)
    passed = summary(out, messages, time.perf_counter() - started)
    return 0 if passed else 1


def summary(out: Path, messages: list[str], seconds: float) -> bool:
    """Print scores beside chance and where everything is; whether all scores are high enough."""
    records = {record["label"]: record for record in json.loads((out / "results.json").read_text(encoding="utf-8"))}
    classification, retrieval = records["zeroshot"], records["retrieval"]
    rows = [("zero-shot accuracy", classification["metrics"]["acc1"], classification["chance"]["acc1"])]
    for direction in ("text", "image"):
        name = f"{direction}_retrieval_recall@1"
        rows.append((f"{direction} retrieval R@1", retrieval["metrics"][name], retrieval["chance"][name]))
    log.say("\nheld-out scenes         score   chance   times chance")
    for name, score, chance in rows:
        log.say(f"{name:<22} {score:6.1%} {chance:8.2%} {score / chance:10.0f}")
    places = {"data": "data", "run": ".", "results": "results.json", "curves": "metrics.jsonl", "model": "export"}
    places |= {"report": "report.html"}
    for name, place in places.items():
        log.say(f"{name:<9}{out / place}")
    for message in messages:
        log.say(f"         {message}")
    passed = all(score >= TIMES_CHANCE * chance for _, score, chance in rows)
    log.say(f"{'done' if passed else f'FAILED: a score is below {TIMES_CHANCE} times chance'} in {seconds:.0f} s")
    return passed
