"""The options of `vlp data mine`, and what they make: the rules, the judge, the search."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp.data_tools.mine.rules import Rules
    from vlp.data_tools.mine.search import Method, Search
    from vlp.data_tools.mine.store import Store
    from vlp.judges import Judge

# What the output depends on, besides the input.
_NAMES = (
    "query", "find", "top", "max_ratio", "margin", "same", "skip", "window", "k", "choice",
    "temperature", "seed", "images", "order",
)  # fmt: skip


def search_arguments(parser: argparse.ArgumentParser) -> None:
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


def rule_arguments(parser: argparse.ArgumentParser) -> None:
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
        help="cross-encoder:MODEL or mllm:MODEL of transformers, name or folder, or "
        "package.module:function of your own",
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


def rules(args: argparse.Namespace) -> Rules:
    """The filters and the choice; raises ValueError."""
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


def judge(args: argparse.Namespace) -> Judge | None:
    """The judge, if any; raises ValueError where it cannot be loaded."""
    from vlp.judges import Judge

    if not args.judge:
        return None
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch} must be at least 1")
    named = Judge.of(args.judge, args.device, args.batch, args.bf16)

    # What is wrong with it shows now, not in the first shard.
    named.settings()
    return named


def search(args: argparse.Namespace, store: Store, folder: Path) -> Search:
    """The search; raises ValueError where it needs FAISS and that is not installed."""
    from vlp.data_tools.mine.search import Search

    method = _method(args, store.n)
    cells = 0
    if method == "ivf":
        cells = min(args.cells or round(4 * store.n**0.5), store.n)
    return Search(
        store,
        folder,
        query=args.query,
        searched=args.find,
        top=args.top,
        method=method,
        cells=cells,
        device=args.device,
    )


def _method(args: argparse.Namespace, n: int) -> Method:
    """How n samples are searched."""
    from vlp import log
    from vlp.eval.search.nearest import EXACT_UP_TO, import_faiss

    if args.cells or args.index in ("ivf", "hnsw"):
        import_faiss()
        return "ivf" if args.cells else args.index
    if args.index == "exact" or n <= EXACT_UP_TO:
        return "exact"

    try:
        import_faiss()
    except ValueError as error:
        log.say(f"{n:,} samples are searched exactly, which takes long on a CPU: {error}")
        return "exact"
    return "ivf"


def settings(args: argparse.Namespace, search: Search, judge: Judge | None) -> dict[str, Any]:
    """What the output depends on, besides the input."""
    teacher = search.store.opened.teacher
    about = {name: getattr(args, name) for name in _NAMES}
    about |= {"model": teacher.model, "weights": teacher.weights}
    about |= {"index": search.method, "cells": search.cells}
    if judge is not None:
        about |= {"delta": args.delta, "batch": args.batch, **judge.settings()}
    return about
