"""`vlp data dedup`: shards → the same shards without copies, and without what evaluation sets hold
(--against).

Two pictures are copies where their perceptual hashes differ in at most --distance of 64 bits and
their colors, on a grid of 4 × 4, by at most 12 of 255 levels on average; with --embeddings also
where their cosine is at least --cosine. The sample that comes first in the order of the shards
stays: a sample is dropped if and only if it is a copy of one that stays before it, or of one in
--against. The outcome depends on nothing but the input and the options.

The captions of a copy are not lost: the sample that stays takes them over, with their negatives,
counterfactuals and scores (--captions merge); its JSON names the copies in "merged_keys". What
evaluation sets hold goes altogether.

    DIR/copies.jsonl    every dropped sample beside the one that it is a copy of, for a person to
                        judge

On 1,500 photos of Caltech 101 at 4 bits: 99 % of copies at JPEG quality 40 or half the size are
found, 93 % of those with 2 % cut off the edges, 52 % with 5 %, no mirrored ones; two pairs of
photos are taken for copies, and nearly are.

Up to 200,000 samples, or 50,000 with embeddings, are compared all with all in one process. More
are searched in buckets (--search), in stages of jobs that all --processes and machines share and
that go on after a kill: hashes are cut into blocks and compared where enough of them agree, which
misses no pair; embeddings are compared within the --probes nearest of many cells of about 256 rows,
in a tree of K-means, which needs FAISS, costs ∝ n·log n, and finds 99.9 % of the pairs of a million
random rows. Where very many different pictures are alike, such as blank ones in a million shades,
they are compared with those that stay, which finds nearly all copies; pairs beyond that are passed
over, and counted.

Memory: --memory for each process; to decide, about 100 bytes for each sample that is near another
and 100 for each pair. Disk, in DIR/_search until all is written: about 300 bytes a sample, and 128
with embeddings. Pictures that do not open stay, and are counted: `vlp data validate` names them.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data_tools.dedup.copies import Method
    from vlp.data_tools.dedup.plan import Division

HELP = "drop copies by perceptual hash and embedding, and what evaluation sets hold"
EXAMPLE = """vlp data dedup data/raw --to data/unique --processes 8
  vlp data dedup data/raw --to data/clean --against data/coco_test --against data/imagenet_val
  vlp data dedup data/raw --to data/clean --against data/coco_test --keep-copies
  vlp data dedup data/raw --to data/unique --embeddings data/raw_embedded    (of `vlp data embed`)
"""

PROBES = 16  # 99.9 % of the pairs of a million random rows


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data dedup`."""
    add = parser.add_argument
    work.shards_arguments(parser)

    # What is compared, and what becomes of a copy.
    add(
        "--against",
        action="append",
        default=[],
        metavar="SHARDS",
        help="drop what these hold, too; may be repeated",
    )
    add(
        "--captions",
        choices=("merge", "keep-first"),
        default="merge",
        help="whether the sample that stays takes over the captions of its copies "
        "(default: %(default)s)",
    )
    add("--keep-copies", action="store_true", help="drop only what --against holds")

    # What makes a copy.
    add(
        "--distance",
        type=int,
        default=4,
        metavar="BITS",
        help="most differing bits of 64; -1: no hashes (default: %(default)s)",
    )
    add(
        "--embeddings",
        action="append",
        default=[],
        metavar="DIR",
        help="what `vlp data embed` wrote for SOURCE; once more for each --against, in their order",
    )
    add(
        "--cosine",
        type=float,
        default=0.95,
        metavar="X",
        help="least cosine of copies, with --embeddings (default: %(default)s)",
    )

    # How copies are searched.
    add(
        "--search",
        choices=("auto", "exact", "buckets"),
        default="auto",
        help="exact: all with all, in one process; buckets: in stages that all processes and "
        "machines share; auto: buckets above 200,000 samples, 50,000 with embeddings "
        "(default: %(default)s)",
    )
    add(
        "--probes",
        type=int,
        default=PROBES,
        metavar="N",
        help="cells that a sample's embedding is compared in, in buckets (default: %(default)s)",
    )
    add(
        "--memory",
        type=float,
        default=1.0,
        metavar="GB",
        help="of each process that searches in buckets (default: %(default)s)",
    )
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Fingerprint all pictures, decide, write the shards, and print what was dropped and why."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, jobs, transform
    from vlp.data_tools.dedup.copies import Compared, decided, forget_search
    from vlp.data_tools.dedup.drop import Decision, DropCopies
    from vlp.data_tools.dedup.embedded import opened
    from vlp.data_tools.dedup.near import Limits
    from vlp.data_tools.dedup.survey import survey

    _check(args)
    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    against = [expand(shards) for shards in args.against]
    fixed = list(chain.from_iterable(against))

    # What --against holds comes first, so that it stays and the source's copies of it go. The
    # options name the source's embeddings first.
    groups = [*against, sources]
    embeddings = args.embeddings[1:] + args.embeddings[:1]
    rows = opened(groups, embeddings) if embeddings else None
    claim(folder, "dedup", sources, _settings(args, fixed))

    # Whether a sample stays depends on all before it: all shards are fingerprinted first.
    prints = jobs(fixed + sources, folder, "fingerprints")
    surveyed = work.carry_out("fingerprints", prints, partial(survey, folder=folder), pool)
    if not work.all_done(surveyed):
        return 0

    limits = Limits(args.distance, args.cosine, args.keep_copies)
    sizes = [result["samples"] for result in surveyed]
    compared = Compared(groups, sizes, rows, limits)
    decision = Decision(folder, sources, sizes[len(fixed) :], compared.n_fixed)
    if args.captions == "merge":
        decision.check_unchanged()
    method, division = _method(args, sum(sizes)), _division(args)
    passed_over = decided(decision, compared, method, division, pool)
    if passed_over is None:
        return 0

    # A folder of before this check sum was kept has none.
    seen = [result.get("seen") for result in surveyed[len(fixed) :]]
    change = DropCopies(decision, args.captions == "merge", seen)
    results = transform(sources, folder, "dedup", change, pool)
    if work.all_done(results):
        forget_search(folder)
    counts = work.total(results) + passed_over
    counts["unreadable: pictures"] = work.total(surveyed[len(fixed) :])["unreadable: pictures"]
    print(work.report(counts, f"{folder}:"))
    return 0


def _method(args: argparse.Namespace, n: int) -> Method:
    """How n samples are compared."""
    from vlp import log
    from vlp.data_tools.dedup.copies import EXACT_ROWS_UP_TO, EXACT_UP_TO
    from vlp.eval.search.nearest import import_faiss

    if args.search != "auto":
        return args.search
    if n <= (EXACT_ROWS_UP_TO if args.embeddings else EXACT_UP_TO):
        return "exact"

    if args.embeddings:
        try:
            import_faiss()
        except ValueError as error:
            log.say(f"{n:,} samples are compared all with all, which takes long: {error}")
            return "exact"
    return "buckets"


def _division(args: argparse.Namespace) -> Division:
    from vlp.data_tools.dedup.cells import ROWS_A_CELL
    from vlp.data_tools.dedup.plan import Division

    rows_a_cell = ROWS_A_CELL if args.embeddings else 0
    return Division(round(args.memory * 1e9), rows_a_cell, args.probes)


def _settings(args: argparse.Namespace, fixed: list[Path]) -> dict[str, Any]:
    """What the output depends on, besides the source."""
    settings: dict[str, Any] = {
        "distance": args.distance,
        "keep_copies": args.keep_copies,
        "embeddings": args.embeddings,
        "captions": args.captions,
    }
    if args.embeddings:
        settings["cosine"] = args.cosine
    # Not where it is left open: folders that were begun before there was a choice have none.
    if args.search != "auto":
        settings["search"] = args.search
    if args.embeddings and args.probes != PROBES:
        settings["probes"] = args.probes
    settings["against"] = [[path.name, path.stat().st_size] for path in fixed]
    return settings


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that make no sense, or need FAISS where it is not installed."""
    if not -1 <= args.distance <= 8:
        raise ValueError(
            f"--distance {args.distance} is no number of bits from 0 to 8 "
            "(beyond, unlike pictures meet), nor -1"
        )
    if args.distance < 0 and not args.embeddings:
        raise ValueError(
            "nothing to compare: --distance -1 turns the hashes off, "
            "and no --embeddings DIR is given"
        )

    # Folders belong to --against by their order, so none may be left out.
    if args.embeddings and len(args.embeddings) != 1 + len(args.against):
        raise ValueError(
            f"--embeddings is given {len(args.embeddings)} times; "
            "expected once for the source and once for each --against"
        )
    if not 0 < args.cosine <= 1:
        raise ValueError(f"--cosine {args.cosine} must lie in (0, 1]")
    if args.probes < 1:
        raise ValueError(f"--probes {args.probes} must be at least 1")
    if not 0.05 <= args.memory <= 10_000:
        raise ValueError(f"--memory {args.memory} must lie in [0.05, 10000] (GB)")
    if args.search == "buckets" and args.embeddings:
        from vlp.eval.search.nearest import import_faiss

        import_faiss()
    if args.keep_copies and not args.against:
        raise ValueError("--keep-copies drops only what --against SHARDS holds; name them")
