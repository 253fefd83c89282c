"""`vlp data validate`: read every sample of every shard, decode every image, and name all that training could not use."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from vlp.data_tools import _work

HELP = "check every member of shards; exit status 1 where something is wrong"
EXAMPLE = """vlp data validate data/train
  vlp data validate "data/{00000..00041}.tar" --processes 8 --json report.json
  srun --ntasks=16 vlp data validate data/train --notes checked      (a killed call goes on; report by calling once more)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data validate`."""
    parser.add_argument("path", help="folder of shards, tar, or pattern with braces; several joined by ::")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")
    parser.add_argument("--notes", metavar="DIR", help="keep what each shard came to, for a later call or other machines to go on")
    _work.arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 where every member of every shard is fine, else 1 after naming what is not. Raises ValueError, OSError."""
    from vlp.data.paths import expand
    from vlp.data_tools._shards import claim, jobs
    from vlp.files import write_atomically

    paths, crew = expand(args.path), _work.crew(args)
    with tempfile.TemporaryDirectory() as forgotten:
        notes = Path(args.notes or forgotten)
        claim(notes, "validate", paths, {})
        results = _work.carry_out("validate", jobs(paths, notes, "checked"), check_shard, crew)
    reports = [result for result in results if result is not None]
    for report in reports:
        for problem in report["problems"]:
            print(f"{report['shard']}: {problem}")
        if report["n_problems"] > len(report["problems"]):
            print(f"{report['shard']}: and {report['n_problems'] - len(report['problems'])} more")
    n_samples, n_problems = (sum(report[name] for report in reports) for name in ("samples", "n_problems"))
    bad = sum(report["n_problems"] > 0 for report in reports)
    print(f"{len(reports)} shards, {n_samples} good samples, {n_problems} problems in {bad} shards")
    if args.json:
        summary = {"shards": len(reports), "samples": n_samples, "problems": n_problems, "reports": reports}
        write_atomically(args.json, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return 1 if n_problems else 0


def check_shard(job: tuple[int, Path]) -> _work.Result:
    """{"shard", "samples" (good ones), "n_problems", "problems" (the first in words), "counts"} of one tar, read anew."""
    from vlp.data.index import CLASS, ROW, scan
    from vlp.data.members import open_sample
    from vlp.data.picture import array

    _, path = job
    shard = scan(path)
    n_good = 0
    stats = path.with_name(f"{path.stem}_stats.json")
    with open(path, "rb") as file:
        for offset, length, n_captions, *_, flags in ROW.iter_unpack(shard.rows):
            file.seek(offset)
            key = f"the sample at byte {offset}"
            try:
                content = open_sample(file.read(length))
                key = content.key
                array(content.image)
                if content.negative_image:
                    array(content.negative_image)
                if not n_captions and not flags & CLASS:
                    raise ValueError("neither caption nor class")
            except ValueError as error:
                shard.report(key, str(error))
            else:
                n_good += 1
    if stats.exists() and (said := _promised(stats)) != shard.count:
        shard.report("", f"{stats.name} says {said} samples, the tar has {shard.count}")
    found = {"shard": str(path), "samples": n_good, "n_problems": shard.n_problems, "problems": shard.problems}
    return {**found, "counts": {"samples read": shard.count}}


def _promised(stats: Path) -> Any:
    try:
        return json.loads(stats.read_text())["successes"]
    except (ValueError, KeyError, TypeError) as error:
        return f"nothing readable ({type(error).__name__})"
