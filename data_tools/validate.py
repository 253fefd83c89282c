"""`vlp data validate`: read every sample of every shard, decode every image, and name all that training could not use."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELP = "check every member of shards; exit status 1 where something is wrong"
EXAMPLE = """vlp data validate data/train
  vlp data validate "data/{00000..00041}.tar" --workers 8 --json report.json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data validate`."""
    parser.add_argument("path", help="folder of shards, tar, or pattern with braces; several joined by ::")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes; a shard at a time each (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")


def run(args: argparse.Namespace) -> int:
    """Returns 0 where every member of every shard is fine, else 1 after naming what is not. Raises ValueError, OSError."""
    from vlp.data.sources.shards import expand
    from vlp.files import write_atomically

    paths = expand(args.path)
    started, reports, n_samples = time.monotonic(), [], 0
    for report in _reports([str(path) for path in paths], args.workers):
        reports.append(report)
        n_samples += report["samples"]
        for problem in report["problems"]:
            print(f"{report['shard']}: {problem}")
        if report["n_problems"] > len(report["problems"]):
            print(f"{report['shard']}: and {report['n_problems'] - len(report['problems'])} more")
        rate = n_samples / (time.monotonic() - started)
        left = (len(paths) - len(reports)) * n_samples / len(reports) / rate if rate else 0
        if sys.stderr.isatty():
            print(f"\r{len(reports)}/{len(paths)} shards, {rate:.0f} samples/s, {left:.0f} s left ", end="", file=sys.stderr)
    n_problems = sum(report["n_problems"] for report in reports)
    bad = sum(report["n_problems"] > 0 for report in reports)
    print(f"{len(paths)} shards, {n_samples} good samples, {n_problems} problems in {bad} shards")
    if args.json:
        summary = {"shards": len(paths), "samples": n_samples, "problems": n_problems, "reports": reports}
        write_atomically(args.json, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return 1 if n_problems else 0


def _reports(paths: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """A report a shard, in order."""
    if workers < 2:
        yield from map(check_shard, paths)
        return
    with multiprocessing.get_context("forkserver").Pool(min(workers, len(paths)), _one_thread) as pool:
        yield from pool.imap(check_shard, paths)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def check_shard(path: str) -> dict[str, Any]:
    """{"shard", "samples" (good ones), "n_problems", "problems" (the first in words)} of one tar, read anew."""
    from vlp.data.decode import decode
    from vlp.data.index import CLASS, ROW, scan
    from vlp.data.members import open_sample

    shard = scan(Path(path))
    n_good = 0
    stats = Path(path).with_name(f"{Path(path).stem}_stats.json")
    with open(path, "rb") as file:
        for offset, length, n_captions, *_, flags in ROW.iter_unpack(shard.rows):
            file.seek(offset)
            key = f"the sample at byte {offset}"
            try:
                content = open_sample(file.read(length))
                key = content.key
                decode(content.image)
                if content.negative_image:
                    decode(content.negative_image)
                if not n_captions and not flags & CLASS:
                    raise ValueError("neither caption nor class")
            except ValueError as error:
                shard.report(key, str(error))
            else:
                n_good += 1
    if stats.exists() and (said := _promised(stats)) != shard.count:
        shard.report("", f"{stats.name} says {said} samples, the tar has {shard.count}")
    return {"shard": path, "samples": n_good, "n_problems": shard.n_problems, "problems": shard.problems}


def _promised(stats: Path) -> Any:
    try:
        return json.loads(stats.read_text())["successes"]
    except (ValueError, KeyError, TypeError) as error:
        return f"nothing readable ({type(error).__name__})"
