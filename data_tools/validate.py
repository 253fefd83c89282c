"""`vlp data validate`: read every sample of every shard, decode every image, and name all that
training could not use.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data.rows import Shard

HELP = "check every member of shards; exit status 1 where something is wrong, or no sample is good"
EXAMPLE = """vlp data validate data/train
  vlp data validate "data/{00000..00041}.tar" --processes 8 --json report.json
  srun --ntasks=16 vlp data validate data/train --notes checked      (a killed call goes on; report by calling once more)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data validate`."""
    parser.add_argument(
        "path", help="folder of shards, tar, or pattern with braces; several joined by ::"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")
    parser.add_argument(
        "--notes",
        metavar="DIR",
        help="keep what each shard came to, for a later call or other machines to go on",
    )
    work.arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 where all is fine, 1 after naming what is not, or where no sample is good. Raises
    ValueError, OSError.
    """
    from vlp.data.paths import expand
    from vlp.data.rows import said
    from vlp.data_tools._run.shards import claim, jobs
    from vlp.files import write_atomically

    paths, pool = expand(args.path), work.pool(args)
    with tempfile.TemporaryDirectory() as forgotten:
        notes = Path(args.notes or forgotten)
        claim(notes, "validate", paths, {})
        results = work.carry_out("validate", jobs(paths, notes, "checked"), check_shard, pool)
    reports = [result for result in results if result is not None]
    for report in reports:
        for problem in report["problems"]:
            print(f"{report['shard']}: {problem}")
        if report["n_problems"] > len(report["problems"]):
            print(f"{report['shard']}: and {report['n_problems'] - len(report['problems'])} more")
    n_samples, n_problems = (
        sum(report[name] for report in reports) for name in ("samples", "n_problems")
    )
    left_out: Counter[str] = Counter()
    for report in reports:
        left_out.update(report["left_out"])
    if left_out:
        print(f"odd or passed over: {said(left_out)}")
    bad = sum(report["n_problems"] > 0 for report in reports)
    print(f"{len(reports)} shards, {n_samples} good samples, {n_problems} problems in {bad} shards")
    if args.json:
        summary = {
            "shards": len(reports),
            "samples": n_samples,
            "problems": n_problems,
            "left_out": left_out,
            "reports": reports,
        }
        write_atomically(
            args.json, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode()
        )
    if not n_samples:
        print("there is no good sample to train on")
    return 1 if n_problems or not n_samples else 0


def check_shard(job: tuple[int, Path]) -> work.Result:
    """{"shard", "samples" (good ones), "n_problems", "problems" (the first in words), "left_out",
    "counts"} of one tar.
    """
    from vlp.data.rows import Shard
    from vlp.data.scan import scan

    _, path = job
    try:
        shard = scan(path)
        n_good = _check_samples(path, shard)
    except ValueError as error:  # no tar to read from: the others are checked all the same
        shard, n_good = Shard(path.name, 0, 0), 0
        shard.report("", f"not readable: {error}")
    stats = path.with_name(f"{path.stem}_stats.json")
    if stats.exists() and (promised := _promised(stats)) != shard.count:
        shard.report(
            "",
            f"another number of samples than promised: {stats.name} says {promised}, the tar has {shard.count}",
        )
    found = {name: getattr(shard, name) for name in ("n_problems", "problems", "left_out")}
    return {"shard": str(path), "samples": n_good, **found, "counts": {"samples read": shard.count}}


def _check_samples(path: Path, shard: Shard) -> int:
    """How many samples of a shard are good; it learns what is wrong with the others."""
    from vlp.data.picture import array

    n_good = 0
    with open(path, "rb") as file:
        for i in range(shard.count):
            key = f"sample {i}"
            try:
                content = shard.sample(file, i)
                key = content.key
                array(content.image)
                if content.negative_image:
                    array(content.negative_image)
                if not content.captions and not isinstance(content.meta.get("class"), str):
                    raise ValueError("neither caption nor class")
            except ValueError as error:
                shard.report(key, str(error))
            else:
                n_good += 1
    return n_good


def _promised(stats: Path) -> Any:
    try:
        return json.loads(stats.read_text())["successes"]
    except (ValueError, KeyError, TypeError) as error:
        return f"nothing readable ({type(error).__name__})"
