"""`vlp data validate`: read every sample of every shard, decode every image, and name all that
training could not use.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vlp.data.stored import destination, destination_file
from vlp.data_tools._run import work
from vlp.files import write_atomically

if TYPE_CHECKING:
    from vlp.data.further_members import Member
    from vlp.data.rows import Shard

HELP = "check every member of shards; exit status 1 where something is wrong, or no sample is good"
EXAMPLE = """vlp data validate data/train
  vlp data validate "data/{00000..00041}.tar" --processes 8 --json report.json
  srun --ntasks=16 vlp data validate data/train --notes checked
                                       (a killed call goes on; report by calling once more)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data validate`."""
    parser.add_argument(
        "path", help="folder of shards, tar, or pattern with braces; several joined by ::"
    )
    parser.add_argument(
        "--json", type=destination_file, metavar="FILE", help="where to write the report"
    )
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
    from vlp.data_tools._run.shards import claim, jobs

    paths, pool = expand(args.path), work.pool(args)
    with tempfile.TemporaryDirectory() as forgotten:
        notes = destination(args.notes or forgotten)
        claim(notes, "validate", paths, {})
        results = work.carry_out("validate", jobs(paths, notes, "checked"), check_shard, pool)

    # None is a shard of another machine that shares the notes.
    reports = [result for result in results if result is not None]
    summary = summarize(reports)
    print_reports(reports, summary)
    if args.json:
        encoded = json.dumps({**summary, "reports": reports}, indent=1, ensure_ascii=False)
        write_atomically(args.json, (encoded + "\n").encode())
    return 1 if summary["problems"] or not summary["samples"] else 0


def summarize(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all shards."""
    left_out: Counter[str] = Counter()
    further: Counter[str] = Counter()
    for report in reports:
        left_out.update(report["left_out"])
        # Notes of an earlier version do not tell of them.
        further.update(report.get("further", {}))
    return {
        "shards": len(reports),
        "samples": sum(report["samples"] for report in reports),
        "problems": sum(report["n_problems"] for report in reports),
        "left_out": left_out,
        "further": further,
    }


def print_reports(reports: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """What is wrong with each shard, and the counts."""
    from vlp.data.rows import said

    for report in reports:
        for problem in report["problems"]:
            print(f"{report['shard']}: {problem}")

        # An index keeps the first problems of a shard only.
        n_more = report["n_problems"] - len(report["problems"])
        if n_more > 0:
            print(f"{report['shard']}: and {n_more} more")

    if summary["left_out"]:
        print(f"odd or passed over: {said(summary['left_out'])}")
    if summary["further"]:
        print(", ".join(f"{n} {kind}" for kind, n in sorted(summary["further"].items())))
    n_bad = sum(report["n_problems"] > 0 for report in reports)
    print(
        f"{summary['shards']} shards, {summary['samples']} good samples, "
        f"{summary['problems']} problems in {n_bad} shards"
    )
    if not summary["samples"]:
        print("there is no good sample to train on")


def check_shard(job: tuple[int, Path]) -> work.Result:
    """{"shard", "samples" (good ones), "n_problems", "problems" (the first in words), "left_out",
    "counts"} of one tar.
    """
    from vlp.data.digests import stats_of
    from vlp.data.rows import Shard
    from vlp.data.scan import scan

    _, path = job

    # What cannot be read at all counts as one problem; the other shards are checked all the same.
    try:
        shard = scan(path)
        n_good = _check_samples(path, shard)
        further = _check_further(path, shard)
    except ValueError as error:
        shard, n_good, further = Shard(path.name, 0, 0), 0, Counter()
        shard.report("", f"not readable: {error}")

    stats = stats_of(path)
    if stats.exists() and (promised := _promised(stats)) != shard.count:
        shard.report(
            "",
            f"another number of samples than promised: {stats.name} says {promised}, "
            f"the tar has {shard.count}",
        )
    return {
        "shard": str(path),
        "samples": n_good,
        "n_problems": shard.n_problems,
        "problems": shard.problems,
        "left_out": shard.left_out,
        "further": further,
        "counts": {"samples read": shard.count},
    }


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

                # Decoded as training does, at full size.
                array(content.image)
                for picture in content.negative_images.values():
                    array(picture.data)

                if not content.captions and not isinstance(content.meta.get("class"), str):
                    raise ValueError("neither caption nor class")
            except ValueError as error:
                shard.report(key, str(error))
            else:
                n_good += 1
    return n_good


def _check_further(path: Path, shard: Shard) -> Counter[str]:
    """How many samples have frames, a sound or numbers; the shard learns what is wrong with these,
    and no longer counts them as passed over. The sample is good all the same: not every run reads
    them.
    """
    from vlp.data.further_members import carried_of, frames_of, of_tar, sound_of

    counts: Counter[str] = Counter()
    with open(path, "rb") as file:
        for key, of_sample in of_tar(path).members.items():
            # A second member of a name, which no reader gets, stays among what is odd.
            members = carried_of(of_sample)
            frames = frames_of(members)
            if frames:
                counts["samples with frames"] += 1
            if sound_of(members, ""):
                counts["samples with a sound"] += 1
            if any(member.extension == "npy" for member in members):
                counts["samples with numbers"] += 1

            for member in members:
                _take_back(shard, member.kind)
                try:
                    _check_member(member, member in frames, file)
                except ValueError as error:
                    shard.report(f"{key}{member.ending}", str(error))
    return counts


def _take_back(shard: Shard, kind: str) -> None:
    """Count one member of a kind no longer as passed over."""
    shard.left_out[kind] = shard.left_out.get(kind, 0) - 1
    if shard.left_out[kind] <= 0:
        del shard.left_out[kind]


def _check_member(member: Member, is_frame: bool, file: BinaryIO) -> None:
    """Raise ValueError for a sound or a frame that cannot be read."""
    from vlp.data.members import SOUND_TYPES
    from vlp.data.picture import array
    from vlp.data.sounds import can_be_read, decoded

    if is_frame:
        array(member.read(file))
    # Where the package for the others is absent, nothing is known of them.
    if member.extension in SOUND_TYPES and can_be_read(member.extension):
        decoded(member.read(file))


def _promised(stats: Path) -> Any:
    """How many samples the statistics of a shard count."""
    try:
        return json.loads(stats.read_text())["successes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"nothing readable ({type(error).__name__})"
