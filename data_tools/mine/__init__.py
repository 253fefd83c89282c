"""`vlp data mine`: shards → the same shards with each sample's nearest other samples as negatives,
or in an order in which neighbours stand together.

Neighbours are searched by the cosine of stored embeddings (`vlp data embed`): --from image --find
text finds, for each picture, the captions that fit it nearly as well as its own. What may be true
of the picture is left out, in this order, and counted by reason: the same key or origin, a caption
of the sample, a score too near its own (--max-ratio, or --margin), another wording (--same), the
nearest --skip. From the next --window are taken --k: the first, or drawn by the seed and the key.

Written fields, as `vlp data negatives` writes them:
    negatives, negatives_valid, negatives_of, negative_kinds ("mined")
    negative_scores, positive_score    cosines, or what --judge says; then `score` is the positive's
    negative_keys                      of the samples that the negatives are captions of
    KEY.negative.jpg, KEY.negative.1.jpg, …    with --images, their pictures

--judge cross-encoder:MODEL (a head for image-text matching) or mllm:MODEL (asked whether the
caption describes the picture, as UniME-V2 asks) drops what it scores above the sample's own pair
less --delta: that may be true. An answer that is neither yes nor no drops the neighbour, counted.

--order G writes no negatives but a new order: each run of G samples holds neighbours and has an
"origin" of its own, so that `data.together: G` makes batches of them.

Memory: embeddings are mapped from their files; a search holds 1,024 × (D + 8,192) numbers. Exact
search takes n²·D multiplications: a million samples of 512 are 5e14. Above a million samples FAISS
searches an index where it is installed (pip install 'vlp[mine]'), in 4·D bytes a sample.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data_tools._run.work import Pool
    from vlp.data_tools.mine.judge import Judge
    from vlp.data_tools.mine.rules import Rules
    from vlp.data_tools.mine.search import Search
    from vlp.data_tools.mine.store import Store

HELP = "find each sample's nearest others by stored embeddings: negatives, images, an order"
EXAMPLE = """vlp data mine data/train --embeddings data/train_embedded --to data/mined
  vlp data mine data/train --embeddings data/train_embedded --k 5 --images --to data/mined
  vlp data mine data/train --embeddings data/emb --judge mllm:models/vlm --to data/judged
  vlp data mine data/train --embeddings data/emb --from image --find image --order 2 --to data/pairs
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data mine`."""
    add = parser.add_argument
    add("source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::")
    add(
        "--embeddings",
        required=True,
        metavar="DIR",
        help="what `vlp data embed` wrote for these shards",
    )
    add(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the new shards; the same call goes on where one stopped",
    )
    _search_arguments(parser)
    _rule_arguments(parser)

    # What is written.
    add(
        "--images",
        action="store_true",
        help="pack the neighbours' pictures beside their captions",
    )
    add(
        "--order",
        type=int,
        default=0,
        metavar="G",
        help="write the samples in groups of G neighbours instead of negatives",
    )
    work.arguments(parser)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    """What is searched, and how."""
    add, sides = parser.add_argument, ("image", "text")
    add(
        "--from",
        dest="query",
        choices=sides,
        default="image",
        help="what neighbours are searched of (default: %(default)s)",
    )
    add(
        "--find",
        choices=sides,
        default="text",
        help="what is searched (default: %(default)s)",
    )
    add(
        "--top",
        type=int,
        default=64,
        metavar="N",
        help="neighbours that are searched (default: %(default)s)",
    )
    add(
        "--index",
        choices=("auto", "exact", "ivf", "hnsw"),
        default="auto",
        help="auto: exact up to a million samples, else ivf where FAISS is installed "
        "(default: %(default)s)",
    )
    add(
        "--cells",
        type=int,
        default=0,
        metavar="K",
        help="cells of ivf, of which the 16 nearest are searched (default: 4·√samples)",
    )
    add(
        "--device",
        default="auto",
        help="of the search and the judge; auto: the GPU of the launcher's local rank, or the CPU",
    )


def _rule_arguments(parser: argparse.ArgumentParser) -> None:
    """Which neighbours are left out, which taken, and who judges."""
    add = parser.add_argument
    add(
        "--max-ratio",
        type=float,
        default=0.95,
        metavar="R",
        help="leave out scores of at least R × the sample's own (default: %(default)s)",
    )
    add(
        "--margin",
        type=float,
        metavar="M",
        help="instead of --max-ratio: leave out scores of at least the sample's own + M "
        "(UniME: 0.1)",
    )
    add(
        "--same",
        type=float,
        default=0.98,
        metavar="X",
        help="leave out captions whose cosine with the sample's is at least X "
        "(default: %(default)s)",
    )
    add("--skip", type=int, default=0, metavar="R0", help="leave out the nearest R0 of the others")
    add(
        "--window",
        type=int,
        default=16,
        metavar="N",
        help="choose from the N nearest that are left (default: %(default)s)",
    )
    add("--k", type=int, default=4, metavar="K", help="negatives a sample (default: %(default)s)")
    add(
        "--choice",
        choices=("top", "uniform", "softmax"),
        default="top",
        help="default: %(default)s",
    )
    add(
        "--temperature",
        type=float,
        default=0.05,
        metavar="T",
        help="of --choice softmax (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")

    add(
        "--judge",
        metavar="KIND:MODEL",
        help="cross-encoder:MODEL or mllm:MODEL of transformers, name or folder",
    )
    add(
        "--delta",
        type=float,
        default=0.1,
        metavar="D",
        help="the judge's score above the sample's own less D is true (default: %(default)s)",
    )
    add(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="pairs that the judge reads at once (default: %(default)s)",
    )
    add("--bf16", action="store_true", help="the judge computes in bfloat16")


@work.alone
def run(args: argparse.Namespace) -> int:
    """Survey, search, decide, write, and print what was left out and why."""
    from vlp.data.paths import expand
    from vlp.data_tools._run.shards import claim, jobs, transform
    from vlp.data_tools.mine.decide import Decide
    from vlp.data_tools.mine.store import Store, survey
    from vlp.data_tools.mine.write import AddMined

    sources, pool, folder = expand(args.source), work.pool(args), Path(args.to)
    rules = _rules(args)
    store = Store(sources, args.embeddings)
    _check(args, store)
    judge = _judge(args)
    search = _search(args, store, folder)
    claim(folder, "mine", sources, _settings(args, search, judge))

    # A neighbour may lie anywhere: all shards are surveyed and searched before one is written.
    surveyed = work.carry_out(
        "survey", jobs(sources, folder, "survey"), partial(survey, folder=folder), pool
    )
    if not work.all_done(surveyed):
        return 0
    found = work.carry_out("search", jobs(sources, folder, "neighbours"), search, pool)
    if not work.all_done(found):
        return 0
    if args.order:
        return _write_order(args, store, rules, pool)

    decide = Decide(store, folder, rules, args.find, judge, args.delta)
    decided = work.carry_out("choose", jobs(sources, folder, "chosen"), decide, pool)
    change = AddMined(store, folder, args.images, judge is not None)
    results = transform(sources, folder, "mine", change, pool)
    counts = work.total(decided) | work.total(results) | _without(found)
    print(work.report(counts, f"{folder}:"))
    return 0


def _rules(args: argparse.Namespace) -> Rules:
    from vlp.data_tools.mine.rules import Rules

    if args.order < 0 or args.order == 1:
        raise ValueError(f"--order {args.order}: expected groups of at least 2")
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1")
    return Rules(
        max_ratio=args.max_ratio,
        margin=args.margin,
        same=args.same,
        skip=args.skip,
        window=args.window,
        k=args.k,
        choice=args.choice,
        temperature=args.temperature,
        seed=args.seed,
    )


def _check(args: argparse.Namespace, store: Store) -> None:
    """Raise ValueError for embeddings that are none, or not of these samples and their model."""
    from vlp import stored_embeddings
    from vlp.config import Captions
    from vlp.data.sources.shards import Options
    from vlp.data.sources.shards import open as open_shards

    if store.n < 2:
        raise ValueError(f"{args.source} holds {store.n} usable samples; expected at least 2")
    if not any(store.rows(shard, args.find).any() for shard in range(len(store.paths))):
        raise ValueError(
            f"{args.embeddings} holds no {args.find} embedding but zeros: no sample has what was "
            "embedded"
        )

    # By content: a few samples are embedded again, where the model is on this machine.
    options = Options(args.source, embeddings=args.embeddings)
    captions = Captions(choose="first", missing="drop")
    stored_embeddings.check_with_teacher(open_shards(options, captions))


def _judge(args: argparse.Namespace) -> Judge | None:
    from vlp.data_tools.mine.judge import Judge

    if not args.judge:
        return None
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch} must be at least 1")
    judge = Judge.of(args.judge, args.device, args.batch, args.bf16)

    # What is wrong with it shows now, not in the first shard.
    judge.settings()
    return judge


def _search(args: argparse.Namespace, store: Store, folder: Path) -> Search:
    from vlp import log
    from vlp.data_tools._run.device import resolve
    from vlp.data_tools.mine.search import EXACT_UP_TO, Search, import_faiss

    method = args.index
    if method == "auto":
        method = "exact"
        if store.n > EXACT_UP_TO:
            try:
                import_faiss()
                method = "ivf"
            except ValueError as error:
                log.say(f"{store.n:,} samples are searched exactly, which takes long: {error}")
    if args.cells:
        method = "ivf"
    if method != "exact":
        import_faiss()
    cells = args.cells or round(4 * store.n**0.5)
    return Search(
        store,
        folder,
        args.query,
        args.find,
        args.top,
        method,
        min(cells, store.n) if method == "ivf" else 0,
        resolve(args.device),
    )


def _settings(args: argparse.Namespace, search: Search, judge: Judge | None) -> dict[str, Any]:
    """What the output depends on, besides the input."""
    teacher = search.store.opened.teacher
    names = (
        "query find top max_ratio margin same skip window k choice temperature seed images order"
    )
    return {
        **{name: getattr(args, name) for name in names.split()},
        "model": teacher.model,
        "weights": teacher.weights,
        "index": search.method,
        "cells": search.cells,
        **({"delta": args.delta, "batch": args.batch, **judge.settings()} if judge else {}),
    }


def _write_order(args: argparse.Namespace, store: Store, rules: Rules, pool: Pool) -> int:
    """Write the samples in groups of neighbours."""
    from collections import Counter

    import numpy as np

    from vlp.data.format import index
    from vlp.data_tools.mine.decide import read_neighbours
    from vlp.data_tools.mine.rules import in_window
    from vlp.data_tools.mine.write import WriteOrder, known, together

    folder, size = Path(args.to), args.order
    identities, counts = known(folder, store), Counter[str]()
    neighbours: list[np.ndarray] = []
    for shard in range(len(store.paths)):
        found = read_neighbours(folder, shard)
        window = in_window(found, store.first(shard), rules, identities, counts)
        neighbours += [numbers[row] for numbers, row in zip(found.numbers, window)]
    order, n_alone = together(neighbours, size)
    counts["samples that stand beside no neighbour"] = n_alone

    # Whole groups a shard, and about as many shards as there were.
    n_groups = -(-store.n // size)
    groups_a_shard = -(-n_groups // len(store.paths))
    n_samples = groups_a_shard * size
    parts = [
        work.Job(folder / f"{i:05d}_order.json", (i, i * groups_a_shard, part), len(part))
        for i, part in enumerate(np.split(order, range(n_samples, store.n, n_samples)))
    ]
    results = work.carry_out("order", parts, WriteOrder(store, folder, size), pool)
    if work.all_done(results):
        index(sorted(folder.glob("*.tar")))
    print(work.report(work.total(results) | counts, f"{folder}: groups of {size}"))
    return 0


def _without(found: list[work.Result]) -> Any:
    """The counts of the search that are of samples without neighbours."""
    counts = work.total(found)
    return type(counts)(
        {name: n for name, n in counts.items() if name.startswith("samples without")}
    )
